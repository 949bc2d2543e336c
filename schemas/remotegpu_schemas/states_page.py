"""Writes `docs/states.md` from the tables in `states`: `python -m remotegpu_schemas.states_page docs/states.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from remotegpu_schemas import limits
from remotegpu_schemas.states import (
    CAUSE_RULES,
    EXIT_NOT_FOUND,
    FINAL_TASK_STATES,
    RUN_TRANSITIONS,
    STOP_CAUSES,
    TASK_TRANSITIONS,
    Cause,
    CauseRule,
    Retry,
    RunEvent,
    RunState,
    TaskEvent,
    TaskState,
)
from remotegpu_schemas.task import DEFAULT_RETRY_ON

StateT = TypeVar("StateT", bound=StrEnum)
EventT = TypeVar("EventT", bound=StrEnum)

_HEAD = """\
# States

Generated from `schemas/remotegpu_schemas/states.py`; a test fails when it is not current. To write it anew:

    python -m remotegpu_schemas.states_page docs/states.md
"""

_TASKS = """\
## Tasks

A claimed task begins as `assigned`, a local one as `pending`. An event that has no arrow from the present state is
refused: it lost a race. `completed`, `failed` and `cancelled` are final.
"""

_RUNS = """\
## Runs

A run is one start of a task's process; retries and preemption make further runs of the same attempt. A run that has
`ended` has exactly one cause.
"""

_CAUSES = f"""\
## Why a run ended

The list is closed. What follows from each cause:

- **again**: whether another run follows. `asked`: if the task's `retry.on` names the cause (bold: it does so by
  default) and retries are left. `free`: always, at most {limits.FREE_RETRIES_MAX} times per attempt. `on_reboot`: as
  the task's `on_reboot` says. Nothing runs again once the lease has ended.
- **costs a retry**: whether that run is one of the task's `retry.max`.
- **status** and **exit code**: of the completion, when no run follows. The exit code is the process's own (128+n if
  signal n ended it) where "own, else" is said and it is not 0; else the number. It is 0 for success only.
- **asked for**: somebody may stop a run for this cause; the first who asks decides the cause.
"""


def page() -> str:
    """The whole document."""
    return "\n".join(
        [
            _HEAD,
            _TASKS,
            *_diagram(
                TASK_TRANSITIONS, starts=(TaskState.PENDING, TaskState.ASSIGNED), ends=_ordered(FINAL_TASK_STATES)
            ),
            *_matrix(TaskState, TaskEvent, TASK_TRANSITIONS),
            _RUNS,
            *_diagram(RUN_TRANSITIONS, starts=(RunState.STARTING,), ends=(RunState.ENDED,)),
            *_matrix(RunState, RunEvent, RUN_TRANSITIONS),
            _CAUSES,
            "| cause | again | costs a retry | status | exit code | reported | asked for |",
            "|---|---|---|---|---|---|---|",
            *(_row(cause, CAUSE_RULES[cause]) for cause in Cause),
            "",
        ]
    )


def _ordered(states: Iterable[TaskState]) -> list[TaskState]:
    return [state for state in TaskState if state in states]


def _diagram(
    transitions: Mapping[tuple[StateT, EventT], StateT], *, starts: Iterable[StateT], ends: Iterable[StateT]
) -> list[str]:
    arrows: dict[tuple[StateT, StateT], list[str]] = {}
    for (state, event), target in transitions.items():
        arrows.setdefault((state, target), []).append(event.value)
    return [
        "```mermaid",
        "stateDiagram-v2",
        *(f"    [*] --> {state}" for state in starts),
        *(f"    {state} --> {target}: {', '.join(events)}" for (state, target), events in arrows.items()),
        *(f"    {state} --> [*]" for state in ends),
        "```",
        "",
    ]


def _matrix(
    states: type[StateT], events: type[EventT], transitions: Mapping[tuple[StateT, EventT], StateT]
) -> list[str]:
    return [
        f"| from \\ event | {' | '.join(events)} |",
        f"|---|{'---|' * len(events)}",
        *(
            f"| {state} | {' | '.join(str(transitions.get((state, event), '')) for event in events)} |"
            for state in states
        ),
        "",
    ]


def _row(cause: Cause, rule: CauseRule) -> str:
    again = f"**{rule.retry}**" if rule.retry_on in DEFAULT_RETRY_ON else str(rule.retry)
    costs = "yes" if rule.retry is Retry.ASKED else "" if rule.retry is Retry.NEVER else "no"
    code = str(rule.fallback_exit_code)
    if rule.uses_own_exit_code and cause is not Cause.SUCCEEDED:
        code = f"own, else {code}"
    if cause is Cause.LAUNCH_FAILED:
        code += f" ({EXIT_NOT_FOUND} if there is no such file)"
    reported = "yes" if rule.is_reported else "no"
    asked_for = "yes" if cause in STOP_CAUSES else ""
    return f"| {cause} | {again} | {costs} | {rule.final_state} | {code} | {reported} | {asked_for} |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
