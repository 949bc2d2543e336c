"""Groups behind the API: submits, cancels and shows them, and settles what follows when a task ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection

from control_plane.dependencies import GroupState
from control_plane.store import audit, distribution, groups
from control_plane.store.audit import Actor
from control_plane.store.distribution import Destination
from control_plane.store.groups import NewGroup, Settled
from control_plane.store.outcomes import Refusal
from control_plane.work import Work


class Groups:
    """The groups of one open plane. `on_claimable` and `on_ended` wake who waits for tasks, and for their ends."""

    def __init__(self, work: Work, on_claimable: Callable[[], None], on_ended: Callable[[], None]) -> None:
        self._work = work
        self._on_claimable = on_claimable
        self._on_ended = on_ended

    async def submit(self, new: NewGroup, to: Destination, by: Actor, origin: str = "") -> dict[str, str]:
        """Add the group, whole or not at all; gives the plane's id of each of its tasks. `origin` is for the audit."""
        now_ms = self._work.now_ms

        def unit(db: Connection) -> dict[str, str] | Refusal:
            placed = distribution.place(db, [member.task for member in new.members], to, now_ms)
            if isinstance(placed, Refusal):
                return placed
            refusal = groups.add(db, new, placed, now_ms)
            if refusal is not None:
                return refusal
            audit.record(
                db, now_ms, by, "group.submit", new.group_id, f"{len(placed)} tasks, {new.mode} {origin}".strip()
            )
            return {member.name: task.id for member, task in zip(new.members, placed, strict=True)}

        task_ids = await self._work.ask(unit)
        self._on_claimable()
        return task_ids

    async def cancel(self, group_id: str, by: Actor) -> GroupState:
        """Cancel the group's tasks, or ask their agents to; the state is what the group has now."""
        now_ms = self._work.now_ms

        def unit(db: Connection) -> GroupState | Refusal:
            state = groups.cancel(db, group_id, now_ms)
            if not isinstance(state, Refusal):
                audit.record(db, now_ms, by, "group.cancel", group_id)
            return state

        state = await self._work.ask(unit)
        self._on_ended()
        return state

    async def get(self, group_id: str) -> dict[str, Any]:
        """One group with its tasks, as stored."""
        return await self._work.ask(lambda db: groups.get(db, group_id))

    async def listed(self, state: GroupState | None, limit: int, offset: int) -> tuple[int, list[dict[str, Any]]]:
        """How many groups there are, and a page of them."""
        return await self._work.run(lambda db: groups.listed(db, state, limit, offset))

    async def task_changed(self, task_id: str) -> None:
        """Do what follows in the task's group, if it has one: the task has ended, or it came back.

        To be called after a repeated completion too: what a plane that died left undone is done then.
        """
        now_ms = self._work.now_ms

        def unit(db: Connection) -> Settled:
            group_id = groups.group_of(db, task_id)
            return Settled() if group_id is None else groups.settle(db, group_id, now_ms)

        self._tell(await self._work.run(unit))

    async def settle_all(self) -> None:
        """Do what follows wherever tasks have changed and nobody has looked: they lapsed, or their plane died."""
        for group_id in await self._work.run(groups.unsettled):
            self._tell(await self._settle(group_id))

    async def _settle(self, group_id: str) -> Settled:
        now_ms = self._work.now_ms
        return await self._work.run(lambda db: groups.settle(db, group_id, now_ms))

    def _tell(self, settled: Settled) -> None:
        if settled.released:
            self._on_claimable()
        if settled.skipped:
            self._on_ended()
