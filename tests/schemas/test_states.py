"""Every cell of the tables of states, and what each cause of an end means on the wire."""

from __future__ import annotations

import errno
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_schemas.states import (
    CAUSE_RULES,
    FINAL_TASK_STATES,
    RUN_TRANSITIONS,
    STOP_CAUSES,
    TASK_TRANSITIONS,
    WAITING_TASK_STATES,
    Cause,
    Retry,
    RunEvent,
    RunState,
    TaskEvent,
    TaskState,
    wire_exit_code,
)
from remotegpu_schemas.task import RetryOn
from tests.schemas.support import property_test

# The tables of design section 4 written a second time, as a picture: `.` is a refusal.
TASKS = """
           start   retry   complete  fail   cancel    suspend   resume  preempt   requeue
pending    running .       .         failed cancelled .         .       .         .
assigned   running .       .         failed cancelled .         .       .         .
running    .       pending completed failed cancelled suspended .       preempted .
suspended  .       pending completed failed cancelled .         running preempted .
preempted  .       .       .         failed cancelled .         .       .         pending
completed  .       .       .         .      .         .         .       .         .
failed     .       .       .         .      .         .         .       .         .
cancelled  .       .       .         .      .         .         .       .         .
"""
RUNS = """
           started  suspend   resume  stop     end
starting   running  .         .       stopping ended
running    .        suspended .       stopping ended
suspended  .        .         running stopping ended
stopping   stopping .         .       stopping ended
ended      .        .         .       .        .
"""


def cells(picture: str) -> dict[tuple[str, str], str]:
    """(state, event) -> target or `.`."""
    head, *rows = [line.split() for line in picture.strip().split("\n")]
    return {(row[0], event): target for row in rows for event, target in zip(head, row[1:], strict=True)}


TASK_CELLS, RUN_CELLS = cells(TASKS), cells(RUNS)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(TaskState, TaskEvent)))
def test_cell_of_tasks(state: TaskState, event: TaskEvent) -> None:
    """Each event leads where the picture says, or is refused."""
    assert TASK_TRANSITIONS.get((state, event), ".") == TASK_CELLS[state, event]


@pytest.mark.parametrize(("state", "event"), list(itertools.product(RunState, RunEvent)))
def test_cell_of_runs(state: RunState, event: RunEvent) -> None:
    """Each event leads where the picture says, or is refused."""
    assert RUN_TRANSITIONS.get((state, event), ".") == RUN_CELLS[state, event]


def test_final_states() -> None:
    """No event leaves completed, failed and cancelled, and every other state can end in each way that it must."""
    assert {TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED} == FINAL_TASK_STATES
    for state in TaskState:
        events = {event for source, event in TASK_TRANSITIONS if source is state}
        assert state.is_final == (not events)
        assert state.is_final or {TaskEvent.FAIL, TaskEvent.CANCEL} <= events


def test_waiting_states_are_those_that_can_start() -> None:
    """The scheduler may start exactly what the table lets start."""
    can_start = {state for state, event in TASK_TRANSITIONS if event is TaskEvent.START}
    assert can_start == WAITING_TASK_STATES == {state for state in TaskState if state.is_waiting}


def test_every_run_can_end_and_be_stopped() -> None:
    """Whatever a run is doing, its tree may be gone; and nobody's request to stop it is refused before that."""
    for state in set(RunState) - {RunState.ENDED}:
        assert RUN_TRANSITIONS[state, RunEvent.END] is RunState.ENDED
        assert RUN_TRANSITIONS[state, RunEvent.STOP] is RunState.STOPPING
    assert not [event for state, event in RUN_TRANSITIONS if state is RunState.ENDED]


@property_test
@given(start=st.sampled_from([TaskState.PENDING, TaskState.ASSIGNED]), events=st.lists(st.sampled_from(TaskEvent)))
def test_task_completes_only_from_a_run(start: TaskState, events: list[TaskEvent]) -> None:
    """Whatever happens in whatever order, a completed task was started before, and a final state stays."""
    state, was_started = start, False
    for event in events:
        target = TASK_TRANSITIONS.get((state, event))
        if target is not None:
            assert not state.is_final
            was_started = was_started or event is TaskEvent.START
            state = target
    assert was_started or state not in {TaskState.COMPLETED, TaskState.RUNNING, TaskState.SUSPENDED}


# --- causes --------------------------------------------------------------------------------------------------------


def test_every_cause_has_a_rule() -> None:
    """The list is closed, and every rule ends the task in a final state."""
    assert CAUSE_RULES.keys() == set(Cause)
    assert all(rule.final_state.is_final for rule in CAUSE_RULES.values())


@pytest.mark.parametrize("cause", Cause)
def test_a_retry_that_is_asked_for_has_a_name_to_ask_by(cause: Cause) -> None:
    """`retry.on` can name the cause exactly where the rule asks; the names are the causes'."""
    rule = CAUSE_RULES[cause]
    assert (rule.retry is Retry.ASKED) == (rule.retry_on is not None)
    assert rule.retry_on is None or rule.retry_on.value == cause.value


def test_every_name_of_retry_on_is_a_cause_that_is_retried() -> None:
    """Nobody can ask for what never happens."""
    for name in RetryOn:
        assert CAUSE_RULES[Cause(name.value)].retry is not Retry.NEVER


@pytest.mark.parametrize(
    "cause", [Cause.GPU_FAULT, Cause.PREEMPTED, Cause.AGENT_LOST, Cause.HOST_REBOOTED, Cause.HOST_SHUTDOWN]
)
def test_what_is_not_the_tasks_doing_costs_no_retry(cause: Cause) -> None:
    """GPU faults, reboots, preemption and lost agents cost the task none of its retries."""
    assert CAUSE_RULES[cause].retry in {Retry.FREE, Retry.ON_REBOOT}


def test_only_success_completes() -> None:
    """One cause means success; the states of the others are failed or cancelled."""
    assert [cause for cause in Cause if CAUSE_RULES[cause].final_state is TaskState.COMPLETED] == [Cause.SUCCEEDED]


def test_only_a_superseded_attempt_is_silent() -> None:
    """Every other end is reported."""
    assert [cause for cause in Cause if not CAUSE_RULES[cause].is_reported] == [Cause.SUPERSEDED]


def test_nobody_stops_a_run_for_an_end_of_its_own() -> None:
    """What a run can be stopped for is not what it ends with by itself."""
    own = {Cause.SUCCEEDED, Cause.EXIT_CODE, Cause.SIGNAL, Cause.TIMED_OUT, Cause.LAUNCH_FAILED, Cause.AGENT_LOST}
    assert not STOP_CAUSES & own


# --- exit codes ----------------------------------------------------------------------------------------------------

exit_codes = st.none() | st.integers(0, 255)
signals = st.none() | st.integers(1, 64)


@property_test
@given(cause=st.sampled_from(Cause), exit_code=exit_codes, signal=signals, launch_errno=st.none() | st.integers(1, 133))
def test_exit_code_0_is_success_and_nothing_else(
    cause: Cause, exit_code: int | None, signal: int | None, launch_errno: int | None
) -> None:
    """Older planes derive success from it, so every other cause has a code from 1 to 255."""
    code = wire_exit_code(cause, exit_code, signal, launch_errno)
    assert (code == 0) == (cause is Cause.SUCCEEDED)
    assert 0 <= code <= 255


OWN = [
    Cause.EXIT_CODE,
    Cause.SIGNAL,
    Cause.OUT_OF_MEMORY,
    Cause.GPU_OUT_OF_MEMORY,
    Cause.GPU_ERROR,
    Cause.CANCELLED,
    Cause.STOPPED,
]
FIXED = {
    Cause.SUCCEEDED: 0,
    Cause.TIMED_OUT: 124,
    Cause.GPU_FAULT: 125,
    Cause.GPU_MEMORY_EXCEEDED: 137,
    Cause.LEASE_LOST: 125,
    Cause.SUPERSEDED: 125,
    Cause.PREEMPTED: 125,
    Cause.HOST_REBOOTED: 125,
    Cause.HOST_SHUTDOWN: 125,
    Cause.AGENT_LOST: 125,
    Cause.LAUNCH_FAILED: 126,
    Cause.DISK_FULL: 126,
    Cause.POLICY_REFUSED: 126,
    Cause.DEPENDENCY_FAILED: 125,
}


def test_the_two_kinds_of_causes_are_all() -> None:
    """Each cause sends the process's own code or one of its own."""
    assert {*OWN, *FIXED} == set(Cause)


@pytest.mark.parametrize("cause", OWN)
def test_own_code_of_the_process_goes_over_the_wire(cause: Cause) -> None:
    """Its exit code as it is, and 128+n when signal n ended it."""
    assert wire_exit_code(cause, 3, None) == 3
    assert wire_exit_code(cause, None, 9) == 137
    assert wire_exit_code(cause, None, 15) == 143


@pytest.mark.parametrize(("cause", "code"), list(FIXED.items()))
@pytest.mark.parametrize(("exit_code", "signal"), [(None, None), (0, None), (3, None), (None, 9)])
def test_code_of_the_cause_goes_over_the_wire(
    cause: Cause, code: int, exit_code: int | None, signal: int | None
) -> None:
    """124 timed out, 125 lost, 126 not executable, whatever the process itself said."""
    assert wire_exit_code(cause, exit_code, signal) == code


@pytest.mark.parametrize("cause", [Cause.CANCELLED, Cause.STOPPED])
def test_cancelled_task_that_exits_0_sends_143(cause: Cause) -> None:
    """A task that ends in good order when it is stopped has not succeeded."""
    assert wire_exit_code(cause, 0, None) == 143
    assert wire_exit_code(cause, None, None) == 143


@pytest.mark.parametrize(
    ("number", "code"), [(errno.ENOENT, 127), (errno.EACCES, 126), (errno.ENOMEM, 126), (None, 126)]
)
def test_launch_failure_follows_the_shell(number: int | None, code: int) -> None:
    """127 when there is no such file, 126 for everything else that cannot be executed."""
    assert wire_exit_code(Cause.LAUNCH_FAILED, None, None, number) == code
