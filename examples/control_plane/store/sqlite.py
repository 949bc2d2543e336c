"""SQLite: one thread, one connection, and whatever waits is committed as one transaction.

A commit per batch is what makes small tasks cheap; a unit that fails rolls the batch back, and each of its units is
then run alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool

from control_plane.settings import CannotServe
from control_plane.store.database import Notice
from control_plane.store.tables import metadata

T = TypeVar("T")
Unit = Callable[[Connection], T]

_BATCH_MAX_UNITS: Final = 64
_BUSY_TIMEOUT_MS: Final = 5000
_PRAGMAS: Final = (
    f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_MS}",
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",
    "PRAGMA foreign_keys = ON",
)


@dataclass(frozen=True)
class _Waiting:
    unit: Unit[Any]
    done: asyncio.Future[Any]


@dataclass(frozen=True)
class _Failed:
    error: Exception


class SqliteDatabase:
    """An open SQLite database, of one plane alone; made by `open_sqlite`."""

    is_shared = False

    def __init__(self, engine: Engine, connection: Connection, thread: ThreadPoolExecutor) -> None:
        self._engine = engine
        self._connection = connection
        self._thread = thread
        self._waiting: deque[_Waiting] = deque()
        self._batch: asyncio.Future[list[Any]] | None = None

    async def run(self, unit: Unit[T]) -> T:
        """What the unit returns, once it is committed; raises what it raises, with its changes rolled back.

        If the caller is cancelled the unit may still be committed.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(unit, done))
        if self._batch is None:
            self._next_batch()
        return await done

    def clock(self) -> float:
        """This host's time."""
        return time.time()

    def listen(self, hear: Callable[[Notice], None]) -> None:
        """There is nobody to be heard."""

    def announce(self, notice: Notice) -> None:
        """There is nobody to be told."""

    async def close(self) -> None:
        """Finish what waits, then close. Nothing may be run afterwards."""
        while self._batch is not None:
            await asyncio.wait([self._batch])
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    def _next_batch(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), _BATCH_MAX_UNITS))]
        units = [waiting.unit for waiting in batch]
        self._batch = asyncio.get_running_loop().run_in_executor(self._thread, self._commit, units)
        self._batch.add_done_callback(lambda results: self._settle(batch, results.result()))

    def _settle(self, batch: Sequence[_Waiting], results: Sequence[Any]) -> None:
        self._batch = None
        for waiting, result in zip(batch, results, strict=True):
            if waiting.done.done():
                continue
            if isinstance(result, _Failed):
                waiting.done.set_exception(result.error)
            else:
                waiting.done.set_result(result)
        if self._waiting:
            self._next_batch()

    def _commit(self, units: Sequence[Unit[Any]]) -> list[Any]:
        try:
            with self._connection.begin():
                return [unit(self._connection) for unit in units]
        except Exception as error:  # noqa: BLE001  # whatever it is, it goes to the caller of the unit that raised it
            if len(units) == 1:
                return [_Failed(error)]
        return [result for unit in units for result in self._commit([unit])]

    def _close(self) -> None:
        self._connection.close()
        self._engine.dispose()


async def open_sqlite(path: Path) -> SqliteDatabase:
    """Open the file, made with its tables if it is new. Raises CannotServe with what to do."""
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="control-plane-database")
    try:
        engine, connection = await asyncio.get_running_loop().run_in_executor(thread, _connect, path)
    except DBAPIError as error:
        thread.shutdown()
        raise CannotServe(
            f"the database {path} cannot be used: {error.orig}; name a file that can be written, or mend its folder"
        ) from error
    return SqliteDatabase(engine, connection, thread)


def _connect(path: Path) -> tuple[Engine, Connection]:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=StaticPool,
        connect_args={"timeout": _BUSY_TIMEOUT_MS / 1000},
    )
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    connection: Connection | None = None
    try:
        connection = engine.connect()
        with connection.begin():
            metadata.create_all(connection)
    except DBAPIError:
        if connection is not None:
            connection.close()
        engine.dispose()
        raise
    return engine, connection


def _configure(connection: Any, _record: object) -> None:
    """The driver's own implicit transactions are switched off: a unit's reads must lie in its transaction too."""
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in _PRAGMAS:
        cursor.execute(pragma)
    cursor.close()


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
