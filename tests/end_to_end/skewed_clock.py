"""An agent whose clocks jump when a test says so; those of everybody else, its shims and the plane too, do not."""

from __future__ import annotations

import sys

from tests.end_to_end.agent_process import AgentProcess

_PROGRAM = """
import runpy, sys, time

def ahead(which):
    with open(path) as file:
        return int(file.read().split()[which]) * 10**9

path = sys.argv[1]
del sys.argv[:4]
time_ns, clock_gettime_ns = time.time_ns, time.clock_gettime_ns
time.time_ns = lambda: time_ns() + ahead(0)
time.time = lambda: time.time_ns() / 1e9
time.clock_gettime_ns = lambda clock: clock_gettime_ns(clock) + (ahead(1) if clock == time.CLOCK_BOOTTIME else 0)
runpy.run_module(sys.argv[0], None, "__main__", alter_sys=True)
"""


class SkewedClock:
    """The wall clock and CLOCK_BOOTTIME of one agent, which has to be made before it is started."""

    def __init__(self, host: AgentProcess) -> None:
        self._path = host.directory / "clock"
        self._set(0, 0)
        host.launched_by = [sys.executable, "-c", _PROGRAM, str(self._path)]

    def jump(self, wall_s: int) -> None:
        """Somebody sets the wall clock: so much ahead of the true time (negative: behind it)."""
        self._set(wall_s, 0)

    def sleep(self, seconds: int) -> None:
        """The host was suspended for so long: wall clock and CLOCK_BOOTTIME went on, CLOCK_MONOTONIC did not."""
        self._set(seconds, seconds)

    def _set(self, wall_s: int, boottime_s: int) -> None:
        written = self._path.with_suffix(".new")
        written.write_text(f"{wall_s} {boottime_s}")
        written.replace(self._path)
