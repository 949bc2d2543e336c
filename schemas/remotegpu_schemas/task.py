"""What is to be run: a task, its resources and its rules for retrying. Frozen; extras are refused.

Units: seconds for durations, `memory_gb` in GiB as an operator writes it. The wire's dialects end in `wire`,
the YAML forms in `taskfile.py`; both end here.
"""

from __future__ import annotations

import enum
import math
from typing import Annotated, NewType, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from remotegpu_schemas import limits
from remotegpu_schemas.forms import no_nul

TaskId = NewType("TaskId", str)

PRIORITY_MOST_URGENT = 1
PRIORITY_DEFAULT = 5
PRIORITY_LEAST_URGENT = 10


def _argument(value: str) -> str:
    no_nul(value)
    if len(value.encode()) >= limits.ARGUMENT_MAX_BYTES:
        raise ValueError(f"is longer than {limits.ARGUMENT_MAX_BYTES - 1} bytes, which Linux refuses")
    return value


def _environment_name(value: str) -> str:
    if not value or "=" in value:
        raise ValueError("an environment name must not be empty or contain '='")
    return no_nul(value)


Identifier = Annotated[str, StringConstraints(pattern=rf"^{limits.ID_PATTERN}$")]
Argument = Annotated[str, AfterValidator(_argument)]
LabelText = Annotated[str, StringConstraints(max_length=limits.LABEL_MAX_CHARS), AfterValidator(no_nul)]
EnvironmentName = Annotated[str, AfterValidator(_environment_name)]
Priority = Annotated[int, Field(ge=PRIORITY_MOST_URGENT, le=PRIORITY_LEAST_URGENT)]
Seconds = Annotated[float, Field(ge=0, le=limits.TIMEOUT_MAX_S, allow_inf_nan=False)]


class Strict(BaseModel):
    """A frozen model that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskType(enum.StrEnum):
    """How `command` is read. `container` is known to the format; the executor refuses what this host cannot run."""

    SHELL = "shell"
    PYTHON = "python"
    SCRIPT = "script"
    CONTAINER = "container"


class Resources(Strict):
    """What a task occupies while it runs. Zero means: nothing counted."""

    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    cpus: Annotated[float, Field(ge=0, le=4096, allow_inf_nan=False)] = 0.0
    memory_gb: Annotated[float, Field(ge=0, le=65536, allow_inf_nan=False)] = 0.0

    @property
    def memory_mb(self) -> int:
        """The memory request in MiB, rounded up."""
        return math.ceil(self.memory_gb * 1024)


class Backoff(enum.StrEnum):
    """How the delay between retries grows."""

    FIXED = "fixed"
    EXPONENTIAL = "exponential"


class RetryOn(enum.StrEnum):
    """The causes that a task may ask to be retried for, at the cost of one of its retries.

    `gpu_fault` is known to the format and needs no asking: it is not the task's doing and costs nothing.
    """

    EXIT_CODE = "exit_code"
    SIGNAL = "signal"
    TIMED_OUT = "timed_out"
    OUT_OF_MEMORY = "out_of_memory"
    GPU_OUT_OF_MEMORY = "gpu_out_of_memory"
    GPU_ERROR = "gpu_error"
    GPU_FAULT = "gpu_fault"
    LAUNCH_FAILED = "launch_failed"
    DISK_FULL = "disk_full"


DEFAULT_RETRY_ON = frozenset(
    {
        RetryOn.EXIT_CODE,
        RetryOn.SIGNAL,
        RetryOn.OUT_OF_MEMORY,
        RetryOn.GPU_OUT_OF_MEMORY,
        RetryOn.GPU_ERROR,
        RetryOn.GPU_FAULT,
        RetryOn.LAUNCH_FAILED,
        RetryOn.DISK_FULL,
    }
)


class RetryPolicy(Strict):
    """When a failed run is followed by another one, under the same attempt and lease.

    The n-th retry waits `delay_s` (fixed) or `delay_s * 2**(n-1)` (exponential), at most `max_delay_s`.
    An empty `exit_codes` means every code but 0.
    """

    max: Annotated[int, Field(ge=0, le=limits.RETRIES_MAX)] = 0
    delay_s: Seconds = 0.0
    backoff: Backoff = Backoff.FIXED
    max_delay_s: Seconds = 3600.0
    on: frozenset[RetryOn] = DEFAULT_RETRY_ON
    exit_codes: frozenset[int] = frozenset()


SIGNALS_WITHOUT_HANDLER = frozenset({9, 19})
"""SIGKILL and SIGSTOP (signal(7)): no process can hear them."""


def _can_be_heard(value: int) -> int:
    if value in SIGNALS_WITHOUT_HANDLER:
        raise ValueError("must be a signal that a task can handle; SIGKILL and SIGSTOP are none")
    return value


AudibleSignal = Annotated[int, Field(ge=1, le=64), AfterValidator(_can_be_heard)]


class Warn(Strict):
    """A signal `before_s` ahead of the timeout and of the lease's stop, to those processes that listen for it."""

    signal: AudibleSignal = 10
    before_s: Annotated[float, Field(gt=0, le=limits.TIMEOUT_MAX_S, allow_inf_nan=False)]


class OnUnreachable(enum.StrEnum):
    """What happens to a leased run when the control plane cannot be reached until its lease ends."""

    STOP = "stop"
    CONTINUE = "continue"


class Task(Strict):
    """One task, as the queue keeps it. `command` without `args` is a shell string; with `args` it is a vector.

    An empty `args` is a vector of one: `args=()` differs from `args=None`.
    """

    id: Identifier
    name: Annotated[str, StringConstraints(max_length=limits.NAME_MAX_CHARS), AfterValidator(no_nul)] = ""
    type: TaskType = TaskType.SHELL
    command: Argument | None = None
    args: tuple[Argument, ...] | None = Field(default=None, max_length=limits.ARGUMENTS_MAX_COUNT)
    script: Annotated[str, AfterValidator(no_nul)] | None = None
    interpreter: Argument | None = None
    workdir: Argument | None = None
    env: dict[EnvironmentName, Argument] = Field(default={}, max_length=limits.ENVIRONMENT_MAX_COUNT)
    resources: Resources = Resources()
    timeout_s: Seconds = 0.0
    grace_period_s: Seconds | None = None
    priority: Priority = PRIORITY_DEFAULT
    stop_signal: Annotated[int, Field(ge=1, le=64)] = 15
    warn: Warn | None = None
    retry: RetryPolicy = RetryPolicy()
    labels: dict[LabelText, LabelText] = Field(default={}, max_length=limits.LABELS_MAX_COUNT)
    group_id: Identifier | None = None
    parent_id: Identifier | None = None

    @model_validator(mode="after")
    def _has_something_to_run(self) -> Self:
        if self.command is None and self.script is None:
            raise ValueError("a task needs a command or a script")
        if self.command is not None and not self.command.strip():
            raise ValueError("command is empty")
        if self.command is not None and self.script is not None:
            raise ValueError("a task has either a command or a script, not both")
        if self.script is not None and not self.script.strip():
            raise ValueError("script is empty")
        return self

    @property
    def task_id(self) -> TaskId:
        """The id, as the type that cannot be mixed up with an attempt's."""
        return TaskId(self.id)
