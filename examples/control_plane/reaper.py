"""Ends leases when they are over: sleeps until the next one ends, or until it hears of an earlier one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from sqlalchemy.exc import SQLAlchemyError

from control_plane.bell import wait
from control_plane.store.claims import Reaped

log = logging.getLogger(__name__)

_AFTER_ERROR_S: Final = 1.0


class Reaper:
    """One task between `start` and `stop`. `reap` does a round and says when the next lease ends."""

    def __init__(self, reap: Callable[[], Awaitable[Reaped]], now_ms: Callable[[], int]) -> None:
        self._reap = reap
        self._now_ms = now_ms
        self._wake = asyncio.Event()
        self._next_ms: int | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin with a round."""
        self._task = asyncio.create_task(self._run(), name="control-plane-reaper")

    async def stop(self) -> None:
        """End the task. Safe to call twice."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def expect(self, expires_ms: int) -> None:
        """A lease ends then; matters only if it is the first one to end."""
        if self._next_ms is None or expires_ms < self._next_ms:
            self._wake.set()

    def look_now(self) -> None:
        """Do a round now: the clock was moved."""
        self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                self._next_ms = (await self._reap()).next_expiry_ms
            except SQLAlchemyError:
                log.exception("leases could not be ended; trying again in %g s", _AFTER_ERROR_S)
                self._next_ms = self._now_ms() + int(_AFTER_ERROR_S * 1000)
            timeout_s = None if self._next_ms is None else max(0.0, (self._next_ms - self._now_ms() + 1) / 1000)
            await wait(self._wake, timeout_s)
