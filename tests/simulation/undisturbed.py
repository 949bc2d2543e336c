"""What thousands of schedules a minute need: no log, no garbage collector between their steps."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Generator

import structlog


@contextlib.contextmanager
def undisturbed(*, is_loud: bool = False) -> Generator[None]:
    """For the time of a `with`; afterwards all is as before. Loud: the agent logs everything."""
    before, was_collecting = structlog.get_config(), gc.isenabled()
    level = logging.DEBUG if is_loud else logging.CRITICAL
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level))
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_collecting:
            gc.enable()
        structlog.configure(**before)
