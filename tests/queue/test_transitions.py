"""What a run's end means and what follows: every cause, every policy."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_queue.transitions import (
    IllegalTransition,
    Missing,
    Outcome,
    after_run,
    final_event,
    next_run_state,
    next_task_state,
    outcome_of,
    outcome_of_missing,
)
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import EndedBy, RunEnded
from remotegpu_schemas.states import (
    CAUSE_RULES,
    RUN_TRANSITIONS,
    STOP_CAUSES,
    TASK_TRANSITIONS,
    Cause,
    Retry,
    RunEvent,
    RunState,
    TaskEvent,
    TaskState,
)
from remotegpu_schemas.task import Backoff, RetryOn, RetryPolicy

_CAUSES = st.sampled_from(Cause)
_POLICIES = st.builds(
    RetryPolicy,
    max=st.integers(0, 5),
    delay_s=st.sampled_from([0.0, 1.5, 60.0]),
    backoff=st.sampled_from(Backoff),
    on=st.frozensets(st.sampled_from(RetryOn)),
    exit_codes=st.frozensets(st.integers(1, 5), max_size=3),
)


def _outcome(cause: Cause, exit_code: int = 3) -> Outcome:
    return Outcome(cause, 0 if cause is Cause.SUCCEEDED else exit_code, None, "")


def _ended(by: EndedBy, **more: object) -> RunEnded:
    return RunEnded.model_validate({"ended_by": by, "ended_wall_ns": 1, **more})


# --- the tables ---


@pytest.mark.parametrize("state", TaskState)
@pytest.mark.parametrize("event", TaskEvent)
def test_every_cell_of_the_task_table(state: TaskState, event: TaskEvent) -> None:
    """An event moves a task as the table says, or is refused."""
    if (state, event) in TASK_TRANSITIONS:
        assert next_task_state(state, event) is TASK_TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransition, match=f"a task that is {state} cannot {event}"):
            next_task_state(state, event)


@pytest.mark.parametrize("state", RunState)
@pytest.mark.parametrize("event", RunEvent)
def test_every_cell_of_the_run_table(state: RunState, event: RunEvent) -> None:
    """An event moves a run as the table says, or is refused."""
    if (state, event) in RUN_TRANSITIONS:
        assert next_run_state(state, event) is RUN_TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransition, match=f"a run that is {state} cannot {event}"):
            next_run_state(state, event)


# --- why it ended ---


@pytest.mark.parametrize(
    ("ended", "stop_cause", "cause", "exit_code", "sentence"),
    [
        (_ended(EndedBy.EXIT, exit_code=0), None, Cause.SUCCEEDED, 0, ""),
        (_ended(EndedBy.EXIT, exit_code=0), Cause.CANCELLED, Cause.SUCCEEDED, 0, ""),
        (_ended(EndedBy.EXIT, exit_code=7), None, Cause.EXIT_CODE, 7, "exited with code 7"),
        (_ended(EndedBy.EXIT, signal=9), None, Cause.SIGNAL, 137, "SIGKILL"),
        (_ended(EndedBy.EXIT, signal=9, oom_kills=1), None, Cause.OUT_OF_MEMORY, 137, "killed one process of it"),
        (_ended(EndedBy.EXIT, exit_code=1, oom_kills=2), None, Cause.OUT_OF_MEMORY, 1, "killed 2 processes of it"),
        (_ended(EndedBy.TIMEOUT, signal=9, oom_kills=1), None, Cause.TIMED_OUT, 124, "timeout of 5 s"),
        (_ended(EndedBy.EXIT, signal=63), None, Cause.SIGNAL, 191, "signal 63"),
        (_ended(EndedBy.STOP, exit_code=0), Cause.CANCELLED, Cause.CANCELLED, 143, "cancelled on request"),
        (_ended(EndedBy.STOP, signal=15), Cause.LEASE_LOST, Cause.LEASE_LOST, 125, "lease ended"),
        (_ended(EndedBy.STOP, signal=15), Cause.GPU_FAULT, Cause.GPU_FAULT, 125, "stopped: gpu_fault"),
        (_ended(EndedBy.STOP, signal=15), None, Cause.STOPPED, 143, "by process id"),
        (_ended(EndedBy.TIMEOUT, exit_code=0), Cause.CANCELLED, Cause.TIMED_OUT, 124, "timeout of 5 s"),
        (_ended(EndedBy.LEASE, signal=9), Cause.CANCELLED, Cause.LEASE_LOST, 125, "lease ended"),
        (_ended(EndedBy.LAUNCH, errno=errno.ENOENT, error="no such program"), None, Cause.LAUNCH_FAILED, 127, "ENOENT"),
        (_ended(EndedBy.LAUNCH, errno=errno.EACCES), None, Cause.LAUNCH_FAILED, 126, "could not be started (EACCES)"),
        (_ended(EndedBy.ABANDONED), None, Cause.AGENT_LOST, 125, "before this run was started"),
    ],
    ids=lambda value: "" if isinstance(value, RunEnded) else str(value),
)
def test_f31_outcome(ended: RunEnded, stop_cause: Cause | None, cause: Cause, exit_code: int, sentence: str) -> None:
    """The first thing that happened is the cause; a stop counts only if the shim says that it came first."""
    outcome = outcome_of(ended, stop_cause, 5.0)
    assert (outcome.cause, outcome.exit_code) == (cause, exit_code)
    assert sentence in outcome.error


def test_f28_task_that_gets_over_a_loss_of_memory_has_succeeded() -> None:
    """F28: one of its processes was killed, and it ended well all the same."""
    assert outcome_of(_ended(EndedBy.EXIT, exit_code=0, oom_kills=1), None).cause is Cause.SUCCEEDED


@pytest.mark.parametrize(
    ("why", "cause"),
    [
        (Missing.SHIM_LOST, Cause.AGENT_LOST),
        (Missing.NEVER_STARTED, Cause.AGENT_LOST),
        (Missing.REBOOTED, Cause.HOST_REBOOTED),
    ],
)
def test_f09_run_without_an_end(why: Missing, cause: Cause) -> None:
    """A run that left no end has a cause and a sentence all the same."""
    outcome = outcome_of_missing(why)
    assert (outcome.cause, outcome.exit_code, bool(outcome.error)) == (cause, 125, True)


@pytest.mark.parametrize("stop_cause", sorted(STOP_CAUSES))
@pytest.mark.parametrize("why", Missing)
def test_stop_that_was_asked_for_survives_the_loss_of_the_run(why: Missing, stop_cause: Cause) -> None:
    """A task that was cancelled before its shim, the agent or the host was lost is cancelled, and not run again."""
    assert outcome_of_missing(why, stop_cause).cause is stop_cause
    assert outcome_of(_ended(EndedBy.ABANDONED), stop_cause).cause is stop_cause


@given(
    st.sampled_from(EndedBy), st.none() | st.sampled_from(sorted(STOP_CAUSES)), st.integers(0, 255), st.integers(1, 64)
)
def test_exit_code_0_means_success_and_nothing_else(
    by: EndedBy, stop_cause: Cause | None, exit_code: int, signal: int
) -> None:
    """Older planes derive success from the exit code: it is 0 for a success only."""
    for ended in (_ended(by, exit_code=exit_code), _ended(by, signal=signal)):
        outcome = outcome_of(ended, stop_cause)
        assert (outcome.exit_code == 0) == (outcome.cause is Cause.SUCCEEDED)
        assert bool(outcome.error) == (outcome.cause is not Cause.SUCCEEDED)


# --- what follows ---


@given(
    _CAUSES, _POLICIES, st.integers(0, 6), st.integers(0, limits.FREE_RETRIES_MAX + 1), st.integers(1, 6), st.booleans()
)
def test_every_cause_and_policy(
    cause: Cause, policy: RetryPolicy, used: int, free: int, exit_code: int, may_run: bool
) -> None:
    """Whether a run is followed by another one, and what that costs, is what the table of causes says."""
    after = after_run(_outcome(cause, exit_code), policy, retries_used=used, free_retries_used=free, may_run=may_run)
    rule = CAUSE_RULES[cause]
    is_code_named = cause is not Cause.EXIT_CODE or not policy.exit_codes or exit_code in policy.exit_codes
    goes_on = may_run and (
        (rule.retry is Retry.FREE and free < limits.FREE_RETRIES_MAX)
        or (rule.retry is Retry.ASKED and rule.retry_on in policy.on and is_code_named and used < policy.max)
    )
    if not goes_on:
        assert after.event is final_event(cause)
        assert (after.retries_used, after.free_retries_used, after.delay_s) == (used, free, 0)
    elif rule.retry is Retry.FREE:
        assert after.event is (TaskEvent.PREEMPT if cause is Cause.PREEMPTED else TaskEvent.RETRY)
        assert (after.retries_used, after.free_retries_used) == (used, free + 1)
    else:
        assert after.event is TaskEvent.RETRY
        assert (after.retries_used, after.free_retries_used) == (used + 1, free)
        assert 0 <= after.delay_s <= policy.max_delay_s


@given(_CAUSES, st.booleans())
def test_the_event_fits_a_running_task(cause: Cause, may_run: bool) -> None:
    """Whatever ends a run, the task's table knows what to do, running or suspended."""
    policy = RetryPolicy(max=1)
    after = after_run(_outcome(cause), policy, retries_used=0, free_retries_used=0, may_run=may_run)
    for state in (TaskState.RUNNING, TaskState.SUSPENDED):
        next_task_state(state, after.event)


@given(_CAUSES, _POLICIES)
def test_every_task_ends(cause: Cause, policy: RetryPolicy) -> None:
    """However often a run ends in the same way, the task has an end: retries of both kinds are bounded."""
    used = free = 0
    events = []
    for _ in range(limits.FREE_RETRIES_MAX + policy.max + 1):
        after = after_run(_outcome(cause), policy, retries_used=used, free_retries_used=free)
        used, free = after.retries_used, after.free_retries_used
        events.append(after.event)
    assert events[-1] is final_event(cause)
    assert used <= policy.max


@pytest.mark.parametrize(("exit_code", "event"), [(75, TaskEvent.RETRY), (1, TaskEvent.FAIL)])
def test_retry_by_exit_code(exit_code: int, event: TaskEvent) -> None:
    """Only the exit codes that the task names are repeated; the delay is that of its policy."""
    policy = RetryPolicy(max=3, delay_s=10, backoff=Backoff.EXPONENTIAL, exit_codes=frozenset({75}))
    after = after_run(_outcome(Cause.EXIT_CODE, exit_code), policy, retries_used=1, free_retries_used=0)
    assert after.event is event
    assert after.delay_s == (20.0 if event is TaskEvent.RETRY else 0.0)


def test_exit_codes_do_not_bind_other_causes() -> None:
    """A task that names exit codes is still repeated after a signal."""
    policy = RetryPolicy(max=1, exit_codes=frozenset({75}))
    after = after_run(_outcome(Cause.SIGNAL, 137), policy, retries_used=0, free_retries_used=0)
    assert after.event is TaskEvent.RETRY
