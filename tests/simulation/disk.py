"""The disk of a simulated host: the real schema on an inline sqlite3 connection, slow, full, or in order.

What a transaction has committed survives everything; whoever dies between the commit and its answer does not know.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from remotegpu_queue.store import migrate
from tests.simulation.timeline import Timeline

if TYPE_CHECKING:
    from pathlib import Path

    from tests.simulation.machine import Process

T = TypeVar("T")
Moved = Callable[[str, str, str | None, str], None]
"""Is told of each change of a state: table, attempt id, from, to."""

_TRIGGERS = [
    f"""CREATE TEMP TRIGGER {table}_{verb} AFTER {event} ON {table} {when}
    BEGIN SELECT moved('{table}', new.attempt_id, {old}, new.state); END"""
    for table in ("attempts", "runs")
    for verb, event, when, old in (
        ("inserted", "INSERT", "", "NULL"),
        ("updated", "UPDATE OF state", "WHEN old.state <> new.state", "old.state"),
    )
]


class Disk:
    """One database. Made once and used for many schedules, since SQLite keeps what it has compiled."""

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(":memory:", isolation_level=None, cached_statements=256)
        self.db.row_factory = sqlite3.Row
        self.db.execute("PRAGMA foreign_keys = ON")
        migrate(self.db, path)
        self._moved: Moved = lambda *_: None
        self.db.create_function("moved", 4, self._tell, deterministic=False)
        for trigger in _TRIGGERS:
            self.db.execute(trigger)
        self.is_full = False
        self.slowness_s = 0.0
        self.commits = 0

    def _tell(self, table: str, attempt_id: str, before: str | None, after: str) -> None:
        """Called by SQLite, for whichever schedule it is."""
        self._moved(table, attempt_id, before, after)

    def format(self, moved: Moved) -> None:
        """An empty database for the next schedule."""
        self._moved = moved
        self.is_full, self.slowness_s, self.commits = False, 0.0, 0
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")
        for table in ("outbox", "runs", "labels", "attempts", "meta", "sqlite_sequence"):
            self.db.execute(f"DELETE FROM {table}")

    def write(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run a transaction. Raises as SQLite does when the disk is full."""
        if self.is_full:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        result = function(self.db)
        self.commits += 1
        return result

    def count(self, query: str, *values: object) -> int:
        """The one number that a query gives; for checks."""
        number: int = self.db.execute(query, values).fetchone()[0]
        return number


class DiskExecutor:
    """A thread of an agent process that owns a connection: one function after the other, in the order of the calls."""

    def __init__(self, disk: Disk, process: Process, timeline: Timeline, *, is_reader: bool) -> None:
        self._disk = disk
        self._process = process
        self._timeline = timeline
        self._is_reader = is_reader
        self._free_at_s = 0.0

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run it in a moment; whoever is cancelled meanwhile does not hold it up."""
        done: asyncio.Future[T] = self._process.loop.create_future()
        delay_s = 0.0002 + (0.0005 if self._is_reader else 0.003 + self._disk.slowness_s) * self._timeline.random()
        self._free_at_s = max(self._free_at_s, self._timeline.now_s) + delay_s
        self._timeline.at(self._free_at_s, lambda: self._execute(function, done))
        return await done

    async def close(self) -> None:
        """The connection is the disk's."""

    def _execute(self, function: Callable[[sqlite3.Connection], T], done: asyncio.Future[T]) -> None:
        process = self._process
        if not process.is_alive:
            return
        if process.loop.is_frozen:
            process.when_thawed(lambda: self._execute(function, done))
            return
        try:
            if self._is_reader:
                result = function(self._disk.db)
            else:
                result = self._disk.write(function)
                process.machine.reached("commit")
        except Exception as error:  # noqa: BLE001 - whatever a thread raises goes to who waits for it
            process.settle(done, error=error)
        else:
            process.settle(done, result)
