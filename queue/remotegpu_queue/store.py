"""The database: opening, migrating, locking, and one writer that commits whatever waits as one transaction.

The only importer of aiosqlite. Knows nothing of tasks: what is read and written are the units of `units.py`,
plain functions on a sqlite3 connection, so that the simulator can run the same SQL on an inline connection.

Long, because opening, locking, migrating and writing guard one connection; damage is found out by `damage.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import fcntl
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeVar

import aiosqlite
import structlog

from remotegpu_queue import damage
from remotegpu_queue.damage import Damaged, SetAside
from remotegpu_schemas import limits
from remotegpu_schemas.errors import AgentError, Misconfigured, Permanent, Retryable

log = structlog.get_logger(__name__)

T = TypeVar("T")
Unit = Callable[[sqlite3.Connection], T]

DATABASE_NAME: Final = "queue.db"
_BUSY_TIMEOUT_MS: Final = 30_000
_INSIST_EVERY_S: Final = 1.0
_LOG_KEPT_MAX_BYTES: Final = 64 * limits.MIB
"""What remains of the write-ahead log after a checkpoint, however long a reader has made it."""
_OUTSIDE_FAULTS: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
    }
)
"""Primary result codes that say something of the disk or the file, not of the statement (sqlite.org/rescode.html)."""


class LostRace(AgentError):
    """The row was no longer in the state that the change expected; nothing was changed."""


class StoreUnavailable(Retryable):
    """The database cannot be written now (disk full, read-only, locked, I/O error); the message says which."""


class StoreDamaged(StoreUnavailable):
    """The database turned out to be damaged: only a new start, which rebuilds it, can mend that."""


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

    def __init__(self, connector: Callable[[], sqlite3.Connection]) -> None:
        super().__init__(connector, iter_chunk_size=64)
        # The interpreter joins aiosqlite's thread at its end: a wedged disk would keep the agent from ending.
        self._thread.daemon = True

    async def run(self, function: Unit[T]) -> T:
        """Run `function` in the connection's thread. Raises StoreUnavailable when it is closed."""
        if not self._running or self._connection is None:
            raise StoreUnavailable("the store is closed")
        result: T = await self._execute(function, self._connection)  # type: ignore[no-untyped-call]  # aiosqlite's
        return result

    async def ended(self) -> None:
        """Wait until the thread has ended, so that it has no more to tell to a loop that may close."""
        await asyncio.to_thread(self._thread.join)


def connect(path: Path, *, is_reader: bool = False, is_alone: bool = False) -> sqlite3.Connection:
    """Open the database with this program's settings. A writer creates the file, readable by its owner only.

    One that `is_alone` needs no room for the log's index, because it lets nobody else in (sqlite.org/wal.html).
    Raises sqlite3.Error, and OSError when the file cannot be created.
    """
    if not is_reader:
        # SQLite gives its -wal and -shm files the mode that the database has when they are made.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        os.chmod(path, 0o600)
    connection = sqlite3.connect(path, isolation_level=None, cached_statements=256)
    try:
        connection.row_factory = sqlite3.Row
        connection.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}")
        if is_reader:
            connection.execute("PRAGMA query_only = ON")
            return connection
        if is_alone:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        mode: str = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise sqlite3.OperationalError(f"the file system does not carry write-ahead logging (journal mode {mode})")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute(f"PRAGMA journal_size_limit = {_LOG_KEPT_MAX_BYTES}")
    except BaseException:
        connection.close()
        raise
    return connection


async def thread_executor(path: Path, *, is_reader: bool = False, is_alone: bool = False) -> ThreadExecutor:
    """Open `path` in a thread; the one executor of the running agent."""
    executor = ThreadExecutor(lambda: connect(path, is_reader=is_reader, is_alone=is_alone))
    try:
        await executor
    except Exception:
        await executor.ended()
        raise
    return executor


@dataclass(frozen=True)
class Failed:
    """A unit's own exception, with its changes rolled back."""

    error: Exception


class _Withdrawn(Exception):
    """Nobody waits for this unit any more."""


class _Waiting:
    """A unit on its way to the writer. Either it is run or it is withdrawn, whichever comes first."""

    def __init__(self, unit: Unit[Any], done: asyncio.Future[Any]) -> None:
        self._unit = unit
        self._turn = [None]  # whoever takes it decides: a list's pop is atomic between threads
        self.done = done

    def run(self, db: sqlite3.Connection) -> Any:
        """The unit, in the writer's thread. Raises what it raises, or _Withdrawn."""
        if not self._take():
            raise _Withdrawn
        return self._unit(db)

    def withdraw(self) -> bool:
        """Take it back; False if it is being run, or has been."""
        return self._take()

    def _take(self) -> bool:
        try:
            self._turn.pop()
        except IndexError:
            return False
        return True


class Store:
    """The open database. `write` returns when the unit is on disk; `read` sees only what is committed.

    Units must be safe to run again from a rolled back savepoint and must not keep the connection.
    """

    def __init__(self, writer: Executor, reader: Executor, lock_fd: int | None = None) -> None:
        self._writer = writer
        self._reader = reader
        self._lock_fd = lock_fd
        self._room = asyncio.Semaphore(limits.STORE_QUEUE_MAX_UNITS)  # first come, first served, unlike asyncio.Queue
        self._queue: deque[_Waiting] = deque()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self._path: Path | None = None
        self.set_aside: SetAside | None = None
        """The damaged database in whose place `open` made a new one."""
        self.is_new = False
        """Whether `open` made the database, so that it knows nothing of what the attempt directories hold."""
        self.damaged = asyncio.Event()
        """Set when damage shows itself while the store is open: only a new start can mend it."""

    @classmethod
    async def open(cls, state_dir: Path) -> Self:
        """Open `<state_dir>/queue.db`, migrated, for this process alone; a damaged one is set aside for a new one.

        Raises Misconfigured: the directory cannot be written, another agent has it, the database cannot be opened, or
        is newer than this program.
        """
        path = state_dir / DATABASE_NAME
        lock_fd = lock_state_dir(state_dir)
        try:
            opened, aside = await _open_or_replace(path)
        except (sqlite3.Error, OSError) as error:
            os.close(lock_fd)
            raise Misconfigured(_cannot_open(path, error)) from error
        except BaseException:
            os.close(lock_fd)
            raise
        store = cls(opened.writer, opened.reader, lock_fd)
        store._path, store.set_aside, store.is_new = path, aside, opened.is_new
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
        self._changed.set()
        async with contextlib.AsyncExitStack() as stack:
            if self._lock_fd is not None:
                stack.callback(os.close, self._lock_fd)
            stack.push_async_callback(self._writer.close)
            if self._reader is not self._writer:
                stack.push_async_callback(self._reader.close)
            if self._task is not None:
                await self._task

    async def write(self, unit: Unit[T], *, patience_s: float | None = None) -> T:
        """Run the unit in the next transaction; on return it is on disk.

        Raises what the unit raises (only its own changes are rolled back), or StoreUnavailable. If the caller is
        cancelled the unit may still be committed; if its patience ends first, it never is.
        """
        if patience_s is None:
            return await asyncio.shield(await self.enqueue(unit))
        busy = StoreUnavailable("the database is busy; a backup may hold its lock", retry_after_s=patience_s)
        give_up_at_s = asyncio.get_running_loop().time() + patience_s
        try:
            async with asyncio.timeout_at(give_up_at_s):
                waiting = await self._queue_up(unit)
        except TimeoutError:
            raise busy from None
        try:
            left_s = give_up_at_s - asyncio.get_running_loop().time()
            done, _ = await asyncio.wait((waiting.done,), timeout=max(0.0, left_s))
        except asyncio.CancelledError:
            waiting.done.add_done_callback(_retrieved)
            raise
        if not done and waiting.withdraw():
            waiting.done.cancel()
            raise busy
        result: T = await asyncio.shield(waiting.done)
        return result

    async def insist(self, unit: Unit[T], what: str) -> T:
        """As `write`, again and again while the database cannot be written: at the start nothing goes on without it."""
        while True:
            try:
                return await self.write(unit)
            except StoreUnavailable as error:
                if isinstance(error, StoreDamaged) or self._is_closed:
                    raise
                log.error("something cannot be stored yet", what=what, error=str(error))
                await asyncio.sleep(_INSIST_EVERY_S)

    async def enqueue(self, unit: Unit[T]) -> asyncio.Future[T]:
        """As `write`, but return the future; units are committed in the order of these calls."""
        return (await self._queue_up(unit)).done

    async def _queue_up(self, unit: Unit[Any]) -> _Waiting:
        if not self._is_closed:
            await self._room.acquire()
        if self._is_closed:  # before, or while there was no room
            self._room.release()
            raise StoreUnavailable("the store is closed")
        waiting = _Waiting(unit, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._changed.set()
        return waiting

    async def read(self, query: Unit[T]) -> T:
        """Run a query on the reader; all its statements see one moment. Raises what it raises, or StoreUnavailable."""
        try:
            return await self._reader.run(lambda db: run_query(db, query))
        except sqlite3.Error as error:
            if not is_outside_fault(error):
                raise
            refusal = _unavailable("read", error)
            self._note_damage(refusal)
            raise refusal from error

    async def _write_loop(self) -> None:
        while self._queue or not self._is_closed:
            if not self._queue:
                self._changed.clear()
                await self._changed.wait()
                continue
            size = min(len(self._queue), limits.STORE_BATCH_MAX_UNITS)
            batch = [self._queue.popleft() for _ in range(size)]
            await self._commit(batch)
            for _ in batch:
                self._room.release()

    async def _commit(self, batch: Sequence[_Waiting]) -> None:
        units = [waiting.run for waiting in batch]
        try:
            results = await self._writer.run(lambda db: run_batch(db, units))
        except Exception as error:  # noqa: BLE001 - nothing was committed; whatever it was, the writer goes on
            refused: Any = Failed(_unavailable("written", error))
            results = [refused] * len(batch)
        for waiting, result in zip(batch, results, strict=True):
            if waiting.done.cancelled():
                continue
            if isinstance(result, Failed):
                self._note_damage(result.error)
                waiting.done.set_exception(result.error)
            else:
                waiting.done.set_result(result)

    def _note_damage(self, error: Exception) -> None:
        if not isinstance(error, StoreDamaged) or self.damaged.is_set():
            return
        log.critical("the database is damaged", error=str(error))
        if self._path is not None:
            with contextlib.suppress(OSError):  # then the log that an unclean stop leaves says the same
                damage.suspect_path(self._path).touch(mode=0o600)
        self.damaged.set()


@dataclass(frozen=True)
class _Opened:
    """The two connections; one and the same where there is no room for the log's index, which two would share."""

    writer: Executor
    reader: Executor
    is_new: bool


async def _open_or_replace(path: Path) -> tuple[_Opened, SetAside | None]:
    """Open the database; a damaged one is set aside, and a new one opened in its place."""
    try:
        await _examine(path)
        return await _open(path), None
    except (sqlite3.Error, Damaged) as error:
        if not isinstance(error, Damaged) and not damage.is_damage(error):
            raise
        aside = damage.set_aside(path, str(error), datetime.datetime.now(datetime.UTC))
        log.critical("the database is damaged and was set aside", path=str(aside.path), reason=aside.reason)
        return await _open(path), aside


async def _examine(path: Path) -> None:
    try:
        await asyncio.to_thread(damage.examine, path)
    except sqlite3.Error as error:
        if damage.is_damage(error):
            raise
        log.warning("the database cannot be looked at for damage", error=str(error))  # opening it says why


async def _open(path: Path) -> _Opened:
    """The whole of it, and on a full disk what can be had without more room."""
    try:
        return await _connections(path)
    except sqlite3.Error as error:
        if not _is_want_of_room(error):
            raise
        log.error("the database is opened for this process alone: there is no room to share it", error=str(error))
        return await _connections(path, is_alone=True)


async def _connections(path: Path, *, is_alone: bool = False) -> _Opened:
    writer = await thread_executor(path, is_alone=is_alone)
    try:
        is_new = await writer.run(lambda db: _make_ready(db, path))
        reader = writer if is_alone else await thread_executor(path, is_reader=True)
    except BaseException:
        await writer.close()
        raise
    return _Opened(writer, reader, is_new)


def _make_ready(db: sqlite3.Connection, path: Path) -> bool:
    """Migrate. Returns whether the database is new."""
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(migrations()):
        damage.refuse_damage(db, is_thorough=False)  # damage may look like a newer version
    migrate(db, path)
    return version == 0


def _is_want_of_room(error: sqlite3.Error) -> bool:
    """SQLite says I/O error where there is no room for the log's index (SQLITE_IOERR_SHMSIZE)."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}


def _retrieved(done: asyncio.Future[Any]) -> None:
    """Whoever asked is gone; what came of it is nobody's concern."""
    if not done.cancelled():
        done.exception()


def is_outside_fault(error: BaseException) -> bool:
    """Whether an error says that the disk or the file is at fault, so that trying again later may help."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, sqlite3.Error) and code is not None and (code & 0xFF) in _OUTSIDE_FAULTS


def _refusal(error: Exception) -> Exception:
    """What the caller of `write` gets for what its unit raised."""
    if is_outside_fault(error):
        return _unavailable("written", error)
    if isinstance(error, StopIteration):  # a future does not take it
        return RuntimeError("a unit raised StopIteration")
    return error


def _unavailable(verb: str, error: Exception) -> StoreUnavailable:
    kind = StoreDamaged if damage.is_damage(error) else StoreUnavailable
    refusal = kind(f"the database cannot be {verb}: {error}")
    refusal.__cause__ = error
    return refusal


def _cannot_open(path: Path, error: Exception) -> str:
    return f"cannot open the database {path}: {error}; check its owner, mode and disk"


def run_query(db: sqlite3.Connection, query: Unit[T]) -> T:
    """Run a query in a transaction that ends with it."""
    db.execute("BEGIN")
    try:
        return query(db)
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def run_batch(db: sqlite3.Connection, units: Sequence[Unit[Any]]) -> list[Any]:
    """Run the units in one transaction, each in a savepoint, and commit; a failed one gives a `Failed`.

    Raises what went wrong when nothing was committed.
    """
    results: list[Any] = []
    db.execute("BEGIN IMMEDIATE")
    try:
        for unit in units:
            db.execute("SAVEPOINT unit")
            try:
                results.append(unit(db))
            except Exception as error:
                if not db.in_transaction:  # disk full and I/O errors may roll everything back
                    raise
                db.execute("ROLLBACK TO unit")
                results.append(Failed(_refusal(error)))
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

    The backup of version n is `queue.db.before-v<n+1>`. Raises Misconfigured for a database that a newer program wrote.
    """
    scripts = migrations()
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(scripts):
        raise Misconfigured(
            f"the database {path} has version {version}, this program knows up to {len(scripts)}; "
            "start the newer remotegpu-agent, or restore the backup that it made"
        )
    if 0 < version < len(scripts):
        _back_up(db, path.with_name(f"{path.name}.before-v{version + 1}"))
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
    """Copy the database; the name appears only when the copy is whole."""
    part = target.with_name(f"{target.name}.part")
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    with contextlib.closing(sqlite3.connect(part)) as copy:
        db.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, not three
    part.replace(target)


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
