"""A suspend of the host is noticed (F20)."""

from __future__ import annotations

import pytest

from remotegpu_agent import host_sleep as module
from remotegpu_agent.host_sleep import SleepWatch
from remotegpu_agent.supervise import Loops
from tests.agent.support import MovableClock, Told
from tests.waiting import until_so


class CountingClock(MovableClock):
    """Counts the looks at it."""

    looks = 0

    def boottime_ns(self) -> int:
        """Nanoseconds since boot."""
        self.looks += 1
        return super().boottime_ns()


async def test_f20_a_suspend_is_noticed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """F20: CLOCK_BOOTTIME has gone on and the loop's clock has not: told once for each time, and never without one."""
    monkeypatch.setattr(module, "_LOOK_EVERY_S", 0.005)
    clock, woken, loops = CountingClock(), Told(), Loops()
    loops.run_forever("sleep", SleepWatch(clock, lambda: woken(None)).run)

    async def look_around() -> None:
        seen = clock.looks
        await until_so(lambda: clock.looks >= seen + 10)

    await look_around()
    assert woken.calls == []
    clock.move(0.5)
    await look_around()
    assert woken.calls == []
    for slept_s in (250, 5):
        before = len(woken.calls)
        clock.move(slept_s)
        await woken.wait(before + 1)
        await look_around()
        assert len(woken.calls) == before + 1
    await loops.close()
    assert not loops.failures
