"""Tasks as an operator sees them: submitted, listed, looked at, cancelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, bindparam, func, insert, select, update

from control_plane.store.labels import selectors
from control_plane.store.outcomes import Refusal, add_event, event_row
from control_plane.store.tables import EventKind, Status, attempts, events, tasks
from remotegpu_schemas.errors import Code


@dataclass(frozen=True)
class NewTask:
    """A checked submission; `spec` is the claimed-task form without what the plane adds."""

    id: str
    name: str
    spec: dict[str, Any]
    machine_id: str
    priority: int
    status: Status = Status.PENDING


_OVERVIEW: Final = (
    select(tasks, attempts.c.result, selectors.c.labels.label("machine_labels"))
    .join_from(tasks, attempts, attempts.c.attempt_id == tasks.c.attempt_id, isouter=True)
    .join(selectors, selectors.c.selector_id == tasks.c.machine_id, isouter=True)
)
_BY_ID: Final = _OVERVIEW.where(tasks.c.id == bindparam("b_id"))
_ATTEMPTS: Final = select(attempts).where(attempts.c.task_id == bindparam("b_id")).order_by(attempts.c.attempt_no)
_EVENTS: Final = select(events).where(events.c.task_id == bindparam("b_id")).order_by(events.c.seq)
_OPEN: Final = select(tasks.c.id).where(
    tasks.c.ended_at_ms.is_(None), tasks.c.id.in_(bindparam("b_ids", expanding=True))
)
_CANCELLING: Final = (
    select(tasks.c.status, tasks.c.attempt_id, tasks.c.cancel_requested)
    .where(tasks.c.id == bindparam("b_id"))
    .with_for_update()
)
_REQUEST_CANCEL: Final = update(tasks).where(tasks.c.id == bindparam("b_id")).values(cancel_requested=True)
_CANCEL_NOW: Final = (
    update(tasks)
    .where(tasks.c.id == bindparam("b_id"), tasks.c.status.in_([Status.WAITING, Status.PENDING]))
    .values(status=Status.CANCELLED, cancel_requested=True, ended_at_ms=bindparam("b_now"))
)
_IDS_AT_ONCE: Final = 500
"""Far below any database's bound on parameters."""


def add(db: Connection, new: Sequence[NewTask], now_ms: int) -> Refusal | None:
    """Add all of the tasks, or none if one of their ids is taken."""
    for start in range(0, len(new), _IDS_AT_ONCE):
        ids = [task.id for task in new[start : start + _IDS_AT_ONCE]]
        taken = db.execute(select(tasks.c.id).where(tasks.c.id.in_(ids)).limit(1)).scalar()
        if taken is not None:
            return Refusal(Code.ALREADY_EXISTS, f"there is a task {taken} already; nothing was submitted")
    db.execute(
        insert(tasks),
        [
            {
                "id": task.id,
                "name": task.name,
                "spec": task.spec,
                "machine_id": task.machine_id,
                "priority": task.priority,
                "status": task.status,
                "created_at_ms": now_ms,
            }
            for task in new
        ],
    )
    db.execute(insert(events), [event_row(task.id, now_ms, EventKind.CREATED) for task in new])
    return None


def cancel(db: Connection, task_id: str, now_ms: int) -> Status | Refusal:
    """Cancel a task: at once if nobody has claimed it, else its agent is asked to. Twice is the same as once."""
    task = db.execute(_CANCELLING, {"b_id": task_id}).one_or_none()
    if task is None:
        return Refusal(Code.TASK_NOT_FOUND, f"there is no task {task_id}")
    status = Status(task.status)
    if status is Status.CANCELLED or task.cancel_requested:
        return status
    if status.is_final:
        return Refusal(Code.TASK_FINISHED, f"task {task_id} has ended: {status}")
    if status in {Status.WAITING, Status.PENDING}:
        db.execute(_CANCEL_NOW, {"b_id": task_id, "b_now": now_ms})
        add_event(db, task_id, now_ms, EventKind.CANCELLED)
        return Status.CANCELLED
    db.execute(_REQUEST_CANCEL, {"b_id": task_id})
    add_event(db, task_id, now_ms, EventKind.CANCEL_REQUESTED, task.attempt_id)
    return status


def get(db: Connection, task_id: str) -> dict[str, Any] | None:
    """One task with its `attempts` and `events`."""
    row = db.execute(_BY_ID, {"b_id": task_id}).mappings().one_or_none()
    if row is None:
        return None
    names = {"b_id": task_id}
    return {
        **row,
        "attempt_list": [dict(attempt) for attempt in db.execute(_ATTEMPTS, names).mappings()],
        "events": [dict(event) for event in db.execute(_EVENTS, names).mappings()],
    }


def list_tasks(db: Connection, status: Status | None, limit: int, offset: int) -> tuple[int, list[dict[str, Any]]]:
    """How many there are, and a page of them, oldest first."""
    wanted = [] if status is None else [tasks.c.status == status]
    total: int = db.execute(select(func.count()).select_from(tasks).where(*wanted)).scalar_one()
    page = _OVERVIEW.where(*wanted).order_by(tasks.c.seq).limit(limit).offset(offset)
    return total, [dict(row) for row in db.execute(page).mappings()]


def count(db: Connection) -> dict[str, int]:
    """How many tasks there are in each status; statuses without any are there too."""
    counts = dict.fromkeys(Status, 0)
    for status, number in db.execute(select(tasks.c.status, func.count()).group_by(tasks.c.status)):
        counts[Status(status)] = number
    return {status.value: number for status, number in counts.items()}


def count_open(db: Connection, task_ids: Sequence[str]) -> int:
    """How many of these tasks have not ended."""
    return sum(
        len(db.execute(_OPEN, {"b_ids": list(task_ids[start : start + _IDS_AT_ONCE])}).all())
        for start in range(0, len(task_ids), _IDS_AT_ONCE)
    )
