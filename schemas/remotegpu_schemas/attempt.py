"""Attempts, leases and runs: who holds a task, until when, and the contract with the shim.

An attempt is one claim of a task; a run is one start of its process. `RunSpec` and `RunRecord` are the
typed faces of the lines in `<state>/attempts/<attempt_id>.<run_no>/record`; the shim itself knows them only as JSON.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, Literal, NewType

from pydantic import BaseModel, ConfigDict, Field

from remotegpu_schemas import limits
from remotegpu_schemas.task import Task, TaskId

AttemptId = NewType("AttemptId", str)
RunNo = NewType("RunNo", int)

RECORD_FORMAT_VERSION = 1
"""Version of the lines in a run's `record`; every later agent must read every earlier version."""


class Frozen(BaseModel):
    """A value that never changes; unknown keys are ignored, because an older or newer peer may have written it."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class ProcessIdentity(Frozen):
    """A process, told apart from every other that ever had its number.

    `start_ticks` is field 22 of /proc/PID/stat (clock ticks after boot, proc(5)); `boot_id` is
    /proc/sys/kernel/random/boot_id.
    """

    boot_id: str
    pid: Annotated[int, Field(ge=1)]
    start_ticks: Annotated[int, Field(ge=0)]


class Lease(Frozen):
    """The right to run an attempt until `deadline_boottime_ns` on this host's CLOCK_BOOTTIME, and of this boot.

    The deadline is already reduced by the margin and counts from before the request was sent; a process tree
    that is still alive at the deadline breaks promise 2.
    """

    ttl_s: Annotated[float, Field(gt=0)]
    deadline_boottime_ns: int
    boot_id: str


class TaskUser(Frozen):
    """The user whose rights a task runs with, resolved by the agent before the launch."""

    name: str
    uid: Annotated[int, Field(ge=0, le=limits.UID_MAX)]
    gid: Annotated[int, Field(ge=0, le=limits.UID_MAX)]
    groups: tuple[int, ...] = ()
    home: str = "/"


class PlacementKind(enum.StrEnum):
    """Where runs are put, the best first; `auto` is the first that is possible."""

    AUTO = "auto"
    SYSTEMD = "systemd"
    """A transient scope each."""
    CGROUP = "cgroup"
    """A control group each, made by the agent itself."""
    PROCESS_GROUP = "process-group"
    """Nowhere in particular."""


class RunLimits(Frozen):
    """What a run may use, where its placement can enforce it; None is no limit.

    `cpus` is a share of processor time; weights are between 1 and 10000, 100 being usual (systemd.resource-control(5));
    `allowed_cpus` is a list as in "0-3,8".
    """

    memory_bytes: Annotated[int, Field(gt=0)] | None = None
    swap_bytes: Annotated[int, Field(ge=0)] | None = None
    cpus: Annotated[float, Field(gt=0)] | None = None
    cpu_weight: Annotated[int, Field(ge=1, le=10_000)] | None = None
    io_weight: Annotated[int, Field(ge=1, le=10_000)] | None = None
    allowed_cpus: Annotated[str, Field(pattern=r"^[0-9][0-9,-]*$")] | None = None
    tasks_max: Annotated[int, Field(gt=0)] | None = None


class Memo(Frozen):
    """What the database knew of the attempt when the run began: enough to write it down again.

    Later versions add keys with defaults only: a run that lives may have been started by an older release.
    """

    task: Task
    origin: Literal["local", "control_plane"]
    submitted_at_ms: int
    started_at_ms: int
    retries_used: Annotated[int, Field(ge=0)] = 0
    free_retries_used: Annotated[int, Field(ge=0)] = 0
    lease: Lease | None = None
    renew_interval_s: Annotated[float, Field(gt=0)] | None = None
    submitter_uid: Annotated[int, Field(ge=0, le=limits.UID_MAX)] | None = None


class RunSpec(Frozen):
    """Everything the shim needs for one run; the first line of `record`, written by the agent.

    The environment is complete: the task gets these variables and no others. Durations are seconds, sizes bytes.
    """

    task_id: TaskId
    attempt_id: AttemptId
    run_no: RunNo
    argv: tuple[str, ...] = Field(min_length=1)
    env: dict[str, str]
    cwd: str
    user: TaskUser | None = None
    umask: Annotated[int, Field(ge=0, le=0o777)] = 0o022
    timeout_s: Annotated[float, Field(gt=0)] | None = None
    grace_period_s: Annotated[float, Field(ge=0)] = 30.0
    lease_grace_s: Annotated[float, Field(ge=0)] = 0.0
    stop_signal: Annotated[int, Field(ge=1, le=64)] = 15
    warn_signal: Annotated[int, Field(ge=1, le=64)] | None = None
    warn_before_s: Annotated[float, Field(gt=0)] | None = None
    """How long before the timeout the warning is due; `lease_warn_s` likewise before the lease's stop."""
    lease_warn_s: Annotated[float, Field(gt=0)] | None = None
    output_limit_bytes: Annotated[int, Field(ge=limits.OUTPUT_LIMIT_MIN_BYTES)] = limits.OUTPUT_LIMIT_DEFAULT_BYTES
    output_segments: Annotated[int, Field(ge=limits.OUTPUT_SEGMENTS_MIN)] = limits.OUTPUT_SEGMENTS_DEFAULT
    """The limit is cut into so many files, of both streams together; the first and the newest are kept."""
    run_limits: RunLimits = RunLimits()
    memo: dict[str, Any] | None = None
    """A `Memo` as JSON, for a database that has lost the attempt; nothing that it holds keeps the run from adoption."""


class RunStarted(Frozen):
    """Second line of `record`: the task's main process exists."""

    process: ProcessIdentity
    shim: ProcessIdentity
    started_wall_ns: int
    started_boottime_ns: int


class EndedBy(enum.StrEnum):
    """What ended the main process, as the shim saw it; the first thing that happened wins."""

    EXIT = "exit"
    """By itself: see `exit_code` or `signal`."""
    STOP = "stop"
    """The agent asked for it; why it asked is in the store."""
    TIMEOUT = "timeout"
    LEASE = "lease"
    LAUNCH = "launch"
    """It never started: see `errno` and `error`."""
    ABANDONED = "abandoned"
    """The agent went away before it said go; nothing was started."""


class RunUsage(Frozen):
    """What the run's process tree used, as far as it was waited for (getrusage(2), RUSAGE_CHILDREN).

    `io_*` is what went to and came from block devices; the page cache costs nothing.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    memory_peak_bytes: int = 0
    io_read_bytes: int = 0
    io_write_bytes: int = 0


class RunEnded(Frozen):
    """Last line of `record`: the main process and its whole tree are gone."""

    ended_by: EndedBy
    exit_code: int | None = None
    signal: int | None = None
    errno: int | None = None
    error: str | None = None
    ended_wall_ns: int
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    output_dropped_bytes: int = 0
    stragglers_killed: int = 0
    oom_kills: int = 0
    """How many of its processes the kernel has killed for want of memory, as far as its placement can tell."""
    usage: RunUsage = RunUsage()


class RunRecord(Frozen):
    """What a run's directory says: the spec always, then started and ended as far as the run came.

    `cgroup` is the path of the run's control group, if it was given one.
    """

    spec: RunSpec
    started: RunStarted | None = None
    ended: RunEnded | None = None
    cgroup: str | None = None
