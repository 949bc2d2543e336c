"""Fencing: which attempt may still speak for a task. Every call about an attempt goes through `look_up` and `fence`.

`look_up` locks the task until the end of the transaction. Attempts and events are written by whoever holds the lock of
their task, so they need none of their own, and whoever locks one task at a time cannot deadlock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, bindparam, select

from control_plane.store.outcomes import Refusal
from control_plane.store.tables import AttemptState, Status, attempts, tasks
from remotegpu_schemas.errors import Code


@dataclass(frozen=True)
class Call:
    """One call of an agent about an attempt. `machine_id` is the one of its token."""

    name: str
    task_id: str
    attempt_id: str
    agent_id: str
    machine_id: str


@dataclass(frozen=True)
class Held:
    """The attempt as the plane knows it, with its task."""

    status: Status
    current_attempt_id: str | None
    lease_expires_ms: int | None
    cancel_requested: bool
    task_ended_at_ms: int | None
    state: AttemptState
    agent_id: str
    machine_id: str
    started_at_ms: int | None
    run_no: int | None
    ended_at_ms: int | None


_LOCK: Final = select(tasks.c.status).where(tasks.c.id == bindparam("b_id")).with_for_update()
_LOOK_UP: Final = (
    select(
        tasks.c.status,
        tasks.c.attempt_id.label("current_attempt_id"),
        tasks.c.lease_expires_ms,
        tasks.c.cancel_requested,
        tasks.c.ended_at_ms.label("task_ended_at_ms"),
        attempts.c.state,
        attempts.c.agent_id,
        attempts.c.machine_id,
        attempts.c.started_at_ms,
        attempts.c.run_no,
        attempts.c.ended_at_ms,
    )
    .join_from(attempts, tasks, attempts.c.task_id == tasks.c.id)
    .where(tasks.c.id == bindparam("b_id"), attempts.c.attempt_id == bindparam("b_attempt"))
)


def look_up(db: Connection, call: Call) -> Held | Refusal:
    """The attempt that is spoken of, whoever holds the task now; a refusal if it never was this agent's.

    The lock is a statement before the one that looks. In one statement PostgreSQL would, after waiting for the lock,
    give the task as it is now beside the attempt as it was before (manual, "Read Committed Isolation Level").
    """
    status = db.execute(_LOCK, {"b_id": call.task_id}).scalar()
    if status is None:
        return Refusal(Code.TASK_NOT_FOUND, f"there is no task {call.task_id}")
    row = db.execute(_LOOK_UP, {"b_id": call.task_id, "b_attempt": call.attempt_id}).mappings().one_or_none()
    if row is None:
        return superseded(call, Status(status))
    values: dict[str, Any] = {**row, "status": Status(row["status"]), "state": AttemptState(row["state"])}
    held = Held(**values)
    if held.agent_id != call.agent_id or held.machine_id != call.machine_id:
        return Refusal(
            Code.ATTEMPT_MISMATCH, f"attempt {call.attempt_id} of task {call.task_id} was not given to this agent"
        )
    return held


def fence(call: Call, held: Held, now_ms: int) -> Refusal | None:
    """Why this attempt may not speak for its task any more; None if it may."""
    if held.current_attempt_id != call.attempt_id or held.state is AttemptState.RELEASED:
        return superseded(call, held.status)
    if held.status.is_final:
        return Refusal(Code.TASK_FINISHED, f"task {call.task_id} has ended: {held.status}")
    if not held.state.is_open or held.lease_expires_ms is None or held.lease_expires_ms <= now_ms:
        return Refusal(Code.LEASE_EXPIRED, f"the lease of attempt {call.attempt_id} of task {call.task_id} has ended")
    return None


def superseded(call: Call, status: Status) -> Refusal:
    """What an attempt hears that is not the task's latest."""
    if status.is_final:
        return Refusal(Code.TASK_FINISHED, f"task {call.task_id} has ended: {status}")
    return Refusal(
        Code.ATTEMPT_MISMATCH, f"attempt {call.attempt_id} is not the present attempt of task {call.task_id}"
    )
