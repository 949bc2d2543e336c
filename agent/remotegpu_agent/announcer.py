"""Tells waiters inside the agent that something changed; the reason that nothing polls the database."""

from __future__ import annotations

import asyncio
from collections import defaultdict

from remotegpu_schemas.task import TaskId


class Announcer:
    """Starts and ends of runs, for those who wait for one. Announcing to nobody is free; nothing is remembered."""

    def __init__(self) -> None:
        self._waiters: defaultdict[TaskId, set[asyncio.Future[None]]] = defaultdict(set)

    def listen(self, task_id: TaskId) -> asyncio.Future[None]:
        """A future that is done at the next announcement. Take it *before* the state is read, cancel it after use."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[task_id].add(future)
        future.add_done_callback(lambda done: self._forget(task_id, done))
        return future

    def announce(self, task_id: TaskId) -> None:
        """Wake all who listen for this task."""
        for future in list(self._waiters.get(task_id, ())):
            if not future.done():
                future.set_result(None)

    def _forget(self, task_id: TaskId, future: asyncio.Future[None]) -> None:
        waiters = self._waiters.get(task_id)
        if waiters is not None:
            waiters.discard(future)
            if not waiters:
                del self._waiters[task_id]
