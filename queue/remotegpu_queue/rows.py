"""Rows of the database as frozen values, and the two statements that every unit is made of."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import ValidationError

from remotegpu_queue.queries import SQL
from remotegpu_queue.store import LostRace
from remotegpu_schemas.attempt import AttemptId, Lease, ProcessIdentity, RunNo
from remotegpu_schemas.states import Cause, RunState, TaskState
from remotegpu_schemas.task import Resources, Task, TaskId

_REASON_MAX_CHARS: Final = 300

Origin = Literal["local", "control_plane"]


@dataclass(frozen=True)
class Attempt:
    """A row of `attempts`: the task, who asked for it, and how far it has come."""

    seq: int
    attempt_id: AttemptId
    task: Task
    origin: Origin
    state: TaskState
    run_no: RunNo
    retries_used: int
    free_retries_used: int
    ready_boottime_ns: int
    lease: Lease | None
    renew_interval_s: float | None
    cause: Cause | None
    exit_code: int | None
    signal: int | None
    error: str | None
    progress_percent: float | None
    progress_message: str | None
    submitted_at_ms: int
    started_at_ms: int | None
    ended_at_ms: int | None
    is_start_accepted: bool
    is_synced: bool
    submitter_uid: int | None = None
    """Who submitted it over the Unix socket; None for claimed tasks and callers with a token."""
    unreadable: str | None = None
    """Why the task cannot be read, if so: then `task` stands in for it, and must not be run."""

    @property
    def task_id(self) -> TaskId:
        """The task's id."""
        return self.task.task_id


@dataclass(frozen=True)
class Run:
    """A row of `runs`: one start of the task's process."""

    attempt_id: AttemptId
    run_no: RunNo
    state: RunState
    stop_cause: Cause | None
    cause: Cause | None
    exit_code: int | None
    signal: int | None
    error: str | None
    process: ProcessIdentity | None
    started_at_ms: int | None
    ended_at_ms: int | None
    usage: dict[str, float] | None


def attempt_of(row: sqlite3.Row) -> Attempt:
    """A whole row of `attempts` as a value."""
    lease = None
    if row["lease_ttl_ns"] is not None:
        lease = Lease(
            ttl_s=row["lease_ttl_ns"] / 1e9, deadline_boottime_ns=row["lease_deadline_ns"], boot_id=row["boot_id"]
        )
    task, unreadable = _task_of(row)
    return Attempt(
        seq=row["seq"],
        attempt_id=AttemptId(row["attempt_id"]),
        task=task,
        origin=row["origin"],
        state=TaskState(row["state"]),
        run_no=RunNo(row["run_no"]),
        retries_used=row["retries_used"],
        free_retries_used=row["free_retries_used"],
        ready_boottime_ns=row["ready_boottime_ns"],
        lease=lease,
        renew_interval_s=row["renew_interval_ns"] / 1e9 if row["renew_interval_ns"] is not None else None,
        cause=Cause(row["cause"]) if row["cause"] is not None else None,
        exit_code=row["exit_code"],
        signal=row["signal"],
        error=row["error"],
        progress_percent=row["progress_percent"],
        progress_message=row["progress_message"],
        submitted_at_ms=row["submitted_at_ms"],
        started_at_ms=row["started_at_ms"],
        ended_at_ms=row["ended_at_ms"],
        is_start_accepted=bool(row["is_start_accepted"]),
        is_synced=bool(row["is_synced"]),
        submitter_uid=row["submitter_uid"],
        unreadable=unreadable,
    )


def _task_of(row: sqlite3.Row) -> tuple[Task, str | None]:
    """The task, or one that stands in for it, and why: one bad row must not keep the others from being read."""
    try:
        return Task.model_validate_json(row["task"]), None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = f"the task as it is stored cannot be read: {where + ': ' if where else ''}{first['msg']}"
    resources = Resources.model_construct(gpus=row["gpus"], cpus=row["cpus"], memory_gb=row["memory_gb"])
    return Task.model_construct(
        id=row["task_id"], command="(the stored task cannot be read)", priority=row["priority"], resources=resources
    ), reason[:_REASON_MAX_CHARS]


def run_of(row: sqlite3.Row) -> Run:
    """A whole row of `runs` as a value."""
    process = None
    if row["pid"] is not None:
        process = ProcessIdentity(boot_id=row["boot_id"], pid=row["pid"], start_ticks=row["start_ticks"])
    return Run(
        attempt_id=AttemptId(row["attempt_id"]),
        run_no=RunNo(row["run_no"]),
        state=RunState(row["state"]),
        stop_cause=Cause(row["stop_cause"]) if row["stop_cause"] is not None else None,
        cause=Cause(row["cause"]) if row["cause"] is not None else None,
        exit_code=row["exit_code"],
        signal=row["signal"],
        error=row["error"],
        process=process,
        started_at_ms=row["started_at_ms"],
        ended_at_ms=row["ended_at_ms"],
        usage=json.loads(row["usage"]) if row["usage"] is not None else None,
    )


def change(db: sqlite3.Connection, query: str, values: Mapping[str, Any]) -> None:
    """Run an UPDATE without RETURNING that must change exactly one row. Raises LostRace when it does not."""
    if db.execute(SQL[query], values).rowcount != 1:
        raise LostRace(f"{query}: {values.get('attempt_id')} is no longer in the expected state")


def one(db: sqlite3.Connection, query: str, values: Mapping[str, Any] | None = None) -> Any:
    """The first row of a query, or None; the statement has run to its end."""
    rows = db.execute(SQL[query], values or {}).fetchall()
    return rows[0] if rows else None
