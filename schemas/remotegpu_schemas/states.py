"""States of tasks and runs, the events that move them, and what each cause of an end means.

Everything here is data: the queue applies it, a test walks every cell, `docs/states.md` is generated from it.
"""

from __future__ import annotations

import enum
import errno
from typing import Final, NamedTuple

from remotegpu_schemas.task import RetryOn


class TaskState(enum.StrEnum):
    """Where a task is. The last three are final."""

    PENDING = "pending"
    """Waits for capacity, for a retry's delay, or for the end of what preempted it."""
    ASSIGNED = "assigned"
    """Claimed from the control plane, not started yet."""
    RUNNING = "running"
    """A run of it exists and holds capacity, from the moment that its start is on disk."""
    SUSPENDED = "suspended"
    PREEMPTED = "preempted"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """No event leaves this state."""
        return self in FINAL_TASK_STATES

    @property
    def is_waiting(self) -> bool:
        """The scheduler may start it."""
        return self in WAITING_TASK_STATES


FINAL_TASK_STATES: Final = frozenset({TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED})
WAITING_TASK_STATES: Final = frozenset({TaskState.PENDING, TaskState.ASSIGNED})


class TaskEvent(enum.StrEnum):
    """What moves a task."""

    START = "start"
    """Its next run is written down and takes capacity."""
    RETRY = "retry"
    """Its run ended and another one is due."""
    COMPLETE = "complete"
    FAIL = "fail"
    CANCEL = "cancel"
    SUSPEND = "suspend"
    RESUME = "resume"
    PREEMPT = "preempt"
    """Its run was stopped for a more urgent task."""
    REQUEUE = "requeue"
    """What preempted it is done."""


TASK_TRANSITIONS: Final[dict[tuple[TaskState, TaskEvent], TaskState]] = {
    (TaskState.PENDING, TaskEvent.START): TaskState.RUNNING,
    (TaskState.PENDING, TaskEvent.FAIL): TaskState.FAILED,
    (TaskState.PENDING, TaskEvent.CANCEL): TaskState.CANCELLED,
    (TaskState.ASSIGNED, TaskEvent.START): TaskState.RUNNING,
    (TaskState.ASSIGNED, TaskEvent.FAIL): TaskState.FAILED,
    (TaskState.ASSIGNED, TaskEvent.CANCEL): TaskState.CANCELLED,
    (TaskState.RUNNING, TaskEvent.RETRY): TaskState.PENDING,
    (TaskState.RUNNING, TaskEvent.COMPLETE): TaskState.COMPLETED,
    (TaskState.RUNNING, TaskEvent.FAIL): TaskState.FAILED,
    (TaskState.RUNNING, TaskEvent.CANCEL): TaskState.CANCELLED,
    (TaskState.RUNNING, TaskEvent.SUSPEND): TaskState.SUSPENDED,
    (TaskState.RUNNING, TaskEvent.PREEMPT): TaskState.PREEMPTED,
    (TaskState.SUSPENDED, TaskEvent.RESUME): TaskState.RUNNING,
    (TaskState.SUSPENDED, TaskEvent.RETRY): TaskState.PENDING,
    (TaskState.SUSPENDED, TaskEvent.COMPLETE): TaskState.COMPLETED,
    (TaskState.SUSPENDED, TaskEvent.FAIL): TaskState.FAILED,
    (TaskState.SUSPENDED, TaskEvent.CANCEL): TaskState.CANCELLED,
    (TaskState.SUSPENDED, TaskEvent.PREEMPT): TaskState.PREEMPTED,
    (TaskState.PREEMPTED, TaskEvent.REQUEUE): TaskState.PENDING,
    (TaskState.PREEMPTED, TaskEvent.FAIL): TaskState.FAILED,
    (TaskState.PREEMPTED, TaskEvent.CANCEL): TaskState.CANCELLED,
}
"""A pair that is missing is refused: the event lost a race, or somebody made a mistake."""


class RunState(enum.StrEnum):
    """Where one start of a process is."""

    STARTING = "starting"
    RUNNING = "running"
    SUSPENDED = "suspended"
    STOPPING = "stopping"
    ENDED = "ended"


class RunEvent(enum.StrEnum):
    """What moves a run."""

    STARTED = "started"
    """Its main process exists and its identity is known."""
    SUSPEND = "suspend"
    RESUME = "resume"
    STOP = "stop"
    """Somebody asked for its end; the reason is stored before any signal is sent."""
    END = "end"
    """Its whole tree is gone."""


RUN_TRANSITIONS: Final[dict[tuple[RunState, RunEvent], RunState]] = {
    (RunState.STARTING, RunEvent.STARTED): RunState.RUNNING,
    (RunState.STARTING, RunEvent.STOP): RunState.STOPPING,
    (RunState.STARTING, RunEvent.END): RunState.ENDED,
    (RunState.RUNNING, RunEvent.SUSPEND): RunState.SUSPENDED,
    (RunState.RUNNING, RunEvent.STOP): RunState.STOPPING,
    (RunState.RUNNING, RunEvent.END): RunState.ENDED,
    (RunState.SUSPENDED, RunEvent.RESUME): RunState.RUNNING,
    (RunState.SUSPENDED, RunEvent.STOP): RunState.STOPPING,
    (RunState.SUSPENDED, RunEvent.END): RunState.ENDED,
    (RunState.STOPPING, RunEvent.STARTED): RunState.STOPPING,
    (RunState.STOPPING, RunEvent.STOP): RunState.STOPPING,
    (RunState.STOPPING, RunEvent.END): RunState.ENDED,
}


class Cause(enum.StrEnum):
    """Why a run ended. The list is closed: "failed" without a cause does not exist."""

    SUCCEEDED = "succeeded"
    EXIT_CODE = "exit_code"
    SIGNAL = "signal"
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"
    GPU_OUT_OF_MEMORY = "gpu_out_of_memory"
    GPU_ERROR = "gpu_error"
    GPU_FAULT = "gpu_fault"
    GPU_MEMORY_EXCEEDED = "gpu_memory_exceeded"
    LEASE_LOST = "lease_lost"
    SUPERSEDED = "superseded"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    HOST_REBOOTED = "host_rebooted"
    HOST_SHUTDOWN = "host_shutdown"
    AGENT_LOST = "agent_lost"
    LAUNCH_FAILED = "launch_failed"
    DISK_FULL = "disk_full"
    POLICY_REFUSED = "policy_refused"
    DEPENDENCY_FAILED = "dependency_failed"


class Retry(enum.StrEnum):
    """Whether a run that ended so is followed by another one."""

    NEVER = "never"
    ASKED = "asked"
    """If the task's retry policy names the cause and has retries left; costs one."""
    FREE = "free"
    """Not the task's doing: costs none of its retries (bounded by `limits.FREE_RETRIES_MAX`)."""
    ON_REBOOT = "on_reboot"
    """As `on_reboot` says, at no cost."""


EXIT_TIMED_OUT: Final = 124
EXIT_LOST: Final = 125
EXIT_NOT_EXECUTABLE: Final = 126
EXIT_NOT_FOUND: Final = 127
EXIT_KILLED: Final = 137
EXIT_TERMINATED: Final = 143


class CauseRule(NamedTuple):
    """What follows from a cause.

    `fallback_exit_code` goes over the wire when the process has no non-zero code of its own, or when
    `uses_own_exit_code` is false. `is_reported` is false only where another attempt has taken over.
    """

    retry: Retry
    retry_on: RetryOn | None
    final_state: TaskState
    fallback_exit_code: int
    uses_own_exit_code: bool = True
    is_reported: bool = True


CAUSE_RULES: Final[dict[Cause, CauseRule]] = {
    Cause.SUCCEEDED: CauseRule(Retry.NEVER, None, TaskState.COMPLETED, 0),
    Cause.EXIT_CODE: CauseRule(Retry.ASKED, RetryOn.EXIT_CODE, TaskState.FAILED, 1),
    Cause.SIGNAL: CauseRule(Retry.ASKED, RetryOn.SIGNAL, TaskState.FAILED, EXIT_KILLED),
    Cause.TIMED_OUT: CauseRule(Retry.ASKED, RetryOn.TIMED_OUT, TaskState.FAILED, EXIT_TIMED_OUT, False),
    Cause.OUT_OF_MEMORY: CauseRule(Retry.ASKED, RetryOn.OUT_OF_MEMORY, TaskState.FAILED, EXIT_KILLED),
    Cause.GPU_OUT_OF_MEMORY: CauseRule(Retry.ASKED, RetryOn.GPU_OUT_OF_MEMORY, TaskState.FAILED, 1),
    Cause.GPU_ERROR: CauseRule(Retry.ASKED, RetryOn.GPU_ERROR, TaskState.FAILED, 1),
    Cause.GPU_FAULT: CauseRule(Retry.FREE, None, TaskState.FAILED, EXIT_LOST, False),
    Cause.GPU_MEMORY_EXCEEDED: CauseRule(Retry.NEVER, None, TaskState.FAILED, EXIT_KILLED, False),
    Cause.LEASE_LOST: CauseRule(Retry.NEVER, None, TaskState.FAILED, EXIT_LOST, False),
    Cause.SUPERSEDED: CauseRule(Retry.NEVER, None, TaskState.FAILED, EXIT_LOST, False, is_reported=False),
    Cause.PREEMPTED: CauseRule(Retry.FREE, None, TaskState.FAILED, EXIT_LOST, False),
    Cause.CANCELLED: CauseRule(Retry.NEVER, None, TaskState.CANCELLED, EXIT_TERMINATED),
    Cause.STOPPED: CauseRule(Retry.NEVER, None, TaskState.CANCELLED, EXIT_TERMINATED),
    Cause.HOST_REBOOTED: CauseRule(Retry.ON_REBOOT, None, TaskState.FAILED, EXIT_LOST, False),
    Cause.HOST_SHUTDOWN: CauseRule(Retry.ON_REBOOT, None, TaskState.FAILED, EXIT_LOST, False),
    Cause.AGENT_LOST: CauseRule(Retry.FREE, None, TaskState.FAILED, EXIT_LOST, False),
    Cause.LAUNCH_FAILED: CauseRule(Retry.ASKED, RetryOn.LAUNCH_FAILED, TaskState.FAILED, EXIT_NOT_EXECUTABLE, False),
    Cause.DISK_FULL: CauseRule(Retry.ASKED, RetryOn.DISK_FULL, TaskState.FAILED, EXIT_NOT_EXECUTABLE, False),
    Cause.POLICY_REFUSED: CauseRule(Retry.NEVER, None, TaskState.FAILED, EXIT_NOT_EXECUTABLE, False),
    Cause.DEPENDENCY_FAILED: CauseRule(Retry.NEVER, None, TaskState.CANCELLED, EXIT_LOST, False),
}

STOP_CAUSES: Final = frozenset(
    {
        Cause.CANCELLED,
        Cause.STOPPED,
        Cause.LEASE_LOST,
        Cause.SUPERSEDED,
        Cause.PREEMPTED,
        Cause.GPU_FAULT,
        Cause.GPU_MEMORY_EXCEEDED,
        Cause.HOST_SHUTDOWN,
    }
)
"""What somebody may ask a run to be stopped for; the run ends with it if the request came first."""


def wire_exit_code(cause: Cause, exit_code: int | None, signal: int | None, launch_errno: int | None = None) -> int:
    """The `exit_code` of the completion: 0 only for success (protocol.md, section 1).

    `exit_code` and `signal` are the main process's own; `launch_errno` is set when it never started
    (ENOENT gives 127 by the shell's convention, everything else 126).
    """
    rule = CAUSE_RULES[cause]
    if cause is Cause.SUCCEEDED:
        return 0
    if cause is Cause.LAUNCH_FAILED and launch_errno == errno.ENOENT:
        return EXIT_NOT_FOUND
    if rule.uses_own_exit_code:
        if signal is not None:
            return 128 + signal
        if exit_code:
            return exit_code
    return rule.fallback_exit_code
