"""Claims and lapses: how a task comes under a lease, and how it comes back when the lease ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, RowMapping, bindparam, func, insert, select, update

from control_plane.store import labels
from control_plane.store.outcomes import add_event, event_row
from control_plane.store.tables import ANY_MACHINE, AttemptState, EventKind, Status, attempts, events, machines, tasks


@dataclass(frozen=True)
class ClaimOrder:
    """Who asks for how many. Without `is_idempotent` the request id means nothing."""

    machine_id: str
    agent_id: str
    request_id: str
    limit: int
    is_idempotent: bool = True
    repeats_held: bool = False


@dataclass(frozen=True)
class ClaimedTask:
    """A task with the attempt that holds it."""

    id: str
    spec: dict[str, Any]
    machine_id: str
    created_at_ms: int
    attempt_id: str
    agent_id: str
    claimed_at_ms: int
    lease_ttl_ms: int
    lease_expires_ms: int
    started_at_ms: int | None = None


@dataclass(frozen=True)
class Granted:
    """A claim's tasks. With `let_go` more were locked for a moment: who looked then saw too few, and looks again."""

    tasks: list[ClaimedTask]
    let_go: bool = False


_LOCK_MACHINE: Final = (
    select(machines.c.machine_id).where(machines.c.machine_id == bindparam("b_machine")).with_for_update()
)
_PICK: Final = (
    select(tasks.c.seq, tasks.c.id, tasks.c.spec, tasks.c.priority, tasks.c.created_at_ms, tasks.c.attempts)
    .where(tasks.c.status == Status.PENDING, tasks.c.machine_id == bindparam("b_machine"))
    .order_by(tasks.c.priority, tasks.c.seq)
    .limit(bindparam("b_limit"))
    .with_for_update(skip_locked=True)
)
_ASSIGN: Final = (
    update(tasks)
    .where(tasks.c.seq == bindparam("b_seq"), tasks.c.status == Status.PENDING)
    .values(
        status=Status.ASSIGNED,
        attempt_id=bindparam("b_attempt"),
        agent_id=bindparam("b_agent"),
        lease_expires_ms=bindparam("b_expires"),
        attempts=tasks.c.attempts + 1,
        progress_percent=None,
        progress_message=None,
    )
)
_HELD: Final = select(
    tasks.c.id,
    tasks.c.spec,
    tasks.c.created_at_ms,
    tasks.c.lease_expires_ms,
    attempts.c.attempt_id,
    attempts.c.agent_id,
    attempts.c.machine_id,
    attempts.c.claimed_at_ms,
    attempts.c.lease_ttl_ms,
    attempts.c.started_at_ms,
).join_from(attempts, tasks, attempts.c.attempt_id == tasks.c.attempt_id)
_BY_REQUEST: Final = _HELD.where(
    attempts.c.agent_id == bindparam("b_agent"), attempts.c.request_id == bindparam("b_request")
).order_by(tasks.c.priority, tasks.c.seq)
_BY_AGENT: Final = _HELD.where(
    tasks.c.agent_id == bindparam("b_agent"), tasks.c.status.in_([Status.ASSIGNED, Status.RUNNING])
).order_by(tasks.c.priority, tasks.c.seq)
_WAS_ANSWERED: Final = (
    select(attempts.c.attempt_id)
    .where(attempts.c.agent_id == bindparam("b_agent"), attempts.c.request_id == bindparam("b_request"))
    .limit(1)
)


def claim(db: Connection, order: ClaimOrder, now_ms: int, default_ttl_ms: int, new_id: Callable[[], str]) -> Granted:
    """The tasks that the agent gets, under new leases of `default_ttl_ms` unless they name their own.

    A repeated request gets what it got the first time, without the attempts that are over by now and without new ones.
    One that comes while the first is still being worked on, in another plane perhaps, waits for it.
    """
    if order.is_idempotent:
        db.execute(_LOCK_MACHINE, {"b_machine": order.machine_id})
        names = {"b_agent": order.agent_id, "b_request": order.request_id}
        if db.execute(_WAS_ANSWERED, names).scalar() is not None:
            return Granted([_held(row) for row in db.execute(_BY_REQUEST, names).mappings() if _is_live(row, now_ms)])
    held: list[ClaimedTask] = []
    if order.repeats_held:
        held = [
            _held(row) for row in db.execute(_BY_AGENT, {"b_agent": order.agent_id}).mappings() if _is_live(row, now_ms)
        ]
    granted = _assign(db, order, now_ms, default_ttl_ms, new_id)
    return Granted(held + granted.tasks, let_go=granted.let_go)


def _assign(db: Connection, order: ClaimOrder, now_ms: int, default_ttl_ms: int, new_id: Callable[[], str]) -> Granted:
    rows = [
        row
        for machine_id in (order.machine_id, ANY_MACHINE, *labels.selectors_for(db, order.machine_id))
        for row in db.execute(_PICK, {"b_machine": machine_id, "b_limit": order.limit}).mappings()
    ]
    rows.sort(key=lambda row: (row["priority"], row["seq"]))
    let_go = len(rows) > order.limit
    del rows[order.limit :]
    if not rows:
        return Granted([])
    claimed = [_claimed(row, order, now_ms, default_ttl_ms, new_id()) for row in rows]
    db.execute(
        _ASSIGN,
        [
            {
                "b_seq": row["seq"],
                "b_attempt": task.attempt_id,
                "b_agent": task.agent_id,
                "b_expires": task.lease_expires_ms,
            }
            for row, task in zip(rows, claimed, strict=True)
        ],
    )
    db.execute(
        insert(attempts),
        [
            {
                "attempt_id": task.attempt_id,
                "task_id": task.id,
                "attempt_no": row["attempts"] + 1,
                "machine_id": order.machine_id,
                "agent_id": order.agent_id,
                "request_id": order.request_id,
                "state": AttemptState.CLAIMED,
                "claimed_at_ms": now_ms,
                "lease_ttl_ms": task.lease_ttl_ms,
            }
            for row, task in zip(rows, claimed, strict=True)
        ],
    )
    db.execute(
        insert(events),
        [event_row(task.id, now_ms, EventKind.CLAIMED, task.attempt_id, order.agent_id) for task in claimed],
    )
    return Granted(claimed, let_go=let_go)


def _claimed(row: RowMapping, order: ClaimOrder, now_ms: int, default_ttl_ms: int, attempt_id: str) -> ClaimedTask:
    own_ttl_s = row["spec"].get("lease_ttl_sec")
    ttl_ms = int(own_ttl_s * 1000) if isinstance(own_ttl_s, int | float) and own_ttl_s > 0 else default_ttl_ms
    return ClaimedTask(
        id=row["id"],
        spec=row["spec"],
        machine_id=order.machine_id,
        created_at_ms=row["created_at_ms"],
        attempt_id=attempt_id,
        agent_id=order.agent_id,
        claimed_at_ms=now_ms,
        lease_ttl_ms=ttl_ms,
        lease_expires_ms=now_ms + ttl_ms,
    )


def _held(row: RowMapping) -> ClaimedTask:
    return ClaimedTask(**row)


def _is_live(row: RowMapping, now_ms: int) -> bool:
    return row["lease_expires_ms"] is not None and row["lease_expires_ms"] > now_ms


# --- lapses --------------------------------------------------------------------------------------------------------

_EXPIRED: Final = (
    select(tasks.c.id, tasks.c.attempt_id)
    .where(tasks.c.lease_expires_ms <= bindparam("b_now"))
    .order_by(tasks.c.lease_expires_ms)
    .limit(bindparam("b_limit"))
    .with_for_update(skip_locked=True)
)
_NEXT_EXPIRY: Final = select(func.min(tasks.c.lease_expires_ms))
_LAPSING: Final = select(tasks.c.lapses, tasks.c.cancel_requested).where(tasks.c.id == bindparam("b_id"))
_END_ATTEMPT: Final = (
    update(attempts)
    .where(attempts.c.attempt_id == bindparam("b_attempt"))
    .values(state=bindparam("b_state"), ended_at_ms=bindparam("b_now"))
)
_END_LEASE: Final = (
    update(tasks)
    .where(tasks.c.id == bindparam("b_id"), tasks.c.attempt_id == bindparam("b_attempt"))
    .values(
        status=bindparam("b_status"),
        lease_expires_ms=None,
        lapses=tasks.c.lapses + bindparam("b_lapses"),
        ended_at_ms=bindparam("b_ended"),
        error=bindparam("b_error"),
    )
)
_HOLD_LONGER: Final = (
    update(tasks).where(tasks.c.lease_expires_ms < bindparam("b_until")).values(lease_expires_ms=bindparam("b_until"))
)
_REAP_MAX: Final = 500


@dataclass(frozen=True)
class Reaped:
    """What one round did, and when the next lease ends (None: there is none)."""

    requeued: int
    ended: int
    next_expiry_ms: int | None


def reap(db: Connection, now_ms: int, attempts_max: int) -> Reaped:
    """End the leases that are over; a part of them if there are very many, then `next_expiry_ms` lies in the past."""
    statuses = [
        give_back(db, row.id, row.attempt_id, AttemptState.LAPSED, now_ms, attempts_max)
        for row in db.execute(_EXPIRED, {"b_now": now_ms, "b_limit": _REAP_MAX}).all()
    ]
    requeued = statuses.count(Status.PENDING)
    return Reaped(requeued, len(statuses) - requeued, db.execute(_NEXT_EXPIRY).scalar())


def give_back(
    db: Connection,
    task_id: str,
    attempt_id: str,
    state: AttemptState,
    now_ms: int,
    attempts_max: int,
    detail: str = "",
) -> Status:
    """The attempt is over without a result: the task can be claimed again, or ends if that was asked or due.

    Only a release costs none of the `attempts_max`. Returns the task's new status.
    """
    task = db.execute(_LAPSING, {"b_id": task_id}).one()
    costs = int(state is not AttemptState.RELEASED)
    status, error, kind = Status.PENDING, None, None
    if task.cancel_requested:
        status, kind = Status.CANCELLED, EventKind.CANCELLED
    elif costs and task.lapses + costs >= attempts_max:
        status, kind = Status.FAILED, EventKind.FAILED
        error = f"lease_lost: {task.lapses + costs} attempts ended without a result"
    db.execute(_END_ATTEMPT, {"b_attempt": attempt_id, "b_state": state, "b_now": now_ms})
    db.execute(
        _END_LEASE,
        {
            "b_id": task_id,
            "b_attempt": attempt_id,
            "b_status": status,
            "b_lapses": costs,
            "b_ended": now_ms if status.is_final else None,
            "b_error": error,
        },
    )
    add_event(db, task_id, now_ms, EventKind(state), attempt_id, detail)
    if kind is not None:
        add_event(db, task_id, now_ms, kind, attempt_id, error or "")
    return status


def hold_longer(db: Connection, until_ms: int) -> None:
    """No lease ends before `until_ms`: while the plane was down nobody could renew."""
    db.execute(_HOLD_LONGER, {"b_until": until_ms})
