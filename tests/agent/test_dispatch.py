"""What starts when, and what a waiting task is told."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent import bookkeeping
from remotegpu_queue import outbox, views
from remotegpu_queue.store import StoreUnavailable
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.states import Cause, TaskState
from remotegpu_sidecar.launcher import Run
from tests.agent.support import Host, add_attempt, add_report, host
from tests.waiting import until, until_so

SLEEP: dict[str, Any] = {"command": "sleep 60"}


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncGenerator[Host]:
    """Two slots, four CPUs, 4 GiB; decisions are made by hand."""
    async with host(tmp_path) as made:
        yield made


async def test_urgent_and_old_first_until_the_slots_are_full(parts: Host) -> None:
    """Of three tasks the most urgent and the oldest start; the third is told why not."""
    third = await parts.add("third", **SLEEP)
    last = await parts.add("last", **SLEEP)
    first = await parts.add("first", priority=1, **SLEEP)
    await parts.dispatcher.decide()
    assert set(parts.executor.active) == {first.attempt_id, third.attempt_id}
    assert parts.dispatcher.free().slots == 0
    assert parts.dispatcher.reason(last) == "all 2 slots are taken (capacity.max_concurrent)"
    assert await parts.dispatcher.decide() is None


async def test_a_task_that_does_not_fit_holds_those_behind_it(parts: Host) -> None:
    """Small tasks do not starve a big one; each knows what it waits for."""
    running = await parts.add("running", resources={"cpus": 3}, **SLEEP)
    big = await parts.add("big", resources={"cpus": 2}, **SLEEP)
    small = await parts.add("small", **SLEEP)
    await parts.dispatcher.decide()
    assert set(parts.executor.active) == {running.attempt_id}
    assert parts.dispatcher.reason(big) == "needs 2 CPUs; 1 are free"
    assert parts.dispatcher.reason(small) == "waits behind task big, which is more urgent or older"
    assert parts.dispatcher.has_blocked


async def test_what_never_fits_says_so_and_blocks_nobody(parts: Host) -> None:
    """However many of them are in front, the last one starts: they do not count among those that are looked at."""
    huge = [await parts.add(f"huge-{number}", priority=1, resources={"memory_gb": 64}) for number in range(60)]
    gpu = await parts.add("gpu", priority=1, resources={"gpus": 1})
    fits = await parts.add("fits", priority=10, **SLEEP)
    await parts.dispatcher.decide()
    assert set(parts.executor.active) == {fits.attempt_id}
    assert not parts.dispatcher.has_blocked
    assert parts.dispatcher.reason(huge[-1]) == "needs 65536 MiB of memory; this host gives 4096 MiB"
    assert parts.dispatcher.reason(gpu) == "needs 1 GPUs; this agent manages 0"


async def test_a_retry_waits_for_its_delay_and_blocks_nobody(parts: Host) -> None:
    """The delay is on the boot clock; a decision tells when it ends, and after it the task starts again."""
    failing = await parts.add("failing", command="exit 1", retry={"max": 1, "delay_s": 100.0})
    failing = await parts.run_to_end(failing)
    assert failing.state is TaskState.PENDING
    ready_ns = await parts.dispatcher.decide()
    assert ready_ns == failing.ready_boottime_ns
    assert not parts.executor.active
    assert parts.dispatcher.reason(failing) in {
        "waits 100 s before its next try",
        "waits 99 s before its next try",
    }
    assert not parts.dispatcher.has_blocked
    parts.clock.move(101)
    await parts.dispatcher.decide()
    assert set(parts.executor.active) == {failing.attempt_id}
    await parts.has_ended(failing.attempt_id)
    assert (await parts.attempt(failing.attempt_id)).state is TaskState.FAILED


async def test_the_loop_wakes_by_itself_when_a_delay_is_over(parts: Host) -> None:
    """Nobody says `changed` after the failure's end: the second try comes all the same."""
    attempt = await parts.add("failing", command="exit 1", retry={"max": 2, "delay_s": 0.1})
    parts.loops.run_forever("dispatch", parts.dispatcher.run)

    async def look() -> bool:
        return (await parts.attempt(attempt.attempt_id)).state is TaskState.FAILED

    await until(look)
    assert (await parts.attempt(attempt.attempt_id)).run_no == 3
    assert "decided" in parts.reported.calls


async def test_an_attempt_waits_while_an_older_one_of_its_task_has_a_process(parts: Host) -> None:
    """Never two process trees of one task; the one that waits blocks nobody, and starts when the other is gone."""
    old = await parts.add("t", ttl_s=300.0, **SLEEP)
    await parts.dispatcher.decide()
    await _started(parts, old.attempt_id)
    new = await add_attempt(parts.store, parts.clock, "t", attempt_id="newer", ttl_s=300.0)
    other = await parts.add("other", priority=10, **SLEEP)
    await parts.dispatcher.decide()
    assert set(parts.executor.active) == {old.attempt_id, other.attempt_id}
    assert not parts.dispatcher.has_blocked
    assert await parts.executor.stop(old.attempt_id, Cause.SUPERSEDED)
    await parts.has_ended(old.attempt_id)
    await parts.dispatcher.decide()
    assert new in parts.executor.active
    await parts.has_ended(new)
    assert (await parts.attempt(new)).state is TaskState.COMPLETED
    assert (await parts.attempt(old.attempt_id)).cause is Cause.SUPERSEDED


async def _started(parts: Host, attempt_id: AttemptId) -> None:
    async def look() -> bool:
        runs = await parts.store.read(views.open_runs)
        return any(run.attempt_id == attempt_id and run.process is not None for run in runs)

    await until(look)


async def test_f24_a_full_disk_does_not_spin(parts: Host) -> None:
    """F24: a start that cannot be written down is tried again after a pause; then the task runs."""
    attempt = await parts.add("t")
    parts.loops.run_forever("dispatch", parts.dispatcher.run)
    await parts.opened.refuse_writes()
    parts.dispatcher.changed()
    await parts.ended.wait(1)
    assert not parts.loops.failures
    await parts.opened.take_writes()

    async def look() -> bool:
        return (await parts.attempt(attempt.attempt_id)).state is TaskState.COMPLETED

    await until(look)
    assert len(parts.ended.calls) <= 4


async def test_f24_a_process_is_stopped_although_the_reason_cannot_be_stored(parts: Host) -> None:
    """F24, F14: on a full disk a superseded process ends as well; the cause is stored with its end, later."""
    attempt = await parts.add("t", ttl_s=300.0, **SLEEP)
    await parts.dispatcher.decide()
    await _started(parts, attempt.attempt_id)
    active = parts.executor.active[attempt.attempt_id]
    assert active.run is not None
    await parts.opened.refuse_writes()
    assert await parts.executor.stop(attempt.attempt_id, Cause.SUPERSEDED)
    await active.run.wait()
    await parts.opened.take_writes()
    await parts.has_ended(attempt.attempt_id)
    assert (await parts.attempt(attempt.attempt_id)).cause is Cause.SUPERSEDED


async def test_f24_a_run_that_is_being_started_is_stopped_although_the_reason_cannot_be_stored(
    parts: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F24, F14: a superseded run whose shim has not been told to go yet does not go on for the rest of its lease."""
    attempt = await parts.add("t", ttl_s=300.0, **SLEEP)
    launch, launching, may_go = parts.launcher.launch, asyncio.Event(), asyncio.Event()

    async def slowly(*args: Any) -> Run:
        launching.set()
        await may_go.wait()
        return await launch(*args)

    monkeypatch.setattr(parts.launcher, "launch", slowly)
    await parts.dispatcher.decide()
    await launching.wait()
    await parts.opened.refuse_writes()
    assert await parts.executor.stop(attempt.attempt_id, Cause.SUPERSEDED)
    may_go.set()
    active = parts.executor.active[attempt.attempt_id]
    await until_so(lambda: active.run is not None)
    assert active.run is not None
    await active.run.wait()
    await parts.opened.take_writes()
    await parts.has_ended(attempt.attempt_id)
    assert (await parts.attempt(attempt.attempt_id)).cause is Cause.SUPERSEDED


async def test_a_stop_that_the_store_takes_late_is_reported(parts: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it any more, and the reporter, which looks only when it is told, is told all the same."""
    monkeypatch.setattr(bookkeeping, "_STOP_PATIENCE_S", 0.05)
    attempt = await parts.add("t", ttl_s=300.0)
    with contextlib.closing(sqlite3.connect(parts.directory / "queue.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable):
            await parts.executor.stop(attempt.attempt_id, Cause.CANCELLED)
        assert not parts.reported.calls
        other.execute("ROLLBACK")
    await parts.reported.wait()
    assert (await parts.attempt(attempt.attempt_id)).cause is Cause.CANCELLED


async def test_a_cancel_between_two_runs_is_not_lost(parts: Host) -> None:
    """It comes when the run's end is stored and its owner not gone yet: the retry is cancelled, not kept."""
    attempt = await parts.add("t", command="exit 1", retry={"max": 5, "delay_s": 100.0})
    parts.executor.start(attempt.attempt_id, attempt.task_id, attempt.task.resources)
    active = parts.executor.active[attempt.attempt_id]
    await parts.has_ended(attempt.attempt_id)
    parts.executor.active[attempt.attempt_id] = active
    try:
        assert await parts.executor.stop(attempt.attempt_id, Cause.CANCELLED)
    finally:
        del parts.executor.active[attempt.attempt_id]
    ended = await parts.attempt(attempt.attempt_id)
    assert (ended.state, ended.cause) == (TaskState.CANCELLED, Cause.CANCELLED)
    assert not await parts.executor.stop(attempt.attempt_id, Cause.CANCELLED)


async def test_f24_nothing_starts_while_the_host_has_no_room(parts: Host) -> None:
    """F24: what waits stays where it is, with the reason; it starts when there is room again."""
    waiting = await parts.add("waiting", **SLEEP)
    parts.held[True] = parts.held[False] = "3 MiB of disk are free"
    await parts.dispatcher.decide()
    assert parts.executor.active == {}
    assert parts.dispatcher.reason(waiting) == "3 MiB of disk are free"
    parts.held.clear()
    await parts.dispatcher.decide()
    assert set(parts.executor.active) == {waiting.attempt_id}


async def test_what_was_claimed_starts_though_local_tasks_are_held(parts: Host) -> None:
    """A drain: a claimed task has a lease that is meant for running; a local one waits."""
    await parts.add("local", **SLEEP)
    claimed = await parts.add("claimed", origin="control_plane", ttl_s=300.0, **SLEEP)
    parts.held[True] = "draining"
    await parts.dispatcher.decide()
    assert set(parts.executor.active) == {claimed.attempt_id}
    assert not parts.dispatcher.has_blocked


async def test_f16_a_full_outbox_is_no_longer_called_full_though_every_slot_is_taken(
    parts: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F16: once reports get through the host is not held for full for as long as what fills its slots runs."""
    monkeypatch.setattr(outbox.is_full, "__defaults__", (2,))
    await parts.add("one", **SLEEP)
    await parts.add("other", **SLEEP)
    for attempt_id in ("a1", "a2"):
        await add_report(parts.store, attempt_id, "complete")
    await parts.dispatcher.decide()
    assert (parts.dispatcher.free().slots, parts.dispatcher.is_outbox_full) == (0, True)
    await parts.dispatcher.decide()
    assert parts.dispatcher.is_outbox_full
    await parts.store.write(lambda db: outbox.drop_reports(db, AttemptId("a1")))
    await parts.dispatcher.decide()
    assert (parts.dispatcher.free().slots, parts.dispatcher.is_outbox_full) == (0, False)
