"""What is done to the database as a whole: which finished tasks may be forgotten, checks, backups.

A task is forgotten only when all of its attempts have ended and nothing of it waits for delivery, dead letters among
that. Plain functions on a sqlite3 connection, as `units.py`; `check` and `back_up` bring their own.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from remotegpu_queue import damage
from remotegpu_queue.queries import SQL
from remotegpu_queue.rows import one
from remotegpu_schemas.attempt import AttemptId, RunNo
from remotegpu_schemas.task import TaskId

_PROBLEMS_MAX: Final = 20
_TABLES: Final = ("attempts", "runs", "outbox")


@dataclass(frozen=True)
class Finished:
    """A task that may be forgotten, and the runs that it had."""

    task_id: TaskId
    ended_at_ms: int
    runs: tuple[tuple[AttemptId, RunNo], ...]


def finished_before(db: sqlite3.Connection, before_ms: int, limit: int) -> list[Finished]:
    """The tasks that ended first, before a time, and may be forgotten."""
    rows = db.execute(SQL["finished_before"], {"before_ms": before_ms, "limit": limit}).fetchall()
    return [_finished(db, row) for row in rows]


def finished_newest_first(
    db: sqlite3.Connection, below: tuple[int, int] | None, limit: int
) -> tuple[list[Finished], tuple[int, int] | None]:
    """A page of the tasks that may be forgotten, and where the next one begins (None: there is none)."""
    ended_at_ms, seq = below or (2**63 - 1, 2**63 - 1)
    values = {"ended_at_ms": ended_at_ms, "seq": seq, "limit": limit}
    rows = db.execute(SQL["finished_newest_first"], values).fetchall()
    found = [_finished(db, row) for row in rows if may_be_forgotten(db, TaskId(row["task_id"]))]
    return found, (rows[-1]["ended_at_ms"], rows[-1]["seq"]) if len(rows) == limit else None


def _finished(db: sqlite3.Connection, row: sqlite3.Row) -> Finished:
    runs = db.execute(SQL["runs_of_task"], {"task_id": row["task_id"]}).fetchall()
    keys = tuple((AttemptId(run["attempt_id"]), RunNo(run["run_no"])) for run in runs)
    return Finished(TaskId(row["task_id"]), row["ended_at_ms"], keys)


def may_be_forgotten(db: sqlite3.Connection, task_id: TaskId) -> bool:
    """Whether nothing of the task lives, waits, or is still to be told."""
    return one(db, "is_still_needed", {"task_id": task_id}) is None


def forget(db: sqlite3.Connection, task_id: TaskId) -> bool:
    """Forget a task with its attempts, runs and labels; False if it is needed (again). Safe to repeat."""
    if not may_be_forgotten(db, task_id):
        return False
    return db.execute(SQL["forget_task"], {"task_id": task_id}).rowcount > 0


def unknown_tasks(db: sqlite3.Connection, task_ids: list[str]) -> list[str]:
    """Those of these names that no attempt has."""
    return [task_id for task_id in task_ids if one(db, "task_is_taken", {"task_id": task_id}) is None]


# --- the whole file ---


@dataclass(frozen=True)
class Health:
    """What a check has found; `problems` is empty for a sound database."""

    version: int
    problems: tuple[str, ...]
    rows: dict[str, int]


def check(path: Path) -> Health:
    """Look at every page, index and reference; a running agent goes on meanwhile. Raises sqlite3.Error, OSError.

    What is found makes the next start of the agent look as closely.
    """
    problems: list[str] = []
    rows: dict[str, int] = {}
    with _reading(path) as db:
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        try:
            found = db.execute(f"PRAGMA integrity_check({_PROBLEMS_MAX})").fetchall()
            problems += [str(row[0]) for row in found if row[0] != "ok"]
            orphans = db.execute("PRAGMA foreign_key_check").fetchmany(_PROBLEMS_MAX)
            problems += [f"a row of {row[0]} belongs to none of {row[2]}" for row in orphans]
            for table in _TABLES:
                rows[table] = db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608 - a constant
        except sqlite3.Error as error:
            if not damage.is_damage(error):
                raise
            problems.append(str(error))
    if problems:
        with contextlib.suppress(OSError):
            damage.suspect_path(path).touch(mode=0o600)
    return Health(version, tuple(problems), rows)


def back_up(path: Path, target: Path) -> int:
    """Copy the database as it is at one moment, a running agent's too; returns the copy's size in bytes.

    The name appears only when the copy is whole and on disk, mode 0600. Raises FileExistsError, sqlite3.Error, OSError.
    """
    if os.path.lexists(target):
        raise FileExistsError(target)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        with _reading(path) as db, contextlib.closing(sqlite3.connect(part)) as copy:
            db.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")  # one file, not three
            found = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(f"the copy is damaged, as the database may be: {found}")
        _sync(part)
        os.link(part, target)  # unlike a rename it never replaces
        size = target.stat().st_size
    finally:
        part.unlink(missing_ok=True)
    _sync(target.parent)
    return size


@contextlib.contextmanager
def _reading(path: Path) -> Generator[sqlite3.Connection]:
    if not path.exists():
        raise FileNotFoundError(f"there is no database {path}")
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)) as db:
        yield db


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
