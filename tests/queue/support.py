"""Short ways to tasks, attempts and runs, on an inline connection with the running agent's settings."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any, Final

from remotegpu_queue import outbox, units
from remotegpu_queue.outbox import Report
from remotegpu_queue.rows import Origin
from remotegpu_queue.store import Failed, connect, migrate, run_batch
from remotegpu_queue.transitions import AfterRun, Outcome
from remotegpu_queue.units import ClaimResult, NewAttempt
from remotegpu_schemas.attempt import AttemptId, Lease, ProcessIdentity, RunNo
from remotegpu_schemas.states import Cause, TaskEvent, TaskState
from remotegpu_schemas.task import Resources, Task, TaskId

BOOT: Final = "boot-1"
NOW_MS: Final = 1_000
S: Final = 1_000_000_000
SUCCEEDED: Final = Outcome(Cause.SUCCEEDED, 0, None, "")
FAILED: Final = Outcome(Cause.EXIT_CODE, 3, None, "the task exited with code 3")
COMPLETE: Final = AfterRun(TaskEvent.COMPLETE, 0, 0)
FAIL: Final = AfterRun(TaskEvent.FAIL, 0, 0)
RETRY: Final = AfterRun(TaskEvent.RETRY, 1, 0)


def open_inline(path: Path) -> sqlite3.Connection:
    """A migrated database; without waiting for the disk, which no test of SQL needs."""
    db = connect(path)
    db.execute("PRAGMA synchronous = OFF")
    migrate(db, path)
    return db


def make_task(task_id: str, *, priority: int = 5, resources: Resources | None = None, **more: Any) -> Task:
    """A task that runs `true`."""
    return Task(id=task_id, command="true", priority=priority, resources=resources or Resources(), **more)


def new_attempt(task_id: str, attempt_id: str, origin: Origin = "local", **more: Any) -> NewAttempt:
    """An attempt; a claimed one has a lease of 300 s."""
    lease = None
    if origin == "control_plane":
        lease = Lease(ttl_s=300.0, deadline_boottime_ns=300 * S, boot_id=BOOT)
    return NewAttempt(make_task(task_id, **more), AttemptId(attempt_id), origin, BOOT, lease, 60.0 if lease else None)


def submit(db: sqlite3.Connection, *ids: str, **more: Any) -> None:
    """Local tasks whose attempts have the same names."""
    units.submit(db, [new_attempt(each, each, **more) for each in ids], NOW_MS)


def claim(db: sqlite3.Connection, task_id: str, attempt_id: str, **more: Any) -> ClaimResult:
    """One claimed attempt."""
    return units.add_claims(db, [new_attempt(task_id, attempt_id, "control_plane", **more)], NOW_MS)[0]


def begin(db: sqlite3.Connection, attempt_id: str) -> RunNo:
    """Begin the next run."""
    return units.begin_run(db, AttemptId(attempt_id), NOW_MS)[1]


def process(pid: int = 100, boot_id: str = BOOT) -> ProcessIdentity:
    """A process of this boot."""
    return ProcessIdentity(boot_id=boot_id, pid=pid, start_ticks=7)


def started(
    db: sqlite3.Connection, attempt_id: str, run_no: int = 1, pid: int = 100, report: outbox.Body | None = None
) -> None:
    """Store the identity of a run's process."""
    units.run_started(db, AttemptId(attempt_id), RunNo(run_no), process(pid), NOW_MS, report)


def stop(db: sqlite3.Connection, attempt_id: str, cause: Cause, run_no: int = 1) -> Cause:
    """Ask a run to stop."""
    return units.request_stop(db, AttemptId(attempt_id), RunNo(run_no), cause)


def end(
    db: sqlite3.Connection,
    attempt_id: str,
    outcome: Outcome = SUCCEEDED,
    after: AfterRun = COMPLETE,
    *,
    run_no: int = 1,
    report: outbox.Body | None = None,
    ready_ns: int = 0,
    drop_reports: bool = False,
) -> TaskState:
    """End a run; it succeeds unless it is said otherwise."""
    return units.run_ended(
        db,
        AttemptId(attempt_id),
        RunNo(run_no),
        outcome,
        after,
        ended_at_ms=NOW_MS,
        ready_boottime_ns=ready_ns,
        boot_id=BOOT,
        usage={"wall_s": 1.5},
        report=report,
        drop_reports=drop_reports,
    )


def end_waiting(
    db: sqlite3.Connection,
    attempt_id: str,
    cause: Cause = Cause.CANCELLED,
    report: tuple[outbox.ReportKind, outbox.Body, str] | None = None,
) -> None:
    """End an attempt that has no process."""
    units.end_waiting(db, AttemptId(attempt_id), cause, "because", 143, NOW_MS, report)


def report(
    db: sqlite3.Connection, attempt_id: str, kind: outbox.ReportKind = "start", body: outbox.Body | None = None
) -> None:
    """A report of an attempt that was never stored."""
    outbox.add_report(db, AttemptId(attempt_id), kind, body or {}, NOW_MS, BOOT, TaskId("t"))


def due(db: sqlite3.Connection, now_ns: int = 0, limit: int = 100) -> list[Report]:
    """The reports that are due."""
    return outbox.due_reports(db, now_ns, limit)[0]


def run_unit(db: sqlite3.Connection, *batch: Any) -> list[Any]:
    """The units as one batch; raises the first refusal after all have run."""
    results = run_batch(db, batch)
    for result in results:
        if isinstance(result, Failed):
            raise result.error
    return results


def dump(db: sqlite3.Connection) -> dict[str, list[tuple[Any, ...]]]:
    """Everything that the database holds, for `nothing was changed`."""
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND sql <> ''")]
    return {table: [tuple(row) for row in db.execute(f"SELECT * FROM {table}")] for table in tables}
