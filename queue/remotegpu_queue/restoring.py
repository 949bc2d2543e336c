"""Attempts that the database has lost, or knows less of than their directories: written down again.

A database that was damaged, or whose log was, or that is a backup, is older than the directories; the memo in each
run's record says what it once knew. Plain functions on a sqlite3 connection, as `units.py`.
"""

from __future__ import annotations

import enum
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from remotegpu_queue import units
from remotegpu_queue.outbox import Body
from remotegpu_queue.queries import SQL
from remotegpu_queue.rows import Attempt, change, one
from remotegpu_queue.transitions import Outcome, next_run_state
from remotegpu_queue.units import NewAttempt
from remotegpu_schemas.attempt import AttemptId, Lease, Memo, RunEnded, RunNo, RunStarted
from remotegpu_schemas.states import EXIT_LOST, Cause, RunEvent, RunState, TaskState

_END_LOST: Final = Outcome(Cause.AGENT_LOST, EXIT_LOST, None, "its end was lost with the database")


def memo_of(attempt: Attempt, lease: Lease | None) -> dict[str, Any]:
    """What has to be remembered of an attempt whose run begins; `lease` is the present one."""
    memo = Memo(
        task=attempt.task,
        origin=attempt.origin,
        submitted_at_ms=attempt.submitted_at_ms,
        started_at_ms=attempt.started_at_ms or attempt.submitted_at_ms,
        retries_used=attempt.retries_used,
        free_retries_used=attempt.free_retries_used,
        lease=lease,
        renew_interval_s=attempt.renew_interval_s,
        submitter_uid=attempt.submitter_uid,
    )
    return memo.model_dump(mode="json", exclude_defaults=True)


@dataclass(frozen=True)
class LostRun:
    """What its directory says of a run. `outcome` is how it ended, None while it may live."""

    run_no: RunNo
    started: RunStarted | None
    ended: RunEnded | None
    outcome: Outcome | None
    start_report: Body | None = None
    is_suspended: bool = False


class WrittenBack(enum.Enum):
    """What became of an attempt."""

    NEW = enum.auto()
    """It was not known at all."""
    ADVANCED = enum.auto()
    """It was known, but not this run of it."""
    LEFT = enum.auto()
    """What the database says contradicts the directory: nothing was changed."""


def write_back(
    db: sqlite3.Connection, attempt_id: AttemptId, memo: Memo, runs: Sequence[LostRun], boot_id: str, now_ms: int
) -> WrittenBack:
    """Write down an attempt and its runs (by number, at least one); the last is left open, for `run_ended` or adoption.

    Safe to repeat.
    """
    row = one(db, "attempt_state", {"attempt_id": attempt_id})
    task_id = memo.task.task_id
    if row is None:
        if one(db, "has_later_attempt", {"task_id": task_id, "submitted_at_ms": memo.submitted_at_ms}) is not None:
            return WrittenBack.LEFT
        _insert(db, attempt_id, memo, boot_id)
    elif row["task_id"] != task_id or TaskState(row["state"]).is_final or row["run_no"] > runs[-1].run_no:
        return WrittenBack.LEFT
    if one(db, "has_other_live", {"task_id": task_id, "attempt_id": attempt_id}) is not None:
        return WrittenBack.LEFT
    for run in runs:
        _write_run(db, attempt_id, memo, run, now_ms, is_last=run is runs[-1])
    return WrittenBack.NEW if row is None else WrittenBack.ADVANCED


def _insert(db: sqlite3.Connection, attempt_id: AttemptId, memo: Memo, boot_id: str) -> None:
    lease = memo.lease
    if lease is not None and lease.boot_id != boot_id:
        lease = Lease(ttl_s=lease.ttl_s, deadline_boottime_ns=0, boot_id=boot_id)
    new = NewAttempt(
        memo.task, attempt_id, memo.origin, boot_id, lease, memo.renew_interval_s, submitter_uid=memo.submitter_uid
    )
    if memo.origin == "control_plane":
        units.add_claims(db, [new], memo.submitted_at_ms)
    else:
        db.execute(SQL["not_latest"], {"task_id": memo.task.id})
        units.insert(db, new, memo.submitted_at_ms)


def _write_run(
    db: sqlite3.Connection, attempt_id: AttemptId, memo: Memo, run: LostRun, now_ms: int, *, is_last: bool
) -> None:
    key = {"attempt_id": attempt_id, "run_no": run.run_no}
    if one(db, "run_state", key) is None:
        values = {"retries_used": memo.retries_used, "free_retries_used": memo.free_retries_used}
        values |= {"started_at_ms": memo.started_at_ms}
        before = TaskState(one(db, "attempt_state", key)["state"])
        change(db, "restore_attempt", {**key, **values, "state": before, "new_state": TaskState.RUNNING})
        _end_open_run(db, attempt_id, now_ms)
        db.execute(SQL["add_run"], {**key, "now_ms": memo.started_at_ms})
        if run.started is not None:
            started_ms = run.started.started_wall_ns // 1_000_000
            units.run_started(db, attempt_id, run.run_no, run.started.process, started_ms, run.start_report)
            if run.is_suspended and is_last:
                units.suspend_run(db, attempt_id, run.run_no)
    state = RunState(one(db, "run_state", key)["state"])
    if run.outcome is not None and not is_last and state is not RunState.ENDED:
        ended_at_ms = run.ended.ended_wall_ns // 1_000_000 if run.ended is not None else now_ms
        _end_run(db, attempt_id, run.run_no, state, run.outcome, ended_at_ms)


def _end_open_run(db: sqlite3.Connection, attempt_id: AttemptId, now_ms: int) -> None:
    """The run of which the database never saw the end, though a later one tells that there was one."""
    row = one(db, "open_run", {"attempt_id": attempt_id})
    if row is not None:
        _end_run(db, attempt_id, RunNo(row["run_no"]), RunState(row["state"]), _END_LOST, now_ms)


def _end_run(
    db: sqlite3.Connection, attempt_id: AttemptId, run_no: RunNo, state: RunState, outcome: Outcome, ended_at_ms: int
) -> None:
    """The end of a run that another one has followed: nothing else hangs on it any more."""
    change(
        db,
        "run_ended",
        {
            "attempt_id": attempt_id,
            "run_no": run_no,
            "state": state,
            "new_state": next_run_state(state, RunEvent.END),
            "cause": outcome.cause,
            "exit_code": outcome.exit_code,
            "signal": outcome.signal,
            "error": outcome.error,
            "ended_at_ms": ended_at_ms,
            "usage": None,
        },
    )
