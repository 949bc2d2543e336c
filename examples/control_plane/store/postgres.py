"""PostgreSQL: a transaction for each unit, on one of a few connections. Any number of planes share the database.

READ COMMITTED: a unit that decides by a row locks it first. What is left is tried again from the unit's beginning:
deadlocks, and rows that another plane put in between a unit's look and its own row.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

from sqlalchemy import Connection, event, func, make_url, select
from sqlalchemy import exc as errors
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from control_plane.settings import (
    POSTGRES_CONNECTIONS,
    POSTGRES_IDLE_TIMEOUT_S,
    POSTGRES_LOCK_TIMEOUT_S,
    POSTGRES_TIMEOUT_S,
    POSTGRES_TRIES_MAX,
    CannotServe,
)
from control_plane.store.database import Notice
from control_plane.store.listener import Driver, Listener
from control_plane.store.server_clock import ServerClock
from control_plane.store.tables import metadata
from remotegpu_schemas.errors import Code, Refused

T = TypeVar("T")

log = logging.getLogger(__name__)

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_TRY_AGAIN: Final = frozenset({
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
    "55P03",  # lock_not_available: lock_timeout
    "23505",  # unique_violation: the row was not there when the unit looked
})  # fmt: skip
_AWAY: Final = frozenset({
    "53300",  # too_many_connections
    "57P01",  # admin_shutdown
    "57P02",  # crash_shutdown
    "57P03",  # cannot_connect_now
    "25P03",  # idle_in_transaction_session_timeout
})  # fmt: skip
_AWAY_CLASS: Final = "08"
_TABLES_LOCK: Final = 0x72656D6F7465  # "remote"
_RETRY_FIRST_S: Final = 0.01


class PostgresDatabase:
    """An open PostgreSQL; made by `open_postgres`."""

    is_shared = True

    def __init__(self, engine: AsyncEngine, listener: Listener, clock: ServerClock) -> None:
        self._engine = engine
        self._listener = listener
        self._clock = clock
        self._is_away = False

    def clock(self) -> float:
        """The server's time."""
        return self._clock()

    async def run(self, unit: Callable[[Connection], T]) -> T:
        """What the unit returns, once it is committed; raises what it raises, with its changes rolled back."""
        for tries_left in range(POSTGRES_TRIES_MAX - 1, -1, -1):
            try:
                async with self._engine.begin() as connection:
                    result = await connection.run_sync(unit)
            except (errors.SQLAlchemyError, OSError, TimeoutError) as error:
                if _is_away(error):
                    raise self._refusal(error) from error
                if not tries_left or _sqlstate(error) not in _TRY_AGAIN:
                    raise
            else:
                self._say(is_away=False)
                return result
            await asyncio.sleep(_RETRY_FIRST_S * 2 ** (POSTGRES_TRIES_MAX - tries_left) * random.random())
        raise AssertionError

    def listen(self, hear: Callable[[Notice], None]) -> None:
        """Call `hear` for what other planes announce."""
        self._listener.listen(hear)

    def announce(self, notice: Notice) -> None:
        """Tell the other planes."""
        self._listener.announce(notice)

    async def close(self) -> None:
        """Close all connections."""
        await self._listener.stop()
        await self._engine.dispose()

    def _refusal(self, error: Exception) -> Refused:
        self._say(is_away=True, why=f"{type(error).__name__}: {error}")
        return Refused(Code.INTERNAL, "the control plane's database cannot be reached; try again")

    def _say(self, *, is_away: bool, why: str = "") -> None:
        """Once for each outage, not for each call in it."""
        if is_away and not self._is_away:
            log.warning("the database cannot be reached: %s", why)
        elif self._is_away and not is_away:
            log.warning("the database is back")
        self._is_away = is_away


async def open_postgres(text: str) -> PostgresDatabase:
    """Connect to the database of this URL; its tables are made if they are missing. Raises CannotServe."""
    url = _url(text)
    shown = url.set(query={}).render_as_string()
    engine = create_async_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_size=POSTGRES_CONNECTIONS,
        max_overflow=0,
        pool_timeout=POSTGRES_TIMEOUT_S,
        connect_args=_connect_args("remotegpu plane"),
    )
    event.listen(engine.sync_engine, "checkout", _check_open)
    clock = ServerClock()
    listener = Listener(lambda: _connect_alone(url), clock)
    try:
        async with engine.begin() as connection:
            await connection.execute(select(func.pg_advisory_xact_lock(_TABLES_LOCK)))
            await connection.run_sync(metadata.create_all)
        await listener.start()
    except Exception as error:
        await engine.dispose()
        if not isinstance(error, errors.SQLAlchemyError | OSError | TimeoutError | ValueError | ImportError):
            raise
        reason = str(getattr(error, "orig", None) or error) or type(error).__name__
        raise CannotServe(
            f"the database {shown} cannot be used: {reason}; check its address, its password and that it runs"
        ) from error
    return PostgresDatabase(engine, listener, clock)


def _url(text: str) -> URL:
    try:
        url = make_url(text)
    except (errors.ArgumentError, ValueError):
        raise CannotServe("the database is no URL such as postgresql://user@host/name") from None
    # libpq's name for it, as it stands in the URLs that people have
    sslmode = url.query.get("sslmode")
    if sslmode is not None:
        url = url.difference_update_query(["sslmode"]).update_query_dict({"ssl": sslmode})
    return url.set(drivername="postgresql+asyncpg")


def _connect_args(name: str) -> dict[str, Any]:
    return {
        "timeout": POSTGRES_TIMEOUT_S,
        "command_timeout": POSTGRES_TIMEOUT_S,
        "server_settings": {
            "application_name": name,
            "lock_timeout": _ms(POSTGRES_LOCK_TIMEOUT_S),
            "idle_in_transaction_session_timeout": _ms(POSTGRES_IDLE_TIMEOUT_S),
        },
    }


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f}ms"


async def _connect_alone(url: URL) -> Driver:
    """A connection that belongs to no pool."""
    engine = create_async_engine(url, poolclass=NullPool, connect_args=_connect_args("remotegpu plane, listening"))
    pooled = await engine.raw_connection()
    driver = cast("Driver", pooled.driver_connection)  # SQLAlchemy cannot say which driver it is
    pooled.detach()  # the engine keeps nothing that would have to be given up
    return driver


def _check_open(connection: Any, _record: object, _proxy: object) -> None:
    """A connection that was lost while nobody used it is replaced without anybody seeing an error."""
    if connection.driver_connection.is_closed():
        raise errors.DisconnectionError


def _sqlstate(error: BaseException) -> str:
    return str(getattr(getattr(error, "orig", None), "sqlstate", None) or "")


def _is_away(error: BaseException) -> bool:
    if isinstance(error, OSError | TimeoutError | errors.TimeoutError | errors.DisconnectionError):
        return True
    if isinstance(error, errors.DBAPIError) and error.connection_invalidated:
        return True
    state = _sqlstate(error)
    return state in _AWAY or state.startswith(_AWAY_CLASS)
