"""Virtual time: one line of events, and on it any number of event loops, each that of one simulated process.

Deterministic: what happens next depends on the seed alone. Between loops that could go on at the same moment, and
between timers that are due at the same moment, the seed chooses; within one loop callbacks keep their order, as asyncio
promises. A frozen loop keeps what it has to do; a dead one does nothing any more.
"""

from __future__ import annotations

import asyncio
import heapq
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Executor
from contextvars import Context
from random import Random
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Timer:
    """Something of the world's own that is due; `cancel` takes it back."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        """Never mind. Safe to repeat."""
        self.callback = None


class Timeline:
    """The time, in seconds from the schedule's begin, and what is due on it."""

    def __init__(self, random: Random) -> None:
        self.now_s = 0.0
        self.steps = 0
        self.random = random.random
        self._due: list[tuple[float, float, int, VirtualLoop | None, Any]] = []
        self._count = 0
        self._runnable: list[VirtualLoop] = []

    def at(self, when_s: float, callback: Callable[[], object]) -> Timer:
        """Call back at a time that has not passed."""
        timer = Timer(callback)
        self.push(when_s, None, timer)
        return timer

    def after(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        """Call back after a while."""
        return self.at(self.now_s + delay_s, callback)

    def push(self, when_s: float, loop: VirtualLoop | None, item: Timer | asyncio.TimerHandle) -> None:
        """Put a timer on the line; one of a loop is run by it."""
        self._count += 1
        heapq.heappush(self._due, (when_s, self.random(), self._count, loop, item))

    def is_runnable(self, loop: VirtualLoop) -> None:
        """The loop has something to do."""
        self._runnable.append(loop)

    def is_not_runnable(self, loop: VirtualLoop) -> None:
        """It has not, or may not."""
        if loop in self._runnable:
            self._runnable.remove(loop)

    def step(self) -> bool:
        """Do the next thing. False when nothing will ever happen any more."""
        self.steps += 1
        runnable = self._runnable
        if runnable:
            loop = runnable[0] if len(runnable) == 1 else runnable[int(self.random() * len(runnable))]
            loop.run_one()
            return True
        if not self._due:
            return False
        when_s, _, _, owner, item = heapq.heappop(self._due)
        self.now_s = max(self.now_s, when_s)
        if owner is not None:
            owner.is_due(item)
        elif item.callback is not None:
            item.callback()
        return True


class VirtualLoop(asyncio.AbstractEventLoop):
    """The loop of one process, as far as the agent needs one: callbacks, timers, tasks, futures and "threads"."""

    def __init__(self, timeline: Timeline, on_fault: Callable[[str], None]) -> None:
        self._timeline = timeline
        self._on_fault = on_fault
        self._ready: deque[asyncio.Handle] = deque()
        self._tasks: list[asyncio.Task[Any]] = []
        self.is_frozen = False
        self.is_dead = False
        self.steps_left: int | None = None
        """After so many callbacks `on_spent` is called: a kill at any await."""
        self.on_spent: Callable[[], None] = lambda: None

    # --- what the timeline calls ---

    def run_one(self) -> None:
        """Run the next callback."""
        ready = self._ready
        handle = ready.popleft()
        if not ready:
            self._timeline.is_not_runnable(self)
        if handle.cancelled():
            return
        if events._get_running_loop() is not self:
            events._set_running_loop(self)
        handle._run()
        if self.steps_left is not None:
            self.steps_left -= 1
            if self.steps_left <= 0:
                self.steps_left = None
                self.on_spent()

    def is_due(self, handle: asyncio.TimerHandle) -> None:
        """A timer's time has come."""
        if not handle.cancelled():
            self._add(handle)

    def _add(self, handle: asyncio.Handle) -> None:
        if self.is_dead:
            return
        if not self._ready and not self.is_frozen:
            self._timeline.is_runnable(self)
        self._ready.append(handle)

    def freeze(self) -> None:
        """SIGSTOP."""
        self.is_frozen = True
        self._timeline.is_not_runnable(self)

    def thaw(self) -> None:
        """SIGCONT."""
        self.is_frozen = False
        if self._ready and not self.is_dead:
            self._timeline.is_runnable(self)

    def kill(self) -> None:
        """SIGKILL: no callback runs any more, no cleanup either."""
        self.is_dead = True
        self._timeline.is_not_runnable(self)

    def unwind(self, steps_max: int) -> None:
        """After the schedule: let the coroutines of this loop end, without the world."""
        self.is_dead = self.is_frozen = False
        self.steps_left = None
        tasks = [task for task in self._tasks if not task.done()]
        for task in tasks:
            task.cancel()
        self._timeline.is_not_runnable(self)
        while self._ready and steps_max > 0:
            steps_max -= 1
            self.run_one()
        self.kill()
        events._set_running_loop(None)
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is left as a killed process leaves it

    # --- what asyncio calls ---

    def time(self) -> float:
        """The timeline's time."""
        return self._timeline.now_s

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Behind what is ready."""
        handle = asyncio.Handle(callback, args, self, context)
        self._add(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """There are no threads."""
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """After a while."""
        return self.call_at(self._timeline.now_s + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """At a time of the timeline."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._timeline.push(when, self, handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is left on the line, and passed over."""

    def create_future(self) -> asyncio.Future[Any]:
        """A future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: object = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        """A task of this loop."""
        task = asyncio.Task(coro, loop=self, name=str(name) if name is not None else None, context=context)
        self._tasks.append(task)
        return task

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """A thread that takes a millisecond or two; what it does happens at once."""
        done: asyncio.Future[T] = self.create_future()

        def work() -> None:
            if done.done():
                return
            try:
                done.set_result(func(*args))
            except Exception as error:  # noqa: BLE001 - whatever a thread raises goes to who waits for it
                done.set_exception(error)

        self.call_later(0.001 + 0.001 * self._timeline.random(), work)
        return done

    def get_debug(self) -> bool:
        """No."""
        return False

    def is_running(self) -> bool:
        """For whoever asks from inside."""
        return True

    def is_closed(self) -> bool:
        """Never: a killed process closes nothing."""
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """An exception that nobody has taken is a fault of the program."""
        if not self.is_dead:
            self._on_fault(f"{context.get('message')}: {context.get('exception')!r}")
