"""What is written, as plain functions on a sqlite3 connection; `Store.write` makes each one durable.

Every change of a state names the state it expects and applies the pure table; zero changed rows is a lost race and
raises LostRace, so that the savepoint takes back the rest of the unit. Times ending in `_ms` are wall clock, those
ending in `_ns` are CLOCK_BOOTTIME.

Long, because every unit is a few lines and their order is that of an attempt.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from remotegpu_queue import outbox
from remotegpu_queue.outbox import Body, ReportKind, add_report, replace_progress
from remotegpu_queue.queries import SQL
from remotegpu_queue.rows import Attempt, Origin, attempt_of, change, one
from remotegpu_queue.store import LostRace
from remotegpu_queue.transitions import AfterRun, Outcome, final_event, next_run_state, next_task_state
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId, Lease, ProcessIdentity, RunNo
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.states import (
    CAUSE_RULES,
    EXIT_LOST,
    Cause,
    Retry,
    RunEvent,
    RunState,
    TaskEvent,
    TaskState,
    wire_exit_code,
)
from remotegpu_schemas.task import Task, TaskId

_LIVE: Final = frozenset({TaskState.RUNNING, TaskState.SUSPENDED})
_SUPERSEDED: Final = Outcome(Cause.SUPERSEDED, EXIT_LOST, None, "another attempt has this task now")

# --- new attempts ---


@dataclass(frozen=True)
class NewAttempt:
    """An attempt to be stored: a local submission (no lease) or a claim."""

    task: Task
    attempt_id: AttemptId
    origin: Origin
    boot_id: str
    lease: Lease | None = None
    renew_interval_s: float | None = None
    retries_used: int = 0
    submitter_uid: int | None = None


def insert(db: sqlite3.Connection, new: NewAttempt, now_ms: int) -> None:
    """Store an attempt as it comes, whatever else there is of its task; `submit` and `add_claims` look at that."""
    lease, resources = new.lease, new.task.resources
    seq = db.execute(
        SQL["add_attempt"],
        {
            "attempt_id": new.attempt_id,
            "task_id": new.task.id,
            "origin": new.origin,
            "state": TaskState.PENDING if new.origin == "local" else TaskState.ASSIGNED,
            "priority": new.task.priority,
            "gpus": resources.gpus,
            "cpus": resources.cpus,
            "memory_gb": resources.memory_gb,
            "task": new.task.model_dump_json(),
            "retries_used": new.retries_used,
            "lease_ttl_ns": round(lease.ttl_s * 1e9) if lease else None,
            "lease_deadline_ns": lease.deadline_boottime_ns if lease else None,
            "renew_interval_ns": round(new.renew_interval_s * 1e9) if new.renew_interval_s else None,
            "boot_id": new.boot_id,
            "submitter_uid": new.submitter_uid,
            "now_ms": now_ms,
        },
    ).lastrowid
    for key, value in new.task.labels.items():
        db.execute(SQL["add_label"], {"key": key, "value": value, "seq": seq})


def submit(db: sqlite3.Connection, attempts: Sequence[NewAttempt], now_ms: int) -> None:
    """Store local tasks. Raises Refused: QUEUE_FULL, ALREADY_EXISTS (the id was used before)."""
    room = limits.QUEUE_MAX_TASKS - len(attempts)
    if one(db, "span_of_attempts")[0] > room and one(db, "count_open")[0] > room:
        raise Refused(Code.QUEUE_FULL, f"the queue holds its bound of {limits.QUEUE_MAX_TASKS} tasks")
    for new in attempts:
        if one(db, "task_is_taken", {"task_id": new.task.id}) is not None:
            raise Refused(Code.ALREADY_EXISTS, f"a task with the id {new.task.id!r} exists already; choose another id")
        insert(db, new, now_ms)


@dataclass(frozen=True)
class ClaimResult:
    """What became of one claimed attempt; `superseded` are older attempts of the task whose processes must go."""

    attempt_id: AttemptId
    is_new: bool
    superseded: tuple[AttemptId, ...] = ()
    is_conflict: bool = False
    """Its id is that of an attempt of another task: it was not stored."""


def add_claims(db: sqlite3.Connection, claims: Sequence[NewAttempt], now_ms: int) -> list[ClaimResult]:
    """Store claimed attempts; one that is known already is left alone (claim answers may repeat).

    An older attempt of the same task is superseded: ended here if it waits, named in the result if it has a process.
    """
    return [_add_claim(db, claim, now_ms) for claim in claims]


def _add_claim(db: sqlite3.Connection, claim: NewAttempt, now_ms: int) -> ClaimResult:
    known = one(db, "attempt_state", {"attempt_id": claim.attempt_id})
    if known is not None:
        return ClaimResult(claim.attempt_id, is_new=False, is_conflict=known["task_id"] != claim.task.id)
    superseded = []
    for row in db.execute(SQL["open_attempts_of_task"], {"task_id": claim.task.id}).fetchall():
        old = AttemptId(row["attempt_id"])
        if row["state"] in _LIVE:
            # In the same commit: a plane may never say again that the older one is over.
            request_stop(db, old, RunNo(row["run_no"]), Cause.SUPERSEDED)
            superseded.append(old)
        else:
            end_waiting(db, old, Cause.SUPERSEDED, _SUPERSEDED.error, _SUPERSEDED.exit_code, now_ms, None)
    db.execute(SQL["not_latest"], {"task_id": claim.task.id})
    insert(db, claim, now_ms)
    return ClaimResult(claim.attempt_id, is_new=True, superseded=tuple(superseded))


# --- runs ---


def begin_run(db: sqlite3.Connection, attempt_id: AttemptId, now_ms: int) -> tuple[Attempt, RunNo]:
    """Write down that the next run of a waiting attempt is about to start. Raises LostRace if it no longer waits."""
    row = one(db, "attempt_state", {"attempt_id": attempt_id})
    if row is None or not TaskState(row["state"]).is_waiting:
        raise LostRace(f"attempt {attempt_id} no longer waits")
    state, run_no = TaskState(row["state"]), RunNo(row["run_no"] + 1)
    try:
        change(
            db,
            "start_attempt",
            {
                "attempt_id": attempt_id,
                "state": state,
                "new_state": next_task_state(state, TaskEvent.START),
                "run_no": run_no,
                "now_ms": now_ms,
            },
        )
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorname != "SQLITE_CONSTRAINT_UNIQUE":
            raise
        raise LostRace(f"another attempt of task {row['task_id']} still has a process") from None
    db.execute(SQL["add_run"], {"attempt_id": attempt_id, "run_no": run_no, "now_ms": now_ms})
    return attempt_of(one(db, "attempt", {"attempt_id": attempt_id})), run_no


def run_started(
    db: sqlite3.Connection,
    attempt_id: AttemptId,
    run_no: RunNo,
    process: ProcessIdentity,
    started_at_ms: int,
    report: Body | None,
) -> None:
    """Store the process identity of a run, and the start report. Nothing changes when it is known or the run has ended.

    Raises LostRace when there is no such run.
    """
    row = one(db, "run_state", {"attempt_id": attempt_id, "run_no": run_no})
    if row is None:
        raise LostRace(f"there is no run {run_no} of attempt {attempt_id}")
    if row["state"] == RunState.ENDED or row["pid"] is not None:
        return
    state = RunState(row["state"])
    change(
        db,
        "run_started",
        {
            "attempt_id": attempt_id,
            "run_no": run_no,
            "state": state,
            "new_state": next_run_state(state, RunEvent.STARTED),
            "boot_id": process.boot_id,
            "pid": process.pid,
            "start_ticks": process.start_ticks,
            "started_at_ms": started_at_ms,
        },
    )
    if report is not None:
        add_report(db, attempt_id, "start", report, started_at_ms, process.boot_id)


def stop_cause(db: sqlite3.Connection, attempt_id: AttemptId, run_no: RunNo) -> Cause | None:
    """What a run was asked to be stopped for, if it was."""
    row = one(db, "run_state", {"attempt_id": attempt_id, "run_no": run_no})
    return Cause(row["stop_cause"]) if row is not None and row["stop_cause"] is not None else None


def request_stop(db: sqlite3.Connection, attempt_id: AttemptId, run_no: RunNo, cause: Cause) -> Cause:
    """Write down why a run is to be stopped, and return the cause that counts: the first one, or superseded.

    Raises LostRace when the run has ended.
    """
    row = one(db, "run_state", {"attempt_id": attempt_id, "run_no": run_no})
    if row is None or row["state"] == RunState.ENDED:
        raise LostRace(f"run {run_no} of attempt {attempt_id} has ended")
    if row["stop_cause"] is not None and (cause is not Cause.SUPERSEDED or row["stop_cause"] == Cause.SUPERSEDED):
        return Cause(row["stop_cause"])
    state = RunState(row["state"])
    change(
        db,
        "run_stopping",
        {
            "attempt_id": attempt_id,
            "run_no": run_no,
            "state": state,
            "new_state": next_run_state(state, RunEvent.STOP),
            "stop_cause": cause,
        },
    )
    return cause


def suspend_run(db: sqlite3.Connection, attempt_id: AttemptId, run_no: RunNo) -> None:
    """Write down that a running task is to stand still. Raises LostRace, IllegalTransition (it does not run)."""
    _suspend_or_resume(db, attempt_id, run_no, TaskEvent.SUSPEND, RunEvent.SUSPEND)


def resume_run(db: sqlite3.Connection, attempt_id: AttemptId, run_no: RunNo) -> None:
    """Write down that a suspended task is to go on. Raises LostRace, IllegalTransition (it is not suspended)."""
    _suspend_or_resume(db, attempt_id, run_no, TaskEvent.RESUME, RunEvent.RESUME)


def _suspend_or_resume(
    db: sqlite3.Connection, attempt_id: AttemptId, run_no: RunNo, task_event: TaskEvent, run_event: RunEvent
) -> None:
    attempt = one(db, "attempt_state", {"attempt_id": attempt_id})
    run = one(db, "run_state", {"attempt_id": attempt_id, "run_no": run_no})
    if attempt is None or run is None:
        raise LostRace(f"there is no run {run_no} of attempt {attempt_id}")
    key = {"attempt_id": attempt_id, "run_no": run_no}
    state, task_state = RunState(run["state"]), TaskState(attempt["state"])
    # The run first: its state says more about why not.
    change(db, "run_suspension", {**key, "state": state, "new_state": next_run_state(state, run_event)})
    new_state = next_task_state(task_state, task_event)
    change(db, "attempt_suspension", {**key, "state": task_state, "new_state": new_state})


def run_ended(
    db: sqlite3.Connection,
    attempt_id: AttemptId,
    run_no: RunNo,
    outcome: Outcome,
    after: AfterRun,
    *,
    ended_at_ms: int,
    ready_boottime_ns: int,
    boot_id: str,
    usage: Mapping[str, float] | None,
    report: Body | None,
    drop_reports: bool = False,
) -> TaskState:
    """Store a run's end, the task's next state, and the completion report, all or nothing; return that state.

    `report` is None for local tasks and where the task goes on; `drop_reports` forgets what a superseded attempt
    still had to say. A task that was to go on ends all the same when a newer attempt has it, or (a local one) when
    somebody asked for its end meanwhile. Raises LostRace when the run has ended already.
    """
    run = one(db, "run_state", {"attempt_id": attempt_id, "run_no": run_no})
    attempt = one(db, "attempt_state", {"attempt_id": attempt_id})
    if run is None or run["state"] == RunState.ENDED:
        raise LostRace(f"run {run_no} of attempt {attempt_id} has ended already")
    change(
        db,
        "run_ended",
        {
            "attempt_id": attempt_id,
            "run_no": run_no,
            "state": run["state"],
            "new_state": next_run_state(RunState(run["state"]), RunEvent.END),
            "cause": outcome.cause,
            "exit_code": outcome.exit_code,
            "signal": outcome.signal,
            "error": outcome.error,
            "ended_at_ms": ended_at_ms,
            "usage": json.dumps(usage) if usage is not None else None,
        },
    )
    state = TaskState(attempt["state"])
    new_state = next_task_state(state, after.event)
    values = {
        "attempt_id": attempt_id,
        "run_no": run_no,
        "state": state,
        "new_state": new_state,
        "retries_used": after.retries_used,
        "free_retries_used": after.free_retries_used,
    }
    if not new_state.is_final:
        last = _may_not_go_on(db, run, attempt)
        if last is None:
            change(db, "retry_attempt", {**values, "ready_boottime_ns": ready_boottime_ns})
            return new_state
        outcome, report, drop_reports = last, None, not CAUSE_RULES[last.cause].is_reported
        values["new_state"] = new_state = next_task_state(state, final_event(last.cause))
        values |= {key: attempt[key] for key in ("retries_used", "free_retries_used")}
    _end(db, values, outcome, ended_at_ms, is_synced=report is None)
    if drop_reports:
        outbox.drop_reports(db, attempt_id)
    if report is not None:
        add_report(db, attempt_id, "complete", report, ended_at_ms, boot_id)
    return new_state


def _may_not_go_on(db: sqlite3.Connection, run: sqlite3.Row, attempt: sqlite3.Row) -> Outcome | None:
    """How the task ends although its run's end allows another one; decided here, because only here no race is left.

    The completion of a claimed task is for the executor to word: it ends that one as a waiting task.
    """
    if one(db, "has_newer_attempt", {"task_id": attempt["task_id"], "seq": attempt["seq"]}) is not None:
        return _SUPERSEDED
    if run["stop_cause"] is None:
        return None
    cause = Cause(run["stop_cause"])
    rule = CAUSE_RULES[cause]
    if rule.retry is not Retry.NEVER or (rule.is_reported and attempt["origin"] != "local"):
        return None
    return Outcome(
        cause, wire_exit_code(cause, None, None), None, f"the task was to be stopped ({cause}) when its run ended"
    )


def _end(
    db: sqlite3.Connection, values: Mapping[str, Any], outcome: Outcome, ended_at_ms: int, *, is_synced: bool
) -> None:
    change(
        db,
        "end_attempt",
        {
            **values,
            "cause": outcome.cause,
            "exit_code": outcome.exit_code,
            "signal": outcome.signal,
            "error": outcome.error,
            "ended_at_ms": ended_at_ms,
            "is_synced": is_synced,
        },
    )


def end_waiting(
    db: sqlite3.Connection,
    attempt_id: AttemptId,
    cause: Cause,
    error: str,
    exit_code: int,
    now_ms: int,
    report: tuple[ReportKind, Body, str] | None,
) -> None:
    """End an attempt that has no process: cancelled, superseded, refused, or its lease is over.

    `report` is (kind, body, boot id) or None. Raises LostRace when it has a process or has ended.
    """
    row = one(db, "attempt_state", {"attempt_id": attempt_id})
    if row is None or TaskState(row["state"]).is_final or row["state"] in _LIVE:
        raise LostRace(f"attempt {attempt_id} does not wait")
    state = TaskState(row["state"])
    values = {
        "attempt_id": attempt_id,
        "run_no": row["run_no"],
        "state": state,
        "new_state": next_task_state(state, final_event(cause)),
        "retries_used": row["retries_used"],
        "free_retries_used": row["free_retries_used"],
    }
    if cause is Cause.SUPERSEDED:
        outbox.drop_reports(db, attempt_id)
    _end(db, values, Outcome(cause, exit_code, None, error), now_ms, is_synced=report is None)
    if report is not None:
        kind, body, boot_id = report
        add_report(db, attempt_id, kind, body, now_ms, boot_id)


def extend_lease(db: sqlite3.Connection, attempt_id: AttemptId, ttl_s: float, deadline_boottime_ns: int) -> bool:
    """Move an open attempt's lease; False when it has ended."""
    values = {"attempt_id": attempt_id, "ttl_ns": round(ttl_s * 1e9), "deadline_ns": deadline_boottime_ns}
    return db.execute(SQL["extend_lease"], values).rowcount == 1


def set_progress(
    db: sqlite3.Connection,
    attempt_id: AttemptId,
    percent: float,
    message: str,
    now_ms: int,
    report: tuple[Body, str] | None,
) -> None:
    """Store the latest progress of a running attempt and replace its waiting progress report.

    Ignored after the end, and where nothing has changed.
    """
    row = one(db, "set_progress", {"attempt_id": attempt_id, "percent": percent, "message": message})
    if row is not None and report is not None:
        body, boot_id = report
        replace_progress(db, attempt_id, TaskId(row["task_id"]), body, now_ms, boot_id)


# --- the database as a whole ---


def rebase(db: sqlite3.Connection, boot_id: str) -> None:
    """After a reboot every stored boottime is meaningless: leases are over, delays and back-offs too. Idempotent."""
    db.execute(SQL["rebase_attempts"], {"boot_id": boot_id})
    db.execute(SQL["rebase_outbox"], {"boot_id": boot_id})


def meta(db: sqlite3.Connection, key: str, default: str) -> str:
    """The value stored under `key`; `default` is stored, and counts, the first time."""
    db.execute(SQL["add_meta"], {"key": key, "value": default})
    value: str = one(db, "get_meta", {"key": key})["value"]
    return value


def set_meta(db: sqlite3.Connection, key: str, value: str | None) -> None:
    """Store a value under `key` in place of the one before; None removes it. Safe to repeat."""
    if value is None:
        db.execute(SQL["drop_meta"], {"key": key})
    else:
        db.execute(SQL["set_meta"], {"key": key, "value": value})


def find_meta(db: sqlite3.Connection, key: str) -> str | None:
    """The value stored under `key`, or None."""
    row = one(db, "get_meta", {"key": key})
    return None if row is None else str(row["value"])


def keep_meta(db: sqlite3.Connection, values: Mapping[str, str]) -> None:
    """Store what is not there yet. Safe to repeat."""
    for key, value in values.items():
        db.execute(SQL["add_meta"], {"key": key, "value": value})
