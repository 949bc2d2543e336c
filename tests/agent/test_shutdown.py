"""A run that the host takes down with it is told from one that somebody stopped (F21)."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from remotegpu_agent.recovery import recover
from remotegpu_queue import units, views
from remotegpu_schemas.attempt import (
    AttemptId,
    EndedBy,
    ProcessIdentity,
    RunEnded,
    RunNo,
    RunRecord,
    RunSpec,
    RunStarted,
)
from remotegpu_schemas.states import Cause
from remotegpu_sidecar.adoption import Adopted, AdoptedState
from tests.agent.support import BOOT, Host, add_attempt, host
from tests.waiting import until_so


async def cause_of(parts: Host, attempt_id: AttemptId) -> Cause | None:
    """Why the first run of an attempt has ended."""
    run = await parts.store.read(lambda db: views.run(db, attempt_id, RunNo(1)))
    assert run is not None
    return run.cause


@pytest.mark.parametrize(("is_stopping", "cause"), [(True, Cause.HOST_SHUTDOWN), (False, Cause.STOPPED)])
async def test_f21_stop_that_the_agent_did_not_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stopping: bool, cause: Cause
) -> None:
    """F21: while the host is going down it is a shutdown, else somebody has stopped it."""

    async def answer() -> bool:
        return is_stopping

    async with host(tmp_path) as parts:
        monkeypatch.setattr(parts.launcher, "is_host_stopping", answer)
        attempt = await parts.attempt(await add_attempt(parts.store, parts.clock, "task", command="sleep 1000"))
        parts.executor.start(attempt.attempt_id, attempt.task_id, attempt.task.resources)
        active = parts.executor.active[attempt.attempt_id]
        await until_so(lambda: active.run is not None)
        assert active.run is not None
        os.kill(active.run.shim.pid, signal.SIGTERM)
        await parts.has_ended(attempt.attempt_id)
        assert await cause_of(parts, attempt.attempt_id) is cause


@pytest.mark.parametrize(("boot_id", "cause"), [("another", Cause.HOST_SHUTDOWN), (BOOT, Cause.STOPPED)])
async def test_f21_stop_that_no_agent_saw(tmp_path: Path, boot_id: str, cause: Cause) -> None:
    """F21: found after a reboot, it was the shutdown's; found in the same boot, somebody's."""
    async with host(tmp_path) as parts:
        attempt = await parts.attempt(await add_attempt(parts.store, parts.clock, "task", command="sleep 1000"))
        _attempt, run_no = await parts.store.write(
            lambda db: units.begin_run(db, attempt.attempt_id, parts.clock.wall_ms())
        )
        who = ProcessIdentity(boot_id=boot_id, pid=4_000_000, start_ticks=1)
        spec = RunSpec(
            task_id=attempt.task_id, attempt_id=attempt.attempt_id, run_no=run_no, argv=("sleep",), env={}, cwd="/"
        )
        record = RunRecord(
            spec=spec,
            started=RunStarted(process=who, shim=who, started_wall_ns=1, started_boottime_ns=1),
            ended=RunEnded(ended_by=EndedBy.STOP, signal=15, ended_wall_ns=2_000_000),
        )
        found = Adopted(tmp_path, AdoptedState.ENDED, attempt.attempt_id, run_no, record)
        await recover(parts.store, parts.executor, [found])
        await parts.has_ended(attempt.attempt_id)
        assert await cause_of(parts, attempt.attempt_id) is cause
