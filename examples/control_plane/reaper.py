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
from remotegpu_schemas.errors import Refused

log = logging.getLogger(__name__)

_AFTER_ERROR_S: Final = 1.0


class Reaper:
    """One task between `start` and `stop`. `reap` does a round and says when the next lease ends.

    With `look_again_s` rounds are no further apart: others may give leases too, of which this one does not hear.
    """

    def __init__(
        self, reap: Callable[[], Awaitable[Reaped]], now_ms: Callable[[], int], look_again_s: float | None = None
    ) -> None:
        self._reap = reap
        self._now_ms = now_ms
        self._look_again_s = look_again_s
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
            except Refused:
                self._next_ms = self._after_error_ms()  # the database is away, which it has said itself
            except SQLAlchemyError:
                log.exception("leases could not be ended; trying again in %g s", _AFTER_ERROR_S)
                self._next_ms = self._after_error_ms()
            await wait(self._wake, self._sleep_s())

    def _after_error_ms(self) -> int:
        return self._now_ms() + int(_AFTER_ERROR_S * 1000)

    def _sleep_s(self) -> float | None:
        if self._next_ms is None:
            return self._look_again_s
        left_s = max(0.0, (self._next_ms - self._now_ms() + 1) / 1000)
        return left_s if self._look_again_s is None else min(left_s, self._look_again_s)
