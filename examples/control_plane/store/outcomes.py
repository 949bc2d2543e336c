"""What units give back: a refusal is a value, so that the trace that it left behind is committed with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, bindparam, insert, select, update

from control_plane.settings import REJECTION_EVENTS_MAX
from control_plane.store.tables import EventKind, events, tasks
from remotegpu_schemas.errors import Code


@dataclass(frozen=True)
class Refusal:
    """Why a call was not obeyed."""

    code: Code
    message: str


_ADD_EVENT: Final = insert(events)
_REJECTIONS: Final = select(tasks.c.rejections).where(tasks.c.id == bindparam("b_id")).with_for_update()
_COUNT_REJECTION: Final = (
    update(tasks)
    .where(tasks.c.id == bindparam("b_id"))
    .values(
        rejections=tasks.c.rejections + 1,
        completions_rejected=tasks.c.completions_rejected + bindparam("b_completions"),
    )
)


def event_row(
    task_id: str, at_ms: int, kind: EventKind, attempt_id: str | None = None, detail: str = ""
) -> dict[str, Any]:
    """One line of a task's history, to be inserted."""
    return {"task_id": task_id, "at_ms": at_ms, "kind": kind, "attempt_id": attempt_id, "detail": detail}


def add_event(
    db: Connection, task_id: str, at_ms: int, kind: EventKind, attempt_id: str | None = None, detail: str = ""
) -> None:
    """Write one line into a task's history."""
    db.execute(_ADD_EVENT, event_row(task_id, at_ms, kind, attempt_id, detail))


def reject(db: Connection, task_id: str, call: str, attempt_id: str, refusal: Refusal, now_ms: int) -> Refusal:
    """Count the refusal and write it into the task's history; gives the refusal back."""
    rejections = db.execute(_REJECTIONS, {"b_id": task_id}).scalar()
    if rejections is None:
        return refusal
    db.execute(_COUNT_REJECTION, {"b_id": task_id, "b_completions": int(call == "complete")})
    if rejections < REJECTION_EVENTS_MAX:
        detail = f"{call}: {int(refusal.code)} {refusal.message}"
        add_event(db, task_id, now_ms, EventKind.REJECTED, attempt_id, detail)
    return refusal
