"""Starts what fits, whenever something changed: the loop between the queue's plan and the executor."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Protocol

from remotegpu_agent.clock import Clock
from remotegpu_agent.executor import Executor
from remotegpu_queue import outbox, scheduling, views
from remotegpu_queue.rows import Attempt
from remotegpu_queue.scheduling import Capacity, Waiting
from remotegpu_queue.store import Store
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId


class Holds(Protocol):
    """Says why a waiting task may not start, whatever is free; None if it may."""

    def __call__(self, *, is_local: bool) -> str | None: ...


class Dispatcher:
    """Wake it with `changed`; it also wakes by itself when a retry's delay is over. Tells after each decision."""

    def __init__(
        self,
        store: Store,
        executor: Executor,
        clock: Clock,
        capacity: Capacity,
        *,
        holds_start: Holds,
        on_decided: Callable[[], None],
    ) -> None:
        self._store = store
        self._executor = executor
        self._clock = clock
        self._holds_start = holds_start
        self._on_decided = on_decided
        self._changed = asyncio.Event()
        self.capacity = capacity
        self.has_blocked = False
        """Whether a task that could run here waits for capacity: then no other one is asked for."""
        self.is_outbox_full = False
        """Whether so many reports wait that nothing may be claimed whose result would find no place."""
        self._reasons: dict[AttemptId, str] = {}

    def changed(self) -> None:
        """Something was added, has ended, or became free."""
        self._changed.set()

    def free(self) -> Capacity:
        """What is free now, not counting what waits."""
        return self.capacity.minus_all(active.resources for active in self._executor.active.values())

    def reason(self, attempt: Attempt) -> str:
        """Why a waiting attempt does not run now."""
        wait_ns = attempt.ready_boottime_ns - self._clock.boottime_ns()
        if wait_ns > 0:
            return scheduling.delayed(wait_ns)
        impossible = scheduling.never_fits(attempt.task.resources, self.capacity)
        if impossible is not None:
            return impossible
        held = self._holds_start(is_local=attempt.origin == "local")
        if held is not None:
            return held
        if self.free().slots < 1:
            return f"all {self.capacity.slots} slots are taken (capacity.max_concurrent)"
        return self._reasons.get(attempt.attempt_id) or "waits behind tasks that are more urgent or older"

    async def run(self) -> None:
        """Decide for ever."""
        while True:
            self._changed.clear()
            next_ready_ns = await self.decide()
            self._on_decided()
            await self._wait_until(next_ready_ns)

    async def decide(self) -> int | None:
        """One decision: start what fits. Returns when a delay ends (CLOCK_BOOTTIME ns), if one does."""
        if self.free().slots < 1:
            if self.is_outbox_full:  # what the host says of itself must not wait for a slot
                self.is_outbox_full = await self._store.read(outbox.is_full)
            return None  # whoever frees one wakes this loop
        now_ns, limit = self._clock.boottime_ns(), self.capacity.slots + limits.QUEUE_LOOK_AHEAD

        def look(db: sqlite3.Connection) -> tuple[list[Waiting], int | None, bool]:
            found = views.waiting(db, limit, now_ns=now_ns, total=self.capacity)
            return found, views.next_ready_boottime_ns(db, now_ns), outbox.is_full(db)

        found, next_ready_ns, self.is_outbox_full = await self._store.read(look)
        active = self._executor.active
        live = {run.task_id for run in active.values()}
        waiting = {
            item.attempt_id: item
            for item in found
            if item.attempt_id not in active and self._holds_start(is_local=item.is_local) is None
        }
        plan = scheduling.plan(
            waiting.values(),
            self.capacity,
            [run.resources for run in active.values()],
            live,
            now_ns,
        )
        self._reasons = plan.reasons
        settled = {*plan.starts, *(item.attempt_id for item in waiting.values() if item.task_id in live)}
        self.has_blocked = len(settled) < len(waiting)
        for attempt_id in plan.starts:
            item = waiting[attempt_id]
            self._executor.start(attempt_id, item.task_id, item.resources)
        return next_ready_ns

    async def _wait_until(self, boottime_ns: int | None) -> None:
        timeout_s = None if boottime_ns is None else max(0.0, (boottime_ns - self._clock.boottime_ns()) / 1e9)
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return
