"""Notices that the host was suspended, so that nothing is late by as long as it slept.

Deadlines are on CLOCK_BOOTTIME, which goes on in suspend; the loop waits by CLOCK_MONOTONIC, which does not
(clock_gettime(2)). Knows nothing of those who wait: whoever wires it tells them to look again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from remotegpu_agent.clock import Clock

log = structlog.get_logger(__name__)

_LOOK_EVERY_S: Final = 2.0
"""So late a wake-up is noticed at most; a look costs microseconds."""
_SLEPT_MIN_S: Final = 1.0
"""A shorter sleep makes nobody late who has a margin of seconds."""


class SleepWatch:
    """Calls `on_woken` soon after the host has come back from a suspend."""

    def __init__(self, clock: Clock, on_woken: Callable[[], None]) -> None:
        self._clock = clock
        self._on_woken = on_woken

    async def run(self) -> None:
        """Watch for ever."""
        ahead_s = self._ahead_s()
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            before_s, ahead_s = ahead_s, self._ahead_s()
            if ahead_s - before_s >= _SLEPT_MIN_S:
                log.warning("the host was suspended", slept_s=round(ahead_s - before_s, 1))
                self._on_woken()

    def _ahead_s(self) -> float:
        return self._clock.boottime_ns() / 1e9 - asyncio.get_running_loop().time()
