"""What is read: waiting attempts, tasks with their runs, pages and counts. Plain functions on a sqlite3 connection."""

from __future__ import annotations

import functools
import math
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from remotegpu_queue.queries import SQL
from remotegpu_queue.rows import Attempt, Run, attempt_of, one, run_of
from remotegpu_queue.scheduling import Capacity, Waiting
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId, RunNo
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.states import TaskState
from remotegpu_schemas.task import Resources, TaskId

_FAR_NS: Final = 2**63 - 1
_ID: Final = re.compile(limits.ID_PATTERN)


def waiting(
    db: sqlite3.Connection, limit: int, *, now_ns: int | None = None, total: Capacity | None = None
) -> list[Waiting]:
    """The first waiting attempts by priority and age.

    With `now_ns` only those whose delay is over, with `total` only those that this host could ever run: whatever the
    limit, these block nobody.
    """
    values = {
        "limit": limit,
        "now_ns": _FAR_NS if now_ns is None else now_ns,
        "gpus": math.inf if total is None else total.gpus,
        "cpus": math.inf if total is None else total.cpus,
        "memory_gb": math.inf if total is None else total.memory_mb / 1024,
    }
    return [
        Waiting(
            attempt_id=AttemptId(row["attempt_id"]),
            task_id=TaskId(row["task_id"]),
            priority=row["priority"],
            seq=row["seq"],
            resources=_resources(row["gpus"], row["cpus"], row["memory_gb"]),
            ready_boottime_ns=row["ready_boottime_ns"],
            is_local=row["origin"] == "local",
        )
        for row in db.execute(SQL["waiting"], values)
    ]


def count_claimed_waiting(db: sqlite3.Connection) -> int:
    """How many claimed attempts wait for a start or a retry."""
    count: int = one(db, "count_claimed_waiting")[0]
    return count


def next_ready_boottime_ns(db: sqlite3.Connection, now_ns: int) -> int | None:
    """When the next delay of a waiting attempt ends, or None."""
    ready_ns: int | None = one(db, "next_ready", {"now_ns": now_ns})[0]
    return ready_ns


@functools.lru_cache(maxsize=1024)
def _resources(gpus: int, cpus: float, memory_gb: float) -> Resources:
    return Resources(gpus=gpus, cpus=cpus, memory_gb=memory_gb)


def attempt(db: sqlite3.Connection, attempt_id: AttemptId) -> Attempt | None:
    """One attempt, or None."""
    row = one(db, "attempt", {"attempt_id": attempt_id})
    return attempt_of(row) if row is not None else None


def is_local_task(db: sqlite3.Connection, task_id: TaskId) -> bool:
    """Whether a task with this id was submitted here; its directory and its runs have that name."""
    return one(db, "has_local_attempt", {"task_id": task_id}) is not None


def open_attempts(db: sqlite3.Connection) -> list[Attempt]:
    """Leased attempts that have not ended, and whatever has a process."""
    return [attempt_of(row) for row in db.execute(SQL["open_attempts"])]


def run(db: sqlite3.Connection, attempt_id: AttemptId, run_no: RunNo) -> Run | None:
    """One run, or None."""
    row = one(db, "run", {"attempt_id": attempt_id, "run_no": run_no})
    return run_of(row) if row is not None else None


def open_runs(db: sqlite3.Connection) -> list[Run]:
    """Runs that have not ended."""
    return [run_of(row) for row in db.execute(SQL["open_runs"])]


def known_runs(db: sqlite3.Connection, keys: Iterable[tuple[str, int]]) -> frozenset[tuple[str, int]]:
    """Those of the runs, by attempt id and number, that are in the database."""
    return frozenset(key for key in keys if one(db, "run_state", {"attempt_id": key[0], "run_no": key[1]}) is not None)


def ended_runs(db: sqlite3.Connection) -> frozenset[tuple[str, int]]:
    """Attempt id and number of every run that has ended."""
    return frozenset((row["attempt_id"], row["run_no"]) for row in db.execute(SQL["ended_runs"]))


def run_of_pid(db: sqlite3.Connection, pid: int, boot_id: str) -> tuple[Run, TaskId] | None:
    """The last run of this boot whose main process had this number."""
    row = one(db, "run_of_pid", {"pid": pid, "boot_id": boot_id})
    return (run_of(row), TaskId(row["task_id"])) if row is not None else None


def find_task(db: sqlite3.Connection, prefix: str) -> tuple[Attempt, list[Run]]:
    """The latest attempt of the task with this id or unique prefix, and all runs of the task.

    Raises Refused: TASK_NOT_FOUND, INVALID_PARAMETERS (the prefix is not unique).
    """
    if not _ID.fullmatch(prefix):
        raise Refused(Code.TASK_NOT_FOUND, f"there is no task {prefix!r}")
    row = one(db, "latest_attempt", {"task_id": prefix})
    if row is None:
        found = db.execute(SQL["tasks_by_prefix"], {"prefix": prefix, "prefix_end": prefix + "\U0010ffff"}).fetchall()
        if not found:
            raise Refused(Code.TASK_NOT_FOUND, f"there is no task {prefix!r}")
        if len(found) > 1:
            names = ", ".join([item["task_id"] for item in found[:2]] + ["..."] * (len(found) > 2))
            raise Refused(Code.INVALID_PARAMETERS, f"{prefix!r} fits several tasks ({names}); give more of the id")
        row = one(db, "latest_attempt", {"task_id": found[0]["task_id"]})
    runs = [run_of(item) for item in db.execute(SQL["runs_of_task"], {"task_id": row["task_id"]})]
    return attempt_of(row), runs


def list_attempts(
    db: sqlite3.Connection, states: Sequence[TaskState], labels: Mapping[str, str], limit: int, offset: int
) -> tuple[list[tuple[Attempt, Run | None]], int]:
    """One page of tasks (their latest attempts) with the last run, newest first, and how many match in all."""
    where = ["is_latest = 1"]
    values: list[str] = []
    if states:
        where.append(f"state IN ({', '.join('?' * len(states))})")
        values += [str(state) for state in states]
    for key, value in labels.items():
        where.append("seq IN (SELECT l.seq FROM labels l WHERE l.key = ? AND l.value = ?)")
        values += [key, value]
    condition = " AND ".join(where)
    count = f"SELECT count(*) FROM attempts WHERE {condition}"  # noqa: S608 - constants and placeholders only
    total: int = db.execute(count, values).fetchone()[0]
    select = f"SELECT * FROM attempts WHERE {condition} ORDER BY seq DESC LIMIT ? OFFSET ?"  # noqa: S608 - as above
    rows = db.execute(select, [*values, limit, offset]).fetchall()
    page = []
    for row in rows:
        last = one(db, "run", {"attempt_id": row["attempt_id"], "run_no": row["run_no"]})
        page.append((attempt_of(row), run_of(last) if last is not None else None))
    return page, total


@dataclass(frozen=True)
class Counts:
    """Tasks per state (every state named) and reports."""

    by_state: dict[str, int]
    reports_waiting: int
    dead_letters: int


def counts(db: sqlite3.Connection) -> Counts:
    """How many there are of everything."""
    by_state = dict.fromkeys((str(state) for state in TaskState), 0)
    by_state.update({row["state"]: row["n"] for row in db.execute(SQL["count_by_state"])})
    reports = one(db, "count_reports")
    return Counts(by_state, reports["waiting"], reports["dead"])
