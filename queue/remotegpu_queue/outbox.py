"""Durable reports that wait for delivery: in order per attempt, put off by a persisted backoff, never dropped.

Plain functions on a sqlite3 connection, as `units.py`. Times ending in `_ms` are wall clock, in `_ns` CLOCK_BOOTTIME.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from remotegpu_queue.queries import SQL
from remotegpu_queue.rows import one
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.task import TaskId

Body = Mapping[str, Any]
ReportKind = Literal["start", "progress", "complete", "release"]


@dataclass(frozen=True)
class Report:
    """A row of `outbox`: one report that waits for delivery."""

    id: int
    attempt_id: AttemptId
    task_id: TaskId
    kind: ReportKind
    body: dict[str, Any]
    created_at_ms: int
    first_try_at_ms: int | None
    tries: int
    last_error: str | None


@dataclass(frozen=True)
class _Tried:
    """How the delivery of a report went so far."""

    tries: int = 0
    first_try_at_ms: int | None = None
    last_error: str | None = None
    due_ns: int = 0


def add_report(
    db: sqlite3.Connection,
    attempt_id: AttemptId,
    kind: ReportKind,
    body: Body,
    now_ms: int,
    boot_id: str,
    task_id: TaskId | None = None,
) -> None:
    """Add a report for delivery, behind what the attempt has to say already.

    `task_id` is needed only where no attempt was stored (a refused claim); repeating it then changes nothing.
    """
    if task_id is None:
        task_id = TaskId(one(db, "attempt_state", {"attempt_id": attempt_id})["task_id"])
    elif one(db, "has_complete", {"attempt_id": attempt_id}) is not None:
        return
    _add(db, attempt_id, task_id, kind, body, now_ms, boot_id, _Tried())


def replace_progress(
    db: sqlite3.Connection, attempt_id: AttemptId, task_id: TaskId, body: Body, now_ms: int, boot_id: str
) -> None:
    """Put the latest progress in place of the one that waits; a delivery that was put off stays put off."""
    tried = _Tried()
    row = one(db, "drop_waiting_progress", {"attempt_id": attempt_id})
    if row is not None:
        tried = _Tried(row["tries"], row["first_try_at_ms"], row["last_error"], row["due_boottime_ns"] or 0)
        _next(db, attempt_id)
    _add(db, attempt_id, task_id, "progress", body, now_ms, boot_id, tried)


def _add(
    db: sqlite3.Connection,
    attempt_id: AttemptId,
    task_id: TaskId,
    kind: ReportKind,
    body: Body,
    now_ms: int,
    boot_id: str,
    tried: _Tried,
) -> None:
    db.execute(
        SQL["add_report"],
        {
            "attempt_id": attempt_id,
            "task_id": task_id,
            "kind": kind,
            "body": json.dumps(body, ensure_ascii=False),
            "now_ms": now_ms,
            "boot_id": boot_id,
            "tries": tried.tries,
            "first_try_at_ms": tried.first_try_at_ms,
            "last_error": tried.last_error,
            "due_ns": tried.due_ns,
        },
    )


def _next(db: sqlite3.Connection, attempt_id: AttemptId) -> None:
    """After a report has left: the one behind it is due."""
    db.execute(SQL["next_report"], {"attempt_id": attempt_id})


def due_reports(db: sqlite3.Connection, now_ns: int, limit: int) -> tuple[list[Report], int | None]:
    """The oldest report of each attempt that is due, and when the next other one will be (CLOCK_BOOTTIME ns)."""
    rows = db.execute(SQL["due_reports"], {"now_ns": now_ns, "limit": limit}).fetchall()
    next_due = one(db, "next_due_report", {"now_ns": now_ns})[0]
    return [_report(row) for row in rows], next_due


def _report(row: sqlite3.Row) -> Report:
    return Report(
        id=row["id"],
        attempt_id=AttemptId(row["attempt_id"]),
        task_id=TaskId(row["task_id"]),
        kind=row["kind"],
        body=json.loads(row["body"]),
        created_at_ms=row["created_at_ms"],
        first_try_at_ms=row["first_try_at_ms"],
        tries=row["tries"],
        last_error=row["last_error"],
    )


def report_delivered(db: sqlite3.Connection, report: Report) -> None:
    """Forget a delivered report and note on its attempt what the control plane now knows."""
    drop_report(db, report.id)
    if report.kind == "start":
        db.execute(SQL["start_accepted"], {"attempt_id": report.attempt_id})
    elif report.kind in {"complete", "release"}:
        db.execute(SQL["result_synced"], {"attempt_id": report.attempt_id})


def report_retry(db: sqlite3.Connection, report_id: int, due_boottime_ns: int, error: str, now_ms: int) -> None:
    """Put a report off; nothing happens if it is gone (a later progress has replaced it)."""
    db.execute(SQL["report_retry"], {"id": report_id, "due_ns": due_boottime_ns, "error": error, "now_ms": now_ms})


def report_dead(db: sqlite3.Connection, report_id: int, error: str) -> None:
    """Set a report aside as a dead letter; it stays until somebody looks at it. Those behind it go on."""
    row = one(db, "report_dead", {"id": report_id, "error": error})
    if row is not None:
        _next(db, row["attempt_id"])


def dead_letters(db: sqlite3.Connection, limit: int, offset: int) -> tuple[list[Report], int]:
    """One page of what was set aside, oldest first, and how many there are."""
    rows = db.execute(SQL["dead_letters"], {"limit": limit, "offset": offset}).fetchall()
    return [_report(row) for row in rows], one(db, "count_reports", {})["dead"]


def dead_letter(db: sqlite3.Connection, report_id: int) -> Report | None:
    """One report that was set aside, or None."""
    row = one(db, "dead_letter", {"id": report_id})
    return _report(row) if row is not None else None


def resend_dead(db: sqlite3.Connection, report_id: int, boot_id: str) -> bool:
    """Put a dead letter up for delivery as if it had never been tried; False if there is none with this id.

    Progress that has been overtaken meanwhile is dropped: only the latest is worth a report.
    """
    found = dead_letter(db, report_id)
    if found is None:
        return False
    if found.kind == "progress" and one(db, "has_waiting_progress", {"attempt_id": found.attempt_id}) is not None:
        return drop_dead(db, report_id)
    one(db, "resend_dead", {"id": report_id, "boot_id": boot_id})
    _next(db, found.attempt_id)
    return True


def drop_dead(db: sqlite3.Connection, report_id: int) -> bool:
    """Forget a dead letter for good; False if there is none with this id."""
    return one(db, "drop_dead", {"id": report_id}) is not None


def drop_reports(db: sqlite3.Connection, attempt_id: AttemptId) -> None:
    """Forget what a superseded attempt still had to say."""
    db.execute(SQL["drop_reports"], {"attempt_id": attempt_id})


def hasten_starts(db: sqlite3.Connection, now_ns: int) -> None:
    """Start reports that were put off are due now: some planes renew a lease only after an accepted start."""
    db.execute(SQL["hasten_starts"], {"now_ns": now_ns})


def hasten(db: sqlite3.Connection, now_ns: int, limit: int, apart: Collection[AttemptId]) -> list[AttemptId]:
    """Of what was put off, `limit` reports are due now, the next ones first; none of the attempts `apart`. Whose."""
    names = {"now_ns": now_ns, "limit": limit, "apart": json.dumps(list(apart))}
    return [AttemptId(row["attempt_id"]) for row in db.execute(SQL["hasten_reports"], names).fetchall()]


def is_full(db: sqlite3.Connection, bound: int = limits.OUTBOX_MAX_ROWS) -> bool:
    """Whether the outbox holds at least `bound` reports, dead letters among them."""
    return one(db, "is_outbox_full", {"bound": bound - 1}) is not None


def has_reports(db: sqlite3.Connection, attempt_id: AttemptId) -> bool:
    """Whether anything of this attempt waits for delivery."""
    return one(db, "has_reports", {"attempt_id": attempt_id}) is not None


def drop_report(db: sqlite3.Connection, report_id: int) -> None:
    """Forget one report that nobody wants. Safe to repeat."""
    row = one(db, "report_delivered", {"id": report_id})
    if row is not None:
        _next(db, row["attempt_id"])
