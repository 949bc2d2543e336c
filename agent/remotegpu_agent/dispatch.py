"""Starts what fits, whenever something changed: the loop between the queue's plan and the executor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

from remotegpu_agent.clock import Clock
from remotegpu_agent.executor import Executor
from remotegpu_queue import scheduling, views
from remotegpu_queue.scheduling import Capacity, Plan, Waiting
from remotegpu_queue.store import Store
from remotegpu_schemas.attempt import AttemptId

_LOOK_FIRST: Final = 32
_LOOK_MAX: Final = 32_768
"""Waiting tasks that one decision looks at; those behind them wait behind at least as many others."""


class Dispatcher:
    """Wake it with `changed`; it also wakes by itself when a retry's delay is over. Tells after each decision."""

    def __init__(
        self, store: Store, executor: Executor, clock: Clock, capacity: Capacity, *, on_decided: Callable[[], None]
    ) -> None:
        self._store = store
        self._executor = executor
        self._clock = clock
        self._on_decided = on_decided
        self._changed = asyncio.Event()
        self.capacity = capacity
        self.has_blocked = False
        """Whether a task that could run here waits for capacity: then no other one is asked for."""
        self._reasons: dict[AttemptId, str] = {}

    def changed(self) -> None:
        """Something was added, has ended, or became free."""
        self._changed.set()

    def free(self) -> Capacity:
        """What is free now, not counting what waits."""
        return self.capacity.minus_all(active.resources for active in self._executor.active.values())

    def reason(self, attempt_id: AttemptId) -> str | None:
        """Why a waiting attempt does not run, as of the last decision; nobody decides while all slots are taken."""
        if self.free().slots < 1:
            return f"all {self.capacity.slots} slots are taken (capacity.max_concurrent)"
        return self._reasons.get(attempt_id)

    async def run(self) -> None:
        """Decide for ever."""
        while True:
            self._changed.clear()
            next_ready_ns = await self.decide()
            self._on_decided()
            await self._wait_until(next_ready_ns)

    async def decide(self) -> int | None:
        """One decision: start what fits. Returns when a delay ends (CLOCK_BOOTTIME ns), if one does.

        Looks further down the queue only where those in front neither start nor block the others.
        """
        look = _LOOK_FIRST
        while True:
            if self.free().slots < 1:
                return None  # whoever frees one wakes this loop
            waiting = await self._store.read(partial(views.waiting, limit=look))
            plan, self.has_blocked = self._plan(waiting)
            self._reasons = plan.reasons
            by_id = {item.attempt_id: item for item in waiting}
            for attempt_id in plan.starts:
                item = by_id[attempt_id]
                self._executor.start(attempt_id, item.task_id, item.resources)
            if self.has_blocked or len(waiting) < look or look >= _LOOK_MAX:
                return plan.next_ready_boottime_ns
            look *= 4

    def _plan(self, waiting: list[Waiting]) -> tuple[Plan, bool]:
        """The plan, and whether a task that could run here has to wait for capacity."""
        active, now_ns = self._executor.active, self._clock.boottime_ns()
        waiting = [item for item in waiting if item.attempt_id not in active]
        plan = scheduling.plan(
            waiting,
            self.capacity,
            [run.resources for run in active.values()],
            {run.task_id for run in active.values()},
            now_ns,
        )
        starting = set(plan.starts)
        has_blocked = any(
            item.attempt_id not in starting
            and item.ready_boottime_ns <= now_ns
            and scheduling.never_fits(item.resources, self.capacity) is None
            for item in waiting
        )
        return plan, has_blocked

    async def _wait_until(self, boottime_ns: int | None) -> None:
        timeout_s = None if boottime_ns is None else max(0.0, (boottime_ns - self._clock.boottime_ns()) / 1e9)
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return
