"""After a restart: every state of an attempt directory against what the database says of the run."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent.recovery import Recovered, recover
from remotegpu_queue import outbox, units, views
from remotegpu_queue.rows import Attempt
from remotegpu_schemas.attempt import EndedBy, ProcessIdentity, RunEnded, RunNo, RunRecord, RunSpec, RunStarted
from remotegpu_schemas.states import Cause, TaskState
from remotegpu_sidecar.adoption import directory_name
from remotegpu_sidecar.launcher import Adopted, AdoptedState
from tests.agent.support import BOOT, Host, host
from tests.sidecar.support import make_spec
from tests.waiting import until

ONE = RunNo(1)


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncGenerator[Host]:
    """The parts of the new agent."""
    async with host(tmp_path) as made:
        yield made


async def begun(parts: Host, *, stop: Cause | None = None, **more: Any) -> Attempt:
    """An attempt whose run an earlier agent had written down."""
    attempt = await parts.add("t", **more)
    attempt_id = attempt.attempt_id

    def unit(db: sqlite3.Connection) -> None:
        units.begin_run(db, attempt_id, 1000)
        if stop is not None:
            units.request_stop(db, attempt_id, ONE, stop)

    await parts.store.write(unit)
    return attempt


def found(parts: Host, attempt: Attempt, state: AdoptedState, **ended: Any) -> Adopted:
    """What the sidecar says of the run's directory."""
    record = None
    if state is not AdoptedState.UNREADABLE:
        spec = make_spec("true").model_copy(update={"attempt_id": attempt.attempt_id, "run_no": ONE})
        process = ProcessIdentity(boot_id=BOOT, pid=2**22 - 1, start_ticks=1)
        started = RunStarted(process=process, shim=process, started_wall_ns=10**9, started_boottime_ns=10**9)
        end = RunEnded(ended_wall_ns=2 * 10**9, **ended) if ended else None
        has_started = state is not AdoptedState.NEVER_STARTED
        record = RunRecord(spec=spec, started=started if has_started else None, ended=end)
    directory = parts.directory / "attempts" / directory_name(attempt.attempt_id, ONE)
    return Adopted(directory, state, attempt.attempt_id, ONE, record)


async def by_an_earlier_agent(parts: Host, spec: RunSpec, deadline_ns: int | None = None) -> None:
    """A run that executes and that nobody holds."""
    run = await parts.launcher.launch(spec, deadline_ns)
    assert await run.wait_started() is not None
    run.close()


async def test_what_ended_meanwhile_is_stored_with_its_own_end(parts: Host) -> None:
    """F05: exit code, times and identity come from the record."""
    attempt = await begun(parts)
    there = found(parts, attempt, AdoptedState.ENDED, ended_by=EndedBy.EXIT, exit_code=7)
    assert await recover(parts.store, parts.executor, [there]) == Recovered(0, 1)
    await parts.has_settled()
    after = await parts.attempt(attempt.attempt_id)
    assert (after.state, after.cause, after.exit_code) == (TaskState.FAILED, Cause.EXIT_CODE, 7)
    [run] = (await parts.store.read(lambda db: views.find_task(db, "t")))[1]
    assert run.process is not None
    assert (run.started_at_ms, run.ended_at_ms) == (1000, 2000)


async def test_a_claimed_run_that_ended_meanwhile_is_reported_from_its_start(parts: Host) -> None:
    """F05: the start report that was never sent comes before the completion."""
    attempt = await begun(parts, ttl_s=300.0)
    there = found(parts, attempt, AdoptedState.ENDED, ended_by=EndedBy.EXIT, exit_code=0)
    await recover(parts.store, parts.executor, [there])
    await parts.has_settled()
    kinds = await parts.store.read(lambda db: [row["kind"] for row in db.execute("SELECT * FROM outbox ORDER BY id")])
    assert kinds == ["start", "complete"]


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        (AdoptedState.NEVER_STARTED, Cause.AGENT_LOST),
        (AdoptedState.LOST, Cause.AGENT_LOST),
        (AdoptedState.UNREADABLE, Cause.AGENT_LOST),
        (AdoptedState.OTHER_BOOT, Cause.HOST_REBOOTED),
    ],
)
@pytest.mark.parametrize("stop", [None, Cause.CANCELLED])
async def test_a_run_without_an_end_on_record(
    parts: Host, state: AdoptedState, cause: Cause, stop: Cause | None
) -> None:
    """Each has its own cause; a stop that was asked for before counts, and then nothing follows."""
    attempt = await begun(parts, stop=stop)
    there = found(parts, attempt, state)
    assert (await recover(parts.store, parts.executor, [there])).finished == 1
    await parts.has_settled()
    [run] = await _ended_runs(parts)
    assert run.cause is (stop or cause)
    after = await parts.attempt(attempt.attempt_id)
    if stop is not None:
        assert (after.state, after.cause) == (TaskState.CANCELLED, Cause.CANCELLED)
    elif cause is Cause.AGENT_LOST:
        assert (after.state, after.free_retries_used, after.retries_used) == (TaskState.PENDING, 1, 0)
    else:
        assert (after.state, after.cause) == (TaskState.FAILED, Cause.HOST_REBOOTED)


async def _ended_runs(parts: Host) -> list[Any]:
    async def look() -> list[Any]:
        runs = (await parts.store.read(lambda db: views.find_task(db, "t")))[1]
        return [run for run in runs if run.cause is not None]

    return await until(look)


@pytest.mark.parametrize("stop", [None, Cause.CANCELLED])
async def test_f02_a_run_row_without_a_directory_never_started(parts: Host, stop: Cause | None) -> None:
    """F02: the agent was killed between writing the run down and launching it: free, and repeated, unless cancelled."""
    attempt = await begun(parts, stop=stop)
    assert await recover(parts.store, parts.executor, []) == Recovered(0, 1)
    await parts.has_settled()
    after = await parts.attempt(attempt.attempt_id)
    assert after.state is (TaskState.CANCELLED if stop else TaskState.PENDING)
    assert await recover(parts.store, parts.executor, []) == Recovered(0, 0)


async def test_f02_f09_a_run_that_was_lost_with_its_lease_goes_back(parts: Host) -> None:
    """F02, F09: a lost run costs its task nothing; where the lease is over as well, the plane hears `lease_lost`.

    `agent_lost` would be the task's end there, although it has never run.
    """
    attempt = await begun(parts, ttl_s=5.0)
    parts.clock.move(6.0)
    [run] = await parts.store.read(views.open_runs)
    parts.executor.adopt(attempt, run, found(parts, attempt, AdoptedState.NEVER_STARTED))
    await parts.has_settled()
    [ended] = await _ended_runs(parts)
    assert ended.cause is Cause.AGENT_LOST
    parts.executor.hold_lease(await parts.attempt(attempt.attempt_id))

    async def is_final() -> bool:
        return (await parts.attempt(attempt.attempt_id)).state.is_final

    await until(is_final)
    after = await parts.attempt(attempt.attempt_id)
    assert (after.state, after.cause) == (TaskState.FAILED, Cause.LEASE_LOST)
    [report] = (await parts.store.read(lambda db: outbox.due_reports(db, 0, 10)))[0]
    assert (report.kind, report.body["cause"]) == ("complete", Cause.LEASE_LOST)


async def test_f03_a_live_run_is_adopted_with_its_lease(parts: Host) -> None:
    """F03, F04: its identity is stored although the earlier agent had not; the shim's later deadline counts."""
    attempt = await begun(parts, ttl_s=300.0, command="sleep 60")
    spec = make_spec("sleep", "60").model_copy(update={"attempt_id": attempt.attempt_id})
    assert attempt.lease is not None
    later_ns = attempt.lease.deadline_boottime_ns + 50 * 10**9
    await by_an_earlier_agent(parts, spec, later_ns)
    adopted = await parts.launcher.adopt()
    assert [each.state for each in adopted] == [AdoptedState.RUNNING]
    assert await recover(parts.store, parts.executor, adopted) == Recovered(1, 0)
    active = parts.executor.active[attempt.attempt_id]
    lease = parts.leases.current(attempt.attempt_id)
    assert lease is not None
    assert lease.deadline_boottime_ns == later_ns
    assert await parts.executor.stop(attempt.attempt_id, Cause.CANCELLED)
    await parts.has_ended(attempt.attempt_id)
    assert active.outcome is not None
    assert active.outcome.cause is Cause.CANCELLED
    [run] = await _ended_runs(parts)
    assert run.process is not None


async def test_a_live_run_that_was_to_be_stopped_is_stopped_again(parts: Host) -> None:
    """The reason was on disk before the signal; whether the signal was sent nobody knows."""
    attempt = await begun(parts, stop=Cause.CANCELLED)
    spec = make_spec("sleep", "60").model_copy(update={"attempt_id": attempt.attempt_id})
    await by_an_earlier_agent(parts, spec)
    await recover(parts.store, parts.executor, await parts.launcher.adopt())
    await parts.has_ended(attempt.attempt_id)
    after = await parts.attempt(attempt.attempt_id)
    assert (after.state, after.cause) == (TaskState.CANCELLED, Cause.CANCELLED)


async def test_a_live_run_that_the_database_does_not_know_is_left_alone(parts: Host) -> None:
    """Nobody but an operator may end what nobody knows; its shim keeps timeout and lease."""
    spec = make_spec("sleep", "60", attempt="stranger")
    run = await parts.launcher.launch(spec)
    assert await run.wait_started() is not None
    adopted = await parts.launcher.adopt()
    assert await recover(parts.store, parts.executor, adopted) == Recovered(0, 0)
    assert run.started is not None
    assert run.contains(run.started.process.pid)
    run.kill()
    await run.wait()
    run.close()


async def test_the_end_of_a_run_that_is_stored_already_changes_nothing(parts: Host) -> None:
    """Directories of ended runs stay for their output."""
    attempt = await begun(parts)
    there = found(parts, attempt, AdoptedState.ENDED, ended_by=EndedBy.EXIT, exit_code=7)
    await recover(parts.store, parts.executor, [there])
    await parts.has_settled()
    before = await parts.attempt(attempt.attempt_id)
    assert await recover(parts.store, parts.executor, [there]) == Recovered(0, 0)
    assert await parts.attempt(attempt.attempt_id) == before


async def test_every_open_lease_is_held(parts: Host) -> None:
    """Of what waits too: it must not be started after its lease."""
    waiting = await parts.add("waiting", ttl_s=300.0)
    local = await parts.add("local")
    await recover(parts.store, parts.executor, [])
    assert parts.leases.current(waiting.attempt_id) == waiting.lease
    assert parts.leases.current(local.attempt_id) is None
