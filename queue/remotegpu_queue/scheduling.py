"""Pure scheduling: waiting tasks and free capacity in, starts and readable reasons out.

Order is priority (1 most urgent), then age. Knows no clock but the `now` it is given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.task import Resources, TaskId

_CPU_TOLERANCE: Final = 1e-6
"""Shares of a CPU are binary fractions: 0.3 - 0.1 - 0.1 is less than 0.1."""


@dataclass(frozen=True)
class Capacity:
    """What a host has, or what is free of it. Memory in MiB."""

    slots: int
    cpus: float
    memory_mb: int
    gpus: int = 0

    def minus(self, need: Resources) -> Capacity:
        """What is left when one more task runs."""
        return Capacity(self.slots - 1, self.cpus - need.cpus, self.memory_mb - need.memory_mb, self.gpus - need.gpus)

    def minus_all(self, needs: Iterable[Resources]) -> Capacity:
        """What is left when all of these run."""
        left = self
        for need in needs:
            left = left.minus(need)
        return left


@dataclass(frozen=True)
class Waiting:
    """A task that is pending or assigned. `ready_boottime_ns` is in the future while a retry's delay lasts."""

    attempt_id: AttemptId
    task_id: TaskId
    priority: int
    seq: int
    resources: Resources
    ready_boottime_ns: int = 0
    is_local: bool = False


@dataclass(frozen=True)
class Plan:
    """`starts` in order; `reasons` for each of the others; `next_ready_boottime_ns` when a delay ends first."""

    starts: tuple[AttemptId, ...]
    reasons: dict[AttemptId, str]
    next_ready_boottime_ns: int | None


def plan(
    waiting: Iterable[Waiting],
    total: Capacity,
    running: Collection[Resources],
    live_tasks: Collection[TaskId],
    now_ns: int,
) -> Plan:
    """Decide what starts now.

    A task that does not fit blocks those behind it, so that small tasks never starve a big one; one that can never
    fit on this host, or that waits for a delay, blocks nobody. `live_tasks` are the tasks with a live process tree:
    no second attempt of them may start.
    """
    free = total.minus_all(running)
    starts: list[AttemptId] = []
    starting: set[TaskId] = set()
    reasons: dict[AttemptId, str] = {}
    next_ready: int | None = None
    blocker: Waiting | None = None
    for item in sorted(waiting, key=lambda item: (item.priority, item.seq)):
        if item.ready_boottime_ns > now_ns:
            next_ready = min(next_ready or item.ready_boottime_ns, item.ready_boottime_ns)
            reasons[item.attempt_id] = delayed(item.ready_boottime_ns - now_ns)
        elif item.task_id in live_tasks or item.task_id in starting:
            reasons[item.attempt_id] = "an older attempt of this task is still being stopped"
        elif impossible := never_fits(item.resources, total):
            reasons[item.attempt_id] = impossible
        elif blocker is not None:
            reasons[item.attempt_id] = f"waits behind task {blocker.task_id}, which is more urgent or older"
        elif lacking := _lacking(item.resources, free):
            blocker = item
            reasons[item.attempt_id] = lacking
        else:
            starts.append(item.attempt_id)
            starting.add(item.task_id)
            free = free.minus(item.resources)
    return Plan(tuple(starts), reasons, next_ready)


def delayed(wait_ns: int) -> str:
    """The reason of a task whose retry's delay ends in so many nanoseconds."""
    return f"waits {wait_ns / 1e9:.0f} s before its next try"


def never_fits(need: Resources, total: Capacity) -> str | None:
    """Why this task can never run on this host, or None."""
    if need.gpus > total.gpus:
        return f"needs {need.gpus} GPUs; this agent manages {total.gpus}"
    if need.cpus > total.cpus + _CPU_TOLERANCE:
        return f"needs {need.cpus:g} CPUs; this host gives {total.cpus:g}"
    if need.memory_mb > total.memory_mb:
        return f"needs {need.memory_mb} MiB of memory; this host gives {total.memory_mb} MiB"
    return None


def _lacking(need: Resources, free: Capacity) -> str | None:
    if free.slots < 1:
        return "all slots are taken (capacity.max_concurrent)"
    if need.gpus > free.gpus:
        return f"needs {need.gpus} GPUs; {free.gpus} are free"
    if need.cpus > free.cpus + _CPU_TOLERANCE:
        return f"needs {need.cpus:g} CPUs; {free.cpus:g} are free"
    if need.memory_mb > free.memory_mb:
        return f"needs {need.memory_mb} MiB of memory; {free.memory_mb} MiB are free"
    return None
