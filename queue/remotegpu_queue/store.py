"""The database: opening, migrating, locking, and one writer that commits whatever waits as one transaction.

The only importer of aiosqlite. Knows nothing of tasks: what is read and written are the units of `units.py`,
plain functions on a sqlite3 connection, so that the simulator can run the same SQL on an inline connection.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar

import aiosqlite

from remotegpu_schemas import limits
from remotegpu_schemas.errors import AgentError, Misconfigured, Permanent, Retryable

T = TypeVar("T")
Unit = Callable[[sqlite3.Connection], T]

_BUSY_TIMEOUT_MS: Final = 30_000
_PRAGMAS: Final = (
    f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = FULL",
    "PRAGMA foreign_keys = ON",
)


class LostRace(AgentError):
    """The row was no longer in the state that the change expected; nothing was changed."""


class StoreUnavailable(Retryable):
    """The database cannot be written now (disk full, read-only, locked, I/O error); the message says which."""


class Executor(Protocol):
    """Runs functions on one sqlite3 connection, one after the other."""

    async def run(self, function: Unit[T]) -> T:
        """Run `function` with the connection and return what it returns."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class ThreadExecutor(aiosqlite.Connection):
    """A connection in a thread of its own: one hop per call, however many statements the function runs.

    (aiosqlite's public calls hop once per statement; a task's way through the store has about thirty.)
    """

    async def run(self, function: Unit[T]) -> T:
        """Run `function` in the connection's thread."""
        result: T = await self._execute(function, self._conn)  # type: ignore[no-untyped-call]  # aiosqlite leaves it so
        return result


def _connect(path: Path, *, is_reader: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, cached_statements=256)
    connection.row_factory = sqlite3.Row
    for pragma in _PRAGMAS if not is_reader else (_PRAGMAS[0], "PRAGMA query_only = ON"):
        connection.execute(pragma)
    return connection


async def thread_executor(path: Path, *, is_reader: bool = False) -> ThreadExecutor:
    """Open `path` in a thread; the one executor of the running agent."""
    executor = ThreadExecutor(lambda: _connect(path, is_reader=is_reader), iter_chunk_size=64)
    executor._thread.daemon = True  # a wedged disk must not keep the process from ending
    await executor
    return executor


@dataclass
class _Waiting:
    unit: Unit[Any]
    done: asyncio.Future[Any] = field(repr=False)


class Store:
    """The open database. `write` returns when the unit is on disk; `read` sees only what is committed.

    Units must be safe to run again from a rolled back savepoint and must not keep the connection.
    """

    def __init__(self, writer: Executor, reader: Executor, lock_fd: int | None = None) -> None:
        self._writer = writer
        self._reader = reader
        self._lock_fd = lock_fd
        self._queue: asyncio.Queue[_Waiting | None] = asyncio.Queue(limits.STORE_QUEUE_MAX_UNITS)
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    @classmethod
    async def open(cls, state_dir: Path) -> Self:
        """Open `<state_dir>/queue.db`, migrated, for this process alone.

        Raises Misconfigured: the directory cannot be written, another agent has it, or the database is newer than
        this program.
        """
        path = state_dir / "queue.db"
        lock_fd = lock_state_dir(state_dir)
        try:
            writer = await thread_executor(path)
            try:
                await writer.run(lambda db: migrate(db, path))
                reader = await thread_executor(path, is_reader=True)
            except BaseException:
                await writer.close()
                raise
        except sqlite3.Error as error:
            os.close(lock_fd)
            raise Misconfigured(f"cannot open the database {path}: {error}; check its owner, mode and disk") from error
        except BaseException:
            os.close(lock_fd)
            raise
        os.chmod(path, 0o600)
        store = cls(writer, reader, lock_fd)
        store.start()
        return store

    def start(self) -> None:
        """Start the writer; `open` does it, the simulator calls it on its own executors."""
        self._task = asyncio.create_task(self._write_loop(), name="store-writer")

    async def close(self) -> None:
        """Commit what waits, then close. Safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        await self._queue.put(None)
        if self._task is not None:
            await self._task
        await self._reader.close()
        await self._writer.close()
        if self._lock_fd is not None:
            os.close(self._lock_fd)

    async def write(self, unit: Unit[T]) -> T:
        """Run the unit in the next transaction; on return it is on disk.

        Raises what the unit raises (only its own changes are rolled back), or StoreUnavailable. If the caller is
        cancelled the unit may still be committed.
        """
        return await asyncio.shield(await self.enqueue(unit))

    async def enqueue(self, unit: Unit[T]) -> asyncio.Future[T]:
        """As `write`, but return the future; units are committed in the order of these calls."""
        if self._is_closed:
            raise StoreUnavailable("the store is closed")
        waiting = _Waiting(unit, asyncio.get_running_loop().create_future())
        await self._queue.put(waiting)
        return waiting.done

    async def read(self, query: Unit[T]) -> T:
        """Run a query on the reader. Raises StoreUnavailable."""
        try:
            return await self._reader.run(query)
        except (sqlite3.OperationalError, sqlite3.DatabaseError, ValueError) as error:
            raise StoreUnavailable(f"the database cannot be read: {error}") from error

    async def _write_loop(self) -> None:
        is_last = False
        while not is_last:
            first = await self._queue.get()
            batch: list[_Waiting] = []
            item: _Waiting | None = first
            while True:
                if item is None:
                    is_last = True
                    break
                batch.append(item)
                if len(batch) >= limits.STORE_BATCH_MAX_UNITS or self._queue.empty():
                    break
                item = self._queue.get_nowait()
            if batch:
                await self._commit(batch)

    async def _commit(self, batch: Sequence[_Waiting]) -> None:
        units = [waiting.unit for waiting in batch]
        try:
            results = await self._writer.run(lambda db: run_batch(db, units))
        except Exception as error:
            refusal = StoreUnavailable(f"the database cannot be written: {error}")
            refusal.__cause__ = error
            results = [refusal] * len(batch)
        for waiting, result in zip(batch, results, strict=True):
            if waiting.done.cancelled():
                continue
            if isinstance(result, Failed):
                waiting.done.set_exception(result.error)
            elif isinstance(result, StoreUnavailable):
                waiting.done.set_exception(result)
            else:
                waiting.done.set_result(result)


@dataclass(frozen=True)
class Failed:
    """A unit's own exception, with its changes rolled back."""

    error: Exception


def run_batch(db: sqlite3.Connection, units: Sequence[Unit[Any]]) -> list[Any]:
    """Run the units in one transaction, each in a savepoint, and commit; a failed one gives a `Failed`.

    Raises sqlite3.Error when nothing was committed.
    """
    results: list[Any] = []
    db.execute("BEGIN IMMEDIATE")
    try:
        for unit in units:
            db.execute("SAVEPOINT unit")
            try:
                results.append(unit(db))
            except Exception as error:
                if not db.in_transaction:  # disk full and I/O errors roll everything back
                    raise
                db.execute("ROLLBACK TO unit")
                results.append(Failed(error))
            db.execute("RELEASE unit")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return results


def lock_state_dir(state_dir: Path) -> int:
    """Make the directory (0711) and lock it for this process; the lock is free again when the descriptor closes.

    Raises Misconfigured with what to do.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        os.chmod(state_dir, 0o711)
        lock_fd = os.open(state_dir / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Misconfigured(
            f"the state directory {state_dir} cannot be written: {error.strerror}; "
            "create it for the agent's user, or set agent.state_dir"
        ) from error
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock_fd)
        raise Misconfigured(
            f"another agent is running on the state directory {state_dir}; stop it, or set another agent.state_dir"
        ) from None
    return lock_fd


def migrations() -> list[str]:
    """The scripts `sql/migrations/NNN.sql`, in order; the n-th brings `PRAGMA user_version` to n."""
    folder = resources.files("remotegpu_queue") / "sql" / "migrations"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql"))
    return [(folder / name).read_text("utf-8") for name in names]


def migrate(db: sqlite3.Connection, path: Path) -> None:
    """Bring the database to this program's version: each step in a transaction, a backup before the first.

    Raises Misconfigured for a database that a newer program wrote.
    """
    scripts = migrations()
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(scripts):
        raise Misconfigured(
            f"the database {path} has version {version}, this program knows up to {len(scripts)}; "
            "start the newer remotegpu-agent, or restore the backup that it made"
        )
    if 0 < version < len(scripts):
        _back_up(db, path.with_name(f"{path.name}.before-v{len(scripts)}"))
    for number, script in enumerate(scripts[version:], start=version + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in split_statements(script):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {number}")
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise


def _back_up(db: sqlite3.Connection, target: Path) -> None:
    with sqlite3.connect(target) as copy:
        db.backup(copy)
    copy.close()
    os.chmod(target, 0o600)


def split_statements(script: str) -> list[str]:
    """The statements of a script, by SQLite's own notion of where one ends (`executescript` would commit first)."""
    statements, current = [], ""
    for line in script.splitlines(keepends=True):
        current += line
        if sqlite3.complete_statement(current):
            statements.append(current.strip())
            current = ""
    if current.strip() and any(line.strip() and not line.strip().startswith("--") for line in current.splitlines()):
        raise Permanent("the last statement of the script is incomplete")
    return statements
