"""The time of the database's host, as this host knows it between two looks: planes on several hosts agree on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

DRIFT: Final = 1e-4
"""So much two clocks may part: 100 ppm each second; NTP calls a clock broken at 500 (RFC 5905, section 11.3)."""


def boottime_s() -> float:
    """Counts on while the host sleeps, which `time.monotonic` does not (clock_gettime(2))."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class ServerClock:
    """Made of observations. Of two it believes the one that can be less wrong; old ones are believed less and less."""

    def __init__(self, own_s: Callable[[], float] = boottime_s) -> None:
        self._own_s = own_s
        self._offset_s = time.time() - own_s()
        self._error_s = float("inf")
        self._observed_s = own_s()

    def __call__(self) -> float:
        """Seconds since 1970."""
        return self._own_s() + self._offset_s

    @property
    def error_s(self) -> float:
        """It is off by at most so much."""
        return self._error_s + (self._own_s() - self._observed_s) * DRIFT

    def observe(self, sent_s: float, server_s: float, received_s: float) -> None:
        """The server said `server_s` at some moment between two of the own clock."""
        error_s = (received_s - sent_s) / 2
        if error_s <= self.error_s:
            self._offset_s = server_s - (sent_s + received_s) / 2
            self._error_s, self._observed_s = error_s, received_s
