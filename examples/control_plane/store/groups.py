"""Groups of tasks: what waits for what, and what follows when one of them ends.

Whoever changes a group holds its row, and takes its tasks' rows after it; whoever ends a task holds no group then, and
calls `settle` in a transaction of its own afterwards. So two instances cannot wait for each other. What a plane that
died in between left undone is found by `unsettled`, or done when the completion is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    and_,
    bindparam,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)

from control_plane.dependencies import (
    GroupState,
    Member,
    Mode,
    OnFailure,
    Rules,
    Skip,
    Standing,
    When,
    next_steps,
    state_of,
)
from control_plane.store import tasks as store_tasks
from control_plane.store.outcomes import Refusal, add_event
from control_plane.store.tables import ID_CHARS, EventKind, Serial, Status, metadata, tasks
from control_plane.store.tasks import NewTask
from remotegpu_schemas.errors import Code

groups = Table(
    "task_groups",
    metadata,
    Column("seq", Serial, primary_key=True),
    Column("group_id", String(ID_CHARS), nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("mode", String(16), nullable=False),
    Column("on_failure", String(16), nullable=False),
    Column("max_parallel", Integer),
    Column("state", String(16), nullable=False),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("settled_at_ms", BigInteger, nullable=False),
    Column("ended_at_ms", BigInteger),
    Index("ix_task_groups_state", "state", "seq"),
)

group_members = Table(
    "group_members",
    metadata,
    Column("task_id", String(ID_CHARS), ForeignKey("tasks.id"), primary_key=True),
    Column("group_id", String(ID_CHARS), ForeignKey("task_groups.group_id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("name", String(ID_CHARS), nullable=False),
    Column("depends_on", JSON, nullable=False),
    Column("when", String(16), nullable=False),
    Column("is_unneeded", Boolean, nullable=False, default=False),
    Index("ix_group_members_group", "group_id", "position"),
)


@dataclass(frozen=True)
class NewMember:
    """One task of a new group. `depends_on` has names within the group."""

    name: str
    task: NewTask
    depends_on: tuple[str, ...]
    when: When


@dataclass(frozen=True)
class NewGroup:
    """A checked submission of a group."""

    group_id: str
    name: str
    mode: Mode
    on_failure: OnFailure
    max_parallel: int | None
    members: tuple[NewMember, ...]


@dataclass(frozen=True)
class Settled:
    """What followed: tasks that may be claimed now, and tasks that ended without running."""

    released: int = 0
    skipped: int = 0


_HOLD: Final = select(groups).where(groups.c.group_id == bindparam("b_group")).with_for_update()
_MEMBERS: Final = (
    select(group_members, tasks.c.status, tasks.c.error, tasks.c.ended_at_ms)
    .join_from(group_members, tasks, tasks.c.id == group_members.c.task_id)
    .where(group_members.c.group_id == bindparam("b_group"))
    .order_by(group_members.c.position)
)
_GROUP_OF: Final = (
    select(groups.c.group_id)
    .join_from(group_members, groups, groups.c.group_id == group_members.c.group_id)
    .where(group_members.c.task_id == bindparam("b_id"), groups.c.ended_at_ms.is_(None))
)
_other_members = group_members.alias()
_other_tasks = tasks.alias()
_UNSETTLED: Final = (
    select(groups.c.group_id)
    .distinct()
    .join_from(groups, group_members, group_members.c.group_id == groups.c.group_id)
    .join(tasks, tasks.c.id == group_members.c.task_id)
    .where(
        groups.c.ended_at_ms.is_(None),
        or_(
            tasks.c.ended_at_ms > groups.c.settled_at_ms - bindparam("b_slack"),
            and_(
                groups.c.on_failure == OnFailure.STOP,
                tasks.c.status == Status.PENDING,
                exists().where(
                    _other_members.c.group_id == groups.c.group_id,
                    _other_tasks.c.id == _other_members.c.task_id,
                    _other_tasks.c.status.in_([Status.FAILED, Status.CANCELLED]),
                ),
            ),
        ),
    )
)
_RELEASE: Final = (
    update(tasks).where(tasks.c.id == bindparam("b_id"), tasks.c.status == Status.WAITING).values(status=Status.PENDING)
)
_SKIP: Final = (
    update(tasks)
    .where(tasks.c.id == bindparam("b_id"), tasks.c.status.in_([Status.WAITING, Status.PENDING]))
    .values(status=Status.CANCELLED, ended_at_ms=bindparam("b_now"), error=bindparam("b_error"))
)
_CLOCKS_APART_MS: Final = 60_000
"""Instances' clocks may differ by so much."""


def add(db: Connection, new: NewGroup, placed: Sequence[NewTask], now_ms: int) -> Refusal | None:
    """Add the group with its tasks, which are `placed` in the group's order, and release what waits for nothing."""
    taken = db.execute(select(groups.c.group_id).where(groups.c.group_id == new.group_id)).scalar()
    if taken is not None:
        return Refusal(Code.ALREADY_EXISTS, f"there is a group {taken} already; nothing was submitted")
    refusal = store_tasks.add(db, placed, now_ms)
    if refusal is not None:
        return refusal
    db.execute(
        insert(groups),
        {
            "group_id": new.group_id,
            "name": new.name,
            "mode": new.mode,
            "on_failure": new.on_failure,
            "max_parallel": new.max_parallel,
            "state": GroupState.RUNNING,
            "created_at_ms": now_ms,
            "settled_at_ms": now_ms,
        },
    )
    db.execute(
        insert(group_members),
        [
            {
                "task_id": task.id,
                "group_id": new.group_id,
                "position": position,
                "name": member.name,
                "depends_on": list(member.depends_on),
                "when": member.when,
            }
            for position, (member, task) in enumerate(zip(new.members, placed, strict=True))
        ],
    )
    settle(db, new.group_id, now_ms)
    return None


def group_of(db: Connection, task_id: str) -> str | None:
    """The group that a task belongs to, unless it has ended or there is none."""
    return db.execute(_GROUP_OF, {"b_id": task_id}).scalar()


def unsettled(db: Connection) -> list[str]:
    """Groups in which a task has ended since they were settled, or came back after they stopped.

    As far as clocks tell: some of them are settled.
    """
    return list(db.execute(_UNSETTLED, {"b_slack": _CLOCKS_APART_MS}).scalars())


def settle(db: Connection, group_id: str, now_ms: int) -> Settled:
    """Do what follows from where the group's tasks are. A second time changes nothing."""
    group = db.execute(_HOLD, {"b_group": group_id}).mappings().one_or_none()
    if group is None or group["ended_at_ms"] is not None:
        return Settled()
    rows = db.execute(_MEMBERS, {"b_group": group_id}).mappings().all()
    members = [_member(row) for row in rows]
    rules = Rules(OnFailure(group["on_failure"]), group["max_parallel"], group["cancel_requested"])
    steps = next_steps(rules, members)
    task_ids = {row["name"]: row["task_id"] for row in rows}
    standings = {member.name: member.standing for member in members}
    for name in steps.released:
        standings[name] = Standing.READY
        if db.execute(_RELEASE, {"b_id": task_ids[name]}).rowcount:
            add_event(db, task_ids[name], now_ms, EventKind.READY)
    for skip in steps.skipped:
        # One that was claimed or cancelled meanwhile has not ended for us: its own end will be settled.
        was_skipped = _skip(db, task_ids[skip.name], skip, now_ms)
        standings[skip.name] = skip.standing if was_skipped else Standing.OPEN
    state = state_of(list(standings.values()), is_cancelled=rules.is_cancelled)
    ended_ms = None if state is GroupState.RUNNING else now_ms
    values = {"state": state, "settled_at_ms": now_ms, "ended_at_ms": ended_ms}
    db.execute(update(groups).where(groups.c.group_id == group_id).values(values))
    return Settled(len(steps.released), len(steps.skipped))


def cancel(db: Connection, group_id: str, now_ms: int) -> GroupState | Refusal:
    """Cancel every task that has not ended, as `tasks.cancel` does; the state is what the group has now.

    Twice is the same as once.
    """
    group = db.execute(_HOLD, {"b_group": group_id}).mappings().one_or_none()
    if group is None:
        return _unknown(group_id)
    state = GroupState(group["state"])
    if state is GroupState.CANCELLED:
        return state
    if state is not GroupState.RUNNING:
        return Refusal(Code.TASK_FINISHED, f"group {group_id} has ended: {state}")
    db.execute(update(groups).where(groups.c.group_id == group_id).values(cancel_requested=True))
    for row in db.execute(_MEMBERS, {"b_group": group_id}).mappings().all():
        if not Status(row["status"]).is_final:
            store_tasks.cancel(db, row["task_id"], now_ms)  # refused if it has ended meanwhile: so it has ended
    settle(db, group_id, now_ms)
    return GroupState(db.execute(select(groups.c.state).where(groups.c.group_id == group_id)).scalar_one())


def get(db: Connection, group_id: str) -> dict[str, Any] | Refusal:
    """The group with its tasks, in its order."""
    group = db.execute(select(groups).where(groups.c.group_id == group_id)).mappings().one_or_none()
    if group is None:
        return _unknown(group_id)
    rows = db.execute(_MEMBERS, {"b_group": group_id}).mappings()
    return {**group, "tasks": [{**row, "standing": _member(row).standing} for row in rows]}


def listed(db: Connection, state: GroupState | None, limit: int, offset: int) -> tuple[int, list[dict[str, Any]]]:
    """How many groups there are, and a page of them, oldest first."""
    wanted = [] if state is None else [groups.c.state == state]
    total: int = db.execute(select(func.count()).select_from(groups).where(*wanted)).scalar_one()
    page = select(groups).where(*wanted).order_by(groups.c.seq).limit(limit).offset(offset)
    return total, [dict(row) for row in db.execute(page).mappings()]


def _skip(db: Connection, task_id: str, skip: Skip, now_ms: int) -> bool:
    error = f"dependency_failed: {skip.reason}" if skip.is_failure else f"not needed: {skip.reason}"
    if not db.execute(_SKIP, {"b_id": task_id, "b_now": now_ms, "b_error": error}).rowcount:
        return False
    add_event(db, task_id, now_ms, EventKind.SKIPPED, detail=skip.reason)
    if not skip.is_failure:
        db.execute(update(group_members).where(group_members.c.task_id == task_id).values(is_unneeded=True))
    return True


def _member(row: Any) -> Member:
    return Member(row["name"], tuple(row["depends_on"]), When(row["when"]), _standing(row))


def _standing(row: Any) -> Standing:
    match Status(row["status"]):
        case Status.WAITING:
            return Standing.WAITING
        case Status.PENDING:
            return Standing.READY
        case Status.COMPLETED:
            return Standing.SUCCEEDED
        case Status.FAILED:
            return Standing.FAILED
        case Status.CANCELLED:
            return Standing.UNNEEDED if row["is_unneeded"] else Standing.FAILED
        case _:
            return Standing.OPEN


def _unknown(group_id: str) -> Refusal:
    return Refusal(Code.TASK_NOT_FOUND, f"there is no group {group_id}")
