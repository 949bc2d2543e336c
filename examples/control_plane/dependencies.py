"""When a task of a group may start, and when it never will. Pure: knows no database and no HTTP."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter


class Mode(enum.StrEnum):
    """How the tasks of a group hang together."""

    SERIAL = "serial"
    """Each after the one before it."""
    PARALLEL = "parallel"
    DAG = "dag"
    """As their `depends_on` says."""


class OnFailure(enum.StrEnum):
    """What becomes of the rest when a task of the group does not succeed."""

    STOP = "stop"
    """Nothing more is started, but what runs goes on."""
    CONTINUE = "continue"
    """A dependency is met when it has ended, however it did."""
    SKIP_DEPENDENTS = "skip_dependents"
    """Tasks that depend on it are skipped, also over others."""


class When(enum.StrEnum):
    """How the tasks that a task depends on must have ended for it to run."""

    SUCCESS = "success"
    FAILURE = "failure"
    ALWAYS = "always"


class Standing(enum.StrEnum):
    """Where a task of a group is, for the others."""

    WAITING = "waiting"
    READY = "ready"
    """To be given out, and not given out yet."""
    OPEN = "open"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """Also cancelled, or skipped since another one failed."""
    UNNEEDED = "unneeded"
    """Skipped since nothing failed that it was there for."""

    @property
    def has_ended(self) -> bool:
        """Nothing changes it any more."""
        return self in {Standing.SUCCEEDED, Standing.FAILED, Standing.UNNEEDED}


class GroupState(enum.StrEnum):
    """A group's state; all but the first are final."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Rules:
    """What holds for the whole group. `max_parallel` None: no bound."""

    on_failure: OnFailure
    max_parallel: int | None
    is_cancelled: bool


@dataclass(frozen=True)
class Member:
    """One task of a group; `name` is its id within the group, and `depends_on` has such names."""

    name: str
    depends_on: tuple[str, ...]
    when: When
    standing: Standing


@dataclass(frozen=True)
class Skip:
    """A task that will not run, and why. Without `is_failure` that is as it should be."""

    name: str
    reason: str
    is_failure: bool

    @property
    def standing(self) -> Standing:
        """Where the task is now."""
        return Standing.FAILED if self.is_failure else Standing.UNNEEDED


@dataclass(frozen=True)
class Steps:
    """What is to be done now; both in the order of the group."""

    released: tuple[str, ...]
    skipped: tuple[Skip, ...]


def next_steps(rules: Rules, members: Sequence[Member]) -> Steps:
    """Which waiting tasks may start now, and which never will. Doing it leaves nothing to do until a task ends."""
    standings = {member.name: member.standing for member in members}
    by_name = {member.name: member for member in members}
    ready: set[str] = set()
    skipped: dict[str, Skip] = {}
    for name in TopologicalSorter({member.name: member.depends_on for member in members}).static_order():
        if standings[name] not in {Standing.WAITING, Standing.READY}:
            continue
        decided: Skip | bool | None = _stop(by_name[name], rules, standings)
        if decided is None and standings[name] is Standing.WAITING:
            decided = _decide(by_name[name], rules, standings)
        if isinstance(decided, Skip):
            skipped[name] = decided
            standings[name] = decided.standing
        elif decided:
            ready.add(name)
    released = [member.name for member in members if member.name in ready]
    if rules.max_parallel is not None:
        out = sum(standing in {Standing.READY, Standing.OPEN} for standing in standings.values())
        del released[max(0, rules.max_parallel - out) :]
    return Steps(tuple(released), tuple(skipped[member.name] for member in members if member.name in skipped))


def state_of(standings: Sequence[Standing], *, is_cancelled: bool) -> GroupState:
    """The group's state by where its tasks are. A cancel that came when all had succeeded changes nothing."""
    if not all(standing.has_ended for standing in standings):
        return GroupState.RUNNING
    if Standing.FAILED not in standings:
        return GroupState.COMPLETED
    return GroupState.CANCELLED if is_cancelled else GroupState.FAILED


def circle_in(depends_on: Mapping[str, Sequence[str]]) -> list[str] | None:
    """Names that depend on each other in a circle, each on the next one, the first also last; None if none do."""
    try:
        TopologicalSorter(depends_on).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle[::-1]  # graphlib tells it from what is depended on to what depends
    return None


def _stop(member: Member, rules: Rules, standings: Mapping[str, Standing]) -> Skip | None:
    """Why a task that nobody has yet will not be given out, whatever it depends on."""
    if rules.is_cancelled:
        return Skip(member.name, "the group was cancelled", is_failure=True)
    if rules.on_failure is not OnFailure.STOP or member.when is not When.SUCCESS:
        return None
    failed = next((name for name, standing in standings.items() if standing is Standing.FAILED), None)
    if failed is None:
        return None
    return Skip(member.name, f"the group stopped when task {failed} did not succeed", is_failure=True)


def _decide(member: Member, rules: Rules, standings: Mapping[str, Standing]) -> Skip | bool:
    """Whether a waiting task may start, or why it never will."""
    if not all(standings[name].has_ended for name in member.depends_on):
        return False
    failed = next((name for name in member.depends_on if standings[name] is Standing.FAILED), None)
    if member.when is When.ALWAYS or (member.when is When.SUCCESS and rules.on_failure is OnFailure.CONTINUE):
        return True
    if member.when is When.FAILURE:
        return True if failed is not None else Skip(member.name, "nothing failed that it is for", is_failure=False)
    if failed is not None:
        return Skip(member.name, f"task {failed} did not succeed", is_failure=True)
    unneeded = next((name for name in member.depends_on if standings[name] is Standing.UNNEEDED), None)
    return True if unneeded is None else Skip(member.name, f"task {unneeded} was not needed", is_failure=False)
