"""Durable reports that wait for delivery: in order per attempt, put off by a persisted backoff, never dropped.

Plain functions on a sqlite3 connection, as `units.py`. Times ending in `_ms` are wall clock, in `_ns` CLOCK_BOOTTIME.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from remotegpu_queue.queries import SQL
from remotegpu_queue.rows import one
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
    kind: Literal["start", "progress", "complete", "release"]
    body: dict[str, Any]
    created_at_ms: int
    first_try_at_ms: int | None
    tries: int
    last_error: str | None


def add_report(
    db: sqlite3.Connection,
    attempt_id: AttemptId,
    kind: str,
    body: Body,
    now_ms: int,
    boot_id: str,
    task_id: TaskId | None = None,
) -> None:
    """Add a report for delivery. `task_id` is needed only where no attempt was stored (a refused claim)."""
    if task_id is None:
        task_id = TaskId(one(db, "attempt", {"attempt_id": attempt_id})["task_id"])
    elif one(db, "has_complete", {"attempt_id": attempt_id}) is not None:
        return
    db.execute(
        SQL["add_report"],
        {
            "attempt_id": attempt_id,
            "task_id": task_id,
            "kind": kind,
            "body": json.dumps(body, ensure_ascii=False),
            "now_ms": now_ms,
            "boot_id": boot_id,
        },
    )


def due_reports(db: sqlite3.Connection, now_ns: int, limit: int) -> tuple[list[Report], int | None]:
    """The oldest report of each attempt that is due, and when the next other one will be (CLOCK_BOOTTIME ns)."""
    rows = db.execute(SQL["due_reports"], {"now_ns": now_ns, "limit": limit}).fetchall()
    next_due = one(db, "next_due_report", {"now_ns": now_ns})[0]
    return [
        Report(
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
        for row in rows
    ], next_due


def report_delivered(db: sqlite3.Connection, report: Report) -> None:
    """Forget a delivered report and note on its attempt what the control plane now knows."""
    db.execute(SQL["report_delivered"], {"id": report.id})
    if report.kind == "start":
        db.execute(SQL["start_accepted"], {"attempt_id": report.attempt_id})
    elif report.kind in {"complete", "release"}:
        db.execute(SQL["result_synced"], {"attempt_id": report.attempt_id})


def report_retry(db: sqlite3.Connection, report_id: int, due_boottime_ns: int, error: str, now_ms: int) -> None:
    """Put a report off."""
    db.execute(SQL["report_retry"], {"id": report_id, "due_ns": due_boottime_ns, "error": error, "now_ms": now_ms})


def report_dead(db: sqlite3.Connection, report_id: int, error: str) -> None:
    """Set a report aside as a dead letter; it stays until somebody looks at it."""
    db.execute(SQL["report_dead"], {"id": report_id, "error": error})


def drop_reports(db: sqlite3.Connection, attempt_id: AttemptId) -> None:
    """Forget what a superseded attempt still had to say."""
    db.execute(SQL["drop_reports"], {"attempt_id": attempt_id})


def has_reports(db: sqlite3.Connection, attempt_id: AttemptId) -> bool:
    """Whether anything of this attempt waits for delivery."""
    return one(db, "has_reports", {"attempt_id": attempt_id}) is not None


def drop_report(db: sqlite3.Connection, report_id: int) -> None:
    """Forget one report that nobody wants."""
    db.execute(SQL["report_delivered"], {"id": report_id})
