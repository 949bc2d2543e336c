"""Pure decisions about tasks and runs: what a run's end means, and what follows from it.

Knows no clock, no database and no process; the same code runs in the simulator.
"""

from __future__ import annotations

import enum
import errno
import signal as signals
from dataclasses import dataclass

from remotegpu_queue.backoff import retry_delay_s
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import EndedBy, RunEnded
from remotegpu_schemas.errors import Permanent
from remotegpu_schemas.states import (
    CAUSE_RULES,
    RUN_TRANSITIONS,
    TASK_TRANSITIONS,
    Cause,
    Retry,
    RunEvent,
    RunState,
    TaskEvent,
    TaskState,
    wire_exit_code,
)
from remotegpu_schemas.task import RetryPolicy


class IllegalTransition(Permanent):
    """The event does not fit the state; the caller lost a race or made a mistake."""


def next_task_state(state: TaskState, event: TaskEvent) -> TaskState:
    """The state after the event. Raises IllegalTransition where the table has no entry."""
    try:
        return TASK_TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"a task that is {state} cannot {event}") from None


def next_run_state(state: RunState, event: RunEvent) -> RunState:
    """The state after the event. Raises IllegalTransition where the table has no entry."""
    try:
        return RUN_TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"a run that is {state} cannot {event}") from None


@dataclass(frozen=True)
class Outcome:
    """Why a run ended, in the words of the closed list, with the code that goes over the wire and a sentence."""

    cause: Cause
    exit_code: int
    signal: int | None
    error: str


class Missing(enum.StrEnum):
    """Why a run has no `ended` line; each is its own cause."""

    SHIM_LOST = "shim_lost"
    NEVER_STARTED = "never_started"
    REBOOTED = "rebooted"


_MISSING = {
    Missing.SHIM_LOST: (Cause.AGENT_LOST, "the supervisor of this run was lost; its processes were stopped"),
    Missing.NEVER_STARTED: (Cause.AGENT_LOST, "the agent stopped before this run was started"),
    Missing.REBOOTED: (Cause.HOST_REBOOTED, "the host was rebooted while this run was under way"),
}

_STOP_SENTENCES = {
    Cause.CANCELLED: "cancelled on request",
    Cause.STOPPED: "stopped by process id on request",
    Cause.LEASE_LOST: "the lease ended before the task did; the task was stopped",
    Cause.SUPERSEDED: "another attempt has this task now; this one was stopped",
    Cause.PREEMPTED: "stopped for a more urgent task",
    Cause.HOST_SHUTDOWN: "the host was shut down",
}


def outcome_of_missing(why: str, stop_cause: Cause | None = None) -> Outcome:
    """The outcome of a run that left no `ended` line; `why` is one of `Missing`.

    If its stop was asked for, that was written down before the run was lost, and counts.
    """
    cause, sentence = _MISSING[Missing(why)]
    if stop_cause is not None:
        cause, sentence = stop_cause, _stop_sentence(stop_cause)
    return Outcome(cause, wire_exit_code(cause, None, None), None, sentence)


def outcome_of(ended: RunEnded, stop_cause: Cause | None, timeout_s: float | None = None) -> Outcome:
    """The outcome of a run from what its shim wrote and what it was asked to be stopped for.

    `stop_cause` counts only if the shim says that the request came first.
    """
    cause = _cause_of(ended, stop_cause)
    exit_code = wire_exit_code(cause, ended.exit_code, ended.signal, ended.errno)
    return Outcome(cause, exit_code, ended.signal, _sentence(cause, ended, timeout_s))


def launch_cause(number: int | None) -> Cause:
    """Why nothing was started, by the errno if there is one: a full disk is the host's fault, not the task's."""
    return Cause.DISK_FULL if number in {errno.ENOSPC, errno.EDQUOT} else Cause.LAUNCH_FAILED


def _cause_of(ended: RunEnded, stop_cause: Cause | None) -> Cause:
    match ended.ended_by:
        case EndedBy.STOP:
            # Somebody else's SIGTERM to the shim (an operator's kill, a host shutdown) is a stop as well.
            return stop_cause or Cause.STOPPED
        case EndedBy.TIMEOUT:
            return Cause.TIMED_OUT
        case EndedBy.LEASE:
            return Cause.LEASE_LOST
        case EndedBy.LAUNCH:
            return launch_cause(ended.errno)
        case EndedBy.ABANDONED:
            return stop_cause or Cause.AGENT_LOST
        case EndedBy.EXIT:
            if ended.signal is None and ended.exit_code == 0:
                return Cause.SUCCEEDED
            if ended.oom_kills:  # the main process itself, or one that it could not do without
                return Cause.OUT_OF_MEMORY
            return Cause.SIGNAL if ended.signal is not None else Cause.EXIT_CODE


def _sentence(cause: Cause, ended: RunEnded, timeout_s: float | None) -> str:
    match cause:
        case Cause.SUCCEEDED:
            return ""
        case Cause.EXIT_CODE:
            return f"the task exited with code {ended.exit_code}"
        case Cause.SIGNAL:
            return f"the task was ended by {_signal_name(ended.signal)}"
        case Cause.OUT_OF_MEMORY:
            return _out_of_memory_sentence(ended)
        case Cause.TIMED_OUT:
            limit = f" of {timeout_s:g} s" if timeout_s else ""
            return f"the task ran longer than its timeout{limit} and was stopped"
        case Cause.LAUNCH_FAILED | Cause.DISK_FULL:
            name = errno.errorcode.get(ended.errno or 0, "")
            return f"{ended.error or 'the task could not be started'}{f' ({name})' if name else ''}"
        case Cause.AGENT_LOST:
            return _MISSING[Missing.NEVER_STARTED][1]
        case _:
            return _stop_sentence(cause)


def _out_of_memory_sentence(ended: RunEnded) -> str:
    used = ended.usage.memory_peak_bytes / limits.MIB
    processes = "one process" if ended.oom_kills == 1 else f"{ended.oom_kills} processes"
    return (
        f"the task ran out of memory: the kernel killed {processes} of it, at {used:.0f} MiB;"
        " ask for more with resources.memory_gb"
    )


def _stop_sentence(cause: Cause) -> str:
    return _STOP_SENTENCES.get(cause, f"the task was stopped: {cause}")


def _signal_name(number: int | None) -> str:
    try:
        return signals.Signals(number or 0).name
    except ValueError:
        return f"signal {number}"


@dataclass(frozen=True)
class AfterRun:
    """What follows from a run's end: `event` for the task, and the counters and delay if it is to be repeated."""

    event: TaskEvent
    retries_used: int
    free_retries_used: int
    delay_s: float = 0.0

    @property
    def is_final(self) -> bool:
        """The task has no further run."""
        return self.event in _FINAL_EVENTS.values()


def after_run(
    outcome: Outcome, policy: RetryPolicy, *, retries_used: int, free_retries_used: int, may_run: bool = True
) -> AfterRun:
    """Decide whether the task gets another run; `may_run` is false when it must not, its end having been asked for."""
    rule = CAUSE_RULES[outcome.cause]
    if may_run and rule.retry is Retry.FREE and free_retries_used < limits.FREE_RETRIES_MAX:
        event = TaskEvent.PREEMPT if outcome.cause is Cause.PREEMPTED else TaskEvent.RETRY
        return AfterRun(event, retries_used, free_retries_used + 1)
    if may_run and rule.retry is Retry.ASKED and _is_asked_for(outcome, policy) and retries_used < policy.max:
        return AfterRun(TaskEvent.RETRY, retries_used + 1, free_retries_used, retry_delay_s(policy, retries_used + 1))
    return AfterRun(final_event(outcome.cause), retries_used, free_retries_used)


def _is_asked_for(outcome: Outcome, policy: RetryPolicy) -> bool:
    if CAUSE_RULES[outcome.cause].retry_on not in policy.on:
        return False
    return outcome.cause is not Cause.EXIT_CODE or not policy.exit_codes or outcome.exit_code in policy.exit_codes


_FINAL_EVENTS = {
    TaskState.COMPLETED: TaskEvent.COMPLETE,
    TaskState.FAILED: TaskEvent.FAIL,
    TaskState.CANCELLED: TaskEvent.CANCEL,
}


def final_event(cause: Cause) -> TaskEvent:
    """The event that ends a task for this cause."""
    return _FINAL_EVENTS[CAUSE_RULES[cause].final_state]
