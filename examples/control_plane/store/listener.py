"""LISTEN and NOTIFY: what planes on one PostgreSQL tell each other, over a connection of its own that comes back.

NOTIFY is not part of the transaction that has something to tell: there it would make commits queue up behind each
other. So a notice can be lost, with its plane or with a connection. What may have been lost is made up for by hearing
every notice each FALLBACK_POLL_S, and after each new connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol

from control_plane.bell import wait
from control_plane.settings import FALLBACK_POLL_S, POSTGRES_RETRY_MAX_S, POSTGRES_TIMEOUT_S
from control_plane.store.database import Notice
from control_plane.store.server_clock import ServerClock, boottime_s

log = logging.getLogger(__name__)

_CHANNEL: Final = "remotegpu_plane"
_NOTIFY: Final = "SELECT pg_notify($1, $2)"
_TIME: Final = "SELECT extract(epoch FROM clock_timestamp())::float8"
_LOOKS_AT_CLOCK: Final = 4
_RETRY_FIRST_S: Final = 0.1


class Driver(Protocol):
    """What is used of an asyncpg connection."""

    async def add_listener(self, channel: str, callback: Callable[[object, int, str, str], None]) -> None:
        """LISTEN."""
        ...

    def add_termination_listener(self, callback: Callable[[object], None]) -> None:
        """Called when the connection is gone."""
        ...

    async def fetchval(self, query: str, *args: object, timeout: float | None = None) -> Any:
        """The first value of the first row."""
        ...

    def get_server_pid(self) -> int:
        """The process on the server."""
        ...

    def is_closed(self) -> bool:
        """Whether it is gone."""
        ...

    def terminate(self) -> None:
        """Close it without a word."""
        ...


class Listener:
    """One task between `start` and `stop`; it also keeps `clock` right. `connect` opens a connection for it alone."""

    def __init__(self, connect: Callable[[], Awaitable[Driver]], clock: ServerClock) -> None:
        self._connect = connect
        self._clock = clock
        self._hear: Callable[[Notice], None] = lambda _: None
        self._to_tell: set[Notice] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._driver: Driver | None = None

    async def start(self) -> None:
        """Connect and look at the clock; raises what that raises."""
        self._driver = await self._open()
        self._task = asyncio.create_task(self._run(), name="control-plane-listener")

    async def stop(self) -> None:
        """End the task; what is still to be told is lost. Safe to call twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._let_go()  # a task that is cancelled before its first step does nothing at all

    def listen(self, hear: Callable[[Notice], None]) -> None:
        """Call `hear` from now on."""
        self._hear = hear

    def announce(self, notice: Notice) -> None:
        """Tell the others soon."""
        self._to_tell.add(notice)
        self._wake.set()

    async def _run(self) -> None:
        delay_s = _RETRY_FIRST_S
        while True:
            try:
                if self._driver is None:
                    self._driver = await self._open()
                    log.warning("notices of other planes are heard again")
                    self._hear_all()
                delay_s = _RETRY_FIRST_S
                await self._serve(self._driver)
            except Exception as error:  # noqa: BLE001  # the driver's errors have no common root
                log.warning("notices of other planes are not heard: %s: %s", type(error).__name__, error)
            finally:
                self._let_go()
            await asyncio.sleep(delay_s * random.uniform(0.5, 1))
            delay_s = min(2 * delay_s, POSTGRES_RETRY_MAX_S)

    def _let_go(self) -> None:
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.terminate()

    async def _open(self) -> Driver:
        driver = await self._connect()
        try:
            async with asyncio.timeout(POSTGRES_TIMEOUT_S):
                own_pid = driver.get_server_pid()
                driver.add_termination_listener(lambda _: self._wake.set())
                await driver.add_listener(
                    _CHANNEL, lambda _driver, pid, _channel, text: self._heard(text) if pid != own_pid else None
                )
                for _ in range(_LOOKS_AT_CLOCK):
                    await self._look_at_clock(driver)
        except BaseException:
            driver.terminate()
            raise
        return driver

    async def _serve(self, driver: Driver) -> None:
        time_s = asyncio.get_running_loop().time
        poll_at_s = time_s() + FALLBACK_POLL_S
        while not driver.is_closed():
            await wait(self._wake, max(0.0, poll_at_s - time_s()))
            self._wake.clear()
            for notice in list(self._to_tell):
                self._to_tell.discard(notice)
                try:
                    await driver.fetchval(_NOTIFY, _CHANNEL, notice.value, timeout=POSTGRES_TIMEOUT_S)
                except BaseException:
                    self._to_tell.add(notice)
                    raise
            if time_s() >= poll_at_s:
                poll_at_s = time_s() + FALLBACK_POLL_S
                await self._look_at_clock(driver)
                self._hear_all()
        raise ConnectionError("the connection was closed")

    async def _look_at_clock(self, driver: Driver) -> None:
        sent_s = boottime_s()
        server_s: float = await driver.fetchval(_TIME, timeout=POSTGRES_TIMEOUT_S)
        self._clock.observe(sent_s, server_s, boottime_s())

    def _heard(self, text: str) -> None:
        if text in set(Notice):  # a newer plane may tell more
            self._hear(Notice(text))

    def _hear_all(self) -> None:
        for notice in Notice:
            self._hear(notice)
