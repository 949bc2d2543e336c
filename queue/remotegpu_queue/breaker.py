"""The black-hole breaker: a host on which every task fails at once must not burn a whole queue. Pure.

Closed: tasks are claimed. After `failures` different claimed tasks in a row have failed fast it is open: none are. A
canary task probes with growing pauses; once one passes, claimed tasks go on trial one at a time, and the first that
succeeds, or that lives on, closes the breaker. A host that has not proven itself since its last failure has at most
as many unproven tasks as failures are still allowed, so that no more than that many can burn.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, replace
from typing import Final

from remotegpu_schemas.states import Cause
from remotegpu_schemas.task import TaskId

_ERROR_MAX_CHARS: Final = 300

HOST_MAY_BE_AT_FAULT: Final = frozenset(
    {
        Cause.EXIT_CODE,
        Cause.SIGNAL,
        Cause.OUT_OF_MEMORY,
        Cause.GPU_OUT_OF_MEMORY,
        Cause.GPU_ERROR,
        Cause.GPU_FAULT,
        Cause.AGENT_LOST,
        Cause.LAUNCH_FAILED,
        Cause.DISK_FULL,
    }
)
"""The causes that count when they come fast; of the others somebody else is the reason (a stop, a lease, a policy)."""


class Phase(enum.StrEnum):
    """Where the breaker stands."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"
    """A canary runs."""
    TRIAL = "trial"
    """The canary has passed: one claimed task at a time."""


@dataclass(frozen=True)
class Rules:
    """Bounds; times in seconds. `failures` 0 switches the breaker off."""

    failures: int
    within_s: float
    probe_interval_s: float
    probe_max_interval_s: float


@dataclass(frozen=True)
class Breaker:
    """`streak` are the different tasks that failed fast in a row, `probes` the canaries that have failed since."""

    phase: Phase = Phase.CLOSED
    streak: tuple[TaskId, ...] = ()
    is_proven: bool = False
    probes: int = 0
    opened_at_ms: int | None = None
    last_error: str = ""

    @property
    def is_blocking(self) -> bool:
        """Whether nothing is claimed."""
        return self.phase in {Phase.OPEN, Phase.PROBING}


def failed_fast(breaker: Breaker, task_id: TaskId, error: str, rules: Rules, now_ms: int) -> Breaker:
    """A claimed task has failed before it could show that the host works."""
    if rules.failures == 0:
        return breaker
    error = error[:_ERROR_MAX_CHARS]
    if breaker.is_blocking:
        return replace(breaker, last_error=error)
    if breaker.phase is Phase.TRIAL:
        return replace(breaker, phase=Phase.OPEN, probes=breaker.probes + 1, last_error=error)
    streak = breaker.streak if task_id in breaker.streak else (*breaker.streak, task_id)
    if len(streak) < rules.failures:
        return replace(breaker, streak=streak, is_proven=False, last_error=error)
    return Breaker(Phase.OPEN, streak, opened_at_ms=now_ms, last_error=error)


def proved(breaker: Breaker) -> Breaker:
    """A claimed task has succeeded, or lived on: the host works. One from before the opening proves nothing."""
    return breaker if breaker.is_blocking else Breaker(is_proven=True)


def probe_began(breaker: Breaker) -> Breaker:
    """A canary is on its way."""
    return replace(breaker, phase=Phase.PROBING) if breaker.phase is Phase.OPEN else breaker


def probe_ended(breaker: Breaker, *, has_passed: bool, error: str = "") -> Breaker:
    """The canary has ended."""
    if breaker.phase is not Phase.PROBING:
        return breaker
    if has_passed:
        return replace(breaker, phase=Phase.TRIAL)
    return replace(breaker, phase=Phase.OPEN, probes=breaker.probes + 1, last_error=error[:_ERROR_MAX_CHARS])


def restarted(breaker: Breaker, *, is_same_boot: bool) -> Breaker:
    """As a new agent process finds it: a canary of the old one is not waited for; a reboot proves nothing."""
    if breaker.phase is Phase.PROBING:
        breaker = replace(breaker, phase=Phase.OPEN)
    return breaker if is_same_boot else replace(breaker, is_proven=False)


def probe_pause_s(breaker: Breaker, rules: Rules) -> float:
    """How long to wait before the next canary."""
    return min(rules.probe_interval_s * 2.0 ** min(breaker.probes, 32), rules.probe_max_interval_s)


def room(breaker: Breaker, rules: Rules, unproven: int) -> int | None:
    """How many more tasks may be claimed; None is no bound. `unproven` claimed tasks run that have not lived on yet."""
    if rules.failures == 0:
        return None
    match breaker.phase:
        case Phase.OPEN | Phase.PROBING:
            return 0
        case Phase.TRIAL:
            return max(0, 1 - unproven)
        case Phase.CLOSED:
            return None if breaker.is_proven else max(0, rules.failures - len(breaker.streak) - unproven)


def sentence(breaker: Breaker, rules: Rules) -> str:
    """Why nothing is claimed, for people."""
    return (
        f"{len(breaker.streak)} different tasks in a row failed within {rules.within_s:g} s, the last one so: "
        f"{breaker.last_error or 'without a message'}. A canary finds out when this host works again "
        f"({breaker.probes} have failed so far)"
    )


def to_text(breaker: Breaker) -> str:
    """For the store."""
    return json.dumps(
        {
            "phase": breaker.phase,
            "streak": breaker.streak,
            "is_proven": breaker.is_proven,
            "probes": breaker.probes,
            "opened_at_ms": breaker.opened_at_ms,
            "last_error": breaker.last_error,
        }
    )


def from_text(text: str) -> Breaker:
    """From the store; what cannot be read (another version's) is a closed one that has proven nothing."""
    try:
        found = json.loads(text)
        return Breaker(
            phase=Phase(found["phase"]),
            streak=tuple(TaskId(str(task_id)) for task_id in found["streak"]),
            is_proven=bool(found["is_proven"]),
            probes=int(found["probes"]),
            opened_at_ms=found["opened_at_ms"],
            last_error=str(found["last_error"]),
        )
    except (ValueError, KeyError, TypeError):
        return Breaker()
