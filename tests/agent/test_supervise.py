"""Background loops: restarted when they fail, counted, and none outlives its owner."""

from __future__ import annotations

import asyncio

import pytest

from remotegpu_agent.supervise import Loops
from tests.waiting import DEADLINE_S


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before restarts; each is over at once."""
    taken: list[float] = []
    sleep = asyncio.sleep

    async def note(delay: float) -> None:
        taken.append(delay)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    return taken


async def test_a_failing_loop_is_started_again_with_a_growing_delay_and_counted(delays: list[float]) -> None:
    """Eight failures, then it runs; the others never notice."""
    loops, runs, works = Loops(), 0, asyncio.Event()

    async def fail_at_first() -> None:
        nonlocal runs
        runs += 1
        if runs <= 8:
            raise ValueError("not yet")
        works.set()
        await asyncio.Event().wait()

    loops.run_forever("fragile", fail_at_first)
    async with asyncio.timeout(DEADLINE_S):
        await works.wait()
    assert loops.failures == {"fragile": 8}
    assert delays == [0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 30.0, 30.0]
    await loops.close()


async def test_a_loop_that_returns_is_not_repeated() -> None:
    """Returning is no failure."""
    loops, runs = Loops(), 0

    async def once() -> None:
        nonlocal runs
        runs += 1

    loops.run_forever("short", once)
    await asyncio.sleep(0)
    await loops.close()
    assert (runs, loops.failures) == (1, {})


async def test_a_job_runs_once_and_its_failure_is_counted() -> None:
    """What a job raises goes to the log and the counter, never to whoever spawned it."""
    loops = Loops()

    async def fail() -> None:
        raise ValueError("no")

    await loops.spawn("job", fail)
    await loops.spawn("job", fail)
    assert loops.failures == {"job": 2}


async def test_close_cancels_and_waits() -> None:
    """A loop and a job in the middle of something have run their `finally` when `close` returns. Safe to repeat."""
    loops, undone = Loops(), []

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            undone.append(name)

    loops.run_forever("loop", lambda: work("loop"))
    loops.spawn("job", lambda: work("job"))
    await asyncio.sleep(0)
    await loops.close()
    assert sorted(undone) == ["job", "loop"]
    assert loops.failures == {}
    await loops.close()


async def test_close_waits_for_what_a_cancelled_job_begins() -> None:
    """A job that spawns another one while it is cancelled leaves no task behind."""
    loops, undone = Loops(), []

    async def last() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            undone.append("last")

    async def first() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            loops.spawn("last", last)
            await asyncio.sleep(0)

    loops.spawn("first", first)
    await asyncio.sleep(0)
    await loops.close()
    assert len(asyncio.all_tasks()) == 1
    assert undone == ["last"]
