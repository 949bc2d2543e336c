"""Where new tasks go: to one machine, to any with some labels, a copy to each, or spread over them.

`broadcast` and `scatter` look at the machines as they are now; a task for any machine with labels is claimed by
whichever matches then.
"""

from __future__ import annotations

import enum
import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from sqlalchemy import Connection, func, select

from control_plane.settings import TASKS_PER_CALL_MAX
from control_plane.store import labels
from control_plane.store.outcomes import Refusal
from control_plane.store.tables import ANY_MACHINE, ID_CHARS, Status, machines, tasks
from control_plane.store.tasks import NewTask
from remotegpu_schemas.errors import Code

_IDS_AT_ONCE: Final = 500
_OPEN: Final = tuple(status for status in Status if not status.is_final)


class Mode(enum.StrEnum):
    """How tasks and machines come together."""

    ANY = "any"
    """Each task runs once, on whichever of the machines claims it."""
    BROADCAST = "broadcast"
    """Each task runs once on each of the machines."""
    SCATTER = "scatter"
    """Each task runs once; the tasks are spread evenly."""


@dataclass(frozen=True)
class Destination:
    """The machines that are meant: those with all of the labels, and of `machine_ids` if it names some."""

    mode: Mode = Mode.ANY
    labels: Mapping[str, str] = field(default_factory=dict)
    machine_ids: tuple[str, ...] = ()


ANYWHERE: Final = Destination()
"""Where its own `machine_id` says, or wherever it is claimed."""


def place(db: Connection, new: Sequence[NewTask], to: Destination, now_ms: int) -> list[NewTask] | Refusal:
    """The tasks with their machines, and copies where each machine gets one (`ID.MACHINE`)."""
    if to == ANYWHERE:
        return list(new)
    for task in new:
        if task.machine_id != ANY_MACHINE:
            return _refused(f"task {task.id} has a machine_id of its own, {task.machine_id}; leave it or 'to' out")
    unknown = _unknown(db, to.machine_ids)
    if unknown is not None:
        return _refused(f"to.machine_ids: there is no machine {unknown}")
    if to.mode is Mode.ANY:
        return _for_any(db, new, to, now_ms)
    found = labels.matching(db, to.labels)
    if to.machine_ids:
        found = [machine_id for machine_id in found if machine_id in set(to.machine_ids)]
    if not found:
        return _refused(f"to: no machine matches {_wanted(to)}; nothing was submitted")
    if to.mode is Mode.SCATTER:
        return _scattered(db, new, found)
    if len(found) * len(new) > TASKS_PER_CALL_MAX:
        return _refused(
            f"to: {len(new)} tasks for {len(found)} machines each; at most {TASKS_PER_CALL_MAX} copies are made at once"
        )
    copies = [_copy(task, machine_id) for task in new for machine_id in found]
    if len({copy.id for copy in copies}) < len(copies):
        return _refused("to: ids of tasks and machines make the same id for two copies; choose other ids")
    return copies


def _for_any(db: Connection, new: Sequence[NewTask], to: Destination, now_ms: int) -> list[NewTask] | Refusal:
    if len(to.machine_ids) > 1 or (to.machine_ids and to.labels):
        return _refused(
            "to.machine_ids: a task for any of several machines needs a label that they share; or name one machine, "
            "or use mode broadcast or scatter"
        )
    machine_id = to.machine_ids[0] if to.machine_ids else labels.selector(db, to.labels, now_ms)
    if isinstance(machine_id, Refusal):
        return machine_id
    return [replace(task, machine_id=machine_id) for task in new]


def _scattered(db: Connection, new: Sequence[NewTask], found: Sequence[str]) -> list[NewTask]:
    """Each task to the machine that has the fewest open ones by then."""
    loads = dict.fromkeys(found, 0)
    for start in range(0, len(found), _IDS_AT_ONCE):
        ids = found[start : start + _IDS_AT_ONCE]
        open_ones = (
            select(tasks.c.machine_id, func.count())
            .where(tasks.c.status.in_(_OPEN), tasks.c.machine_id.in_(ids))
            .group_by(tasks.c.machine_id)
        )
        for machine_id, number in db.execute(open_ones):
            loads[machine_id] = number
    heap = [(load, machine_id) for machine_id, load in loads.items()]
    heapq.heapify(heap)
    placed: list[NewTask] = []
    for task in new:
        load, machine_id = heap[0]
        heapq.heapreplace(heap, (load + 1, machine_id))
        placed.append(replace(task, machine_id=machine_id))
    return placed


def _copy(task: NewTask, machine_id: str) -> NewTask:
    copy_id = f"{task.id}.{machine_id}"
    if len(copy_id) > ID_CHARS:
        digest = hashlib.sha256(copy_id.encode()).hexdigest()[:32]
        copy_id = f"{task.id[: ID_CHARS - 33]}.{digest}"
    return replace(task, id=copy_id, machine_id=machine_id, spec={**task.spec, "id": copy_id})


def _unknown(db: Connection, machine_ids: Sequence[str]) -> str | None:
    known: set[str] = set()
    for start in range(0, len(machine_ids), _IDS_AT_ONCE):
        ids = machine_ids[start : start + _IDS_AT_ONCE]
        known.update(db.execute(select(machines.c.machine_id).where(machines.c.machine_id.in_(ids))).scalars())
    return next((machine_id for machine_id in machine_ids if machine_id not in known), None)


def _wanted(to: Destination) -> str:
    parts = [f"{name}={value}" for name, value in to.labels.items()]
    if to.machine_ids:
        parts.append(f"machine_ids {', '.join(to.machine_ids[:5])}")
    return ", ".join(parts) or "it, since none is enrolled"


def _refused(message: str) -> Refusal:
    return Refusal(Code.INVALID_PARAMETERS, message)
