"""What thousands of schedules a minute need: no log, no garbage collector between their steps, no look at proxies."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Generator
from unittest import mock

import structlog

from remotegpu_agent import control_plane


@contextlib.contextmanager
def undisturbed(*, is_loud: bool = False) -> Generator[None]:
    """For the time of a `with`; afterwards all is as before. Loud: the agent logs everything."""
    before, was_collecting = structlog.get_config(), gc.isenabled()
    level = logging.DEBUG if is_loud else logging.CRITICAL
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    gc.disable()
    gc.freeze()
    try:
        # The environment is copied for each client that is made; simulated agents are made five times a second.
        with mock.patch.object(control_plane, "proxy_for", return_value=None):
            yield
    finally:
        gc.unfreeze()
        if was_collecting:
            gc.enable()
        structlog.configure(**before)
