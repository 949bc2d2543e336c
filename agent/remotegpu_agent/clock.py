"""Time by parameter. Leases, timeouts and delays use CLOCK_BOOTTIME, which goes on in suspend and never jumps."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """The two clocks of the agent."""

    def boottime_ns(self) -> int:
        """Nanoseconds since boot, suspend included (clock_gettime(2), CLOCK_BOOTTIME)."""
        ...

    def wall_ms(self) -> int:
        """Milliseconds since 1970, for people and peers; never for a decision."""
        ...


class SystemClock:
    """The host's clocks."""

    def boottime_ns(self) -> int:
        """Nanoseconds since boot."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def wall_ms(self) -> int:
        """Milliseconds since 1970."""
        return time.time_ns() // 1_000_000
