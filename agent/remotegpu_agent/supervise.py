"""Background loops with an owner: started together, restarted when they fail, cancelled and awaited at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Final

import structlog

log = structlog.get_logger(__name__)

_RESTART_DELAYS_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Loops:
    """Owns the agent's endless loops and its short background jobs."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.failures: dict[str, int] = {}

    def run_forever(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        """Run `loop` until `close`; one that raises is logged, counted, and started again with a growing delay."""
        self._add(self._supervised(name, loop), name)

    def spawn(self, name: str, job: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Run a job once; what it raises is logged with its traceback and counted."""
        return self._add(self._once(name, job), name)

    def _add(self, coroutine: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _once(self, name: str, job: Callable[[], Awaitable[None]]) -> None:
        await self._logged(name, job)

    async def _supervised(self, name: str, loop: Callable[[], Awaitable[None]]) -> None:
        failures = 0
        while not await self._logged(name, loop):
            await asyncio.sleep(_RESTART_DELAYS_S[min(failures, len(_RESTART_DELAYS_S) - 1)])
            failures += 1

    async def _logged(self, name: str, job: Callable[[], Awaitable[None]]) -> bool:
        try:
            await job()
        except Exception:
            self.count_failure(name.partition("-")[0])
            log.exception("a part of the agent failed", part=name)
            return False
        return True

    def count_failure(self, part: str) -> None:
        """Count a failure of a kind of part: `run`, `lease`, `claims`."""
        self.failures[part] = self.failures.get(part, 0) + 1

    async def close(self) -> None:
        """Cancel everything and wait for it, and for what was begun meanwhile."""
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
