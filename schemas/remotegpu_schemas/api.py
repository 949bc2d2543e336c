"""Requests and answers of the agent's own HTTP API (protocol.md, section 2). Unknown request keys are ignored.

`/system/info` is the one answer that is not wrapped: deployed control planes read it from the top level.
Times are RFC 3339 UTC with `Z`; memory and disk are bytes; percentages are 0-100.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from remotegpu_schemas import limits
from remotegpu_schemas.states import Cause, RunState, TaskState

DataT = TypeVar("DataT")

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
"""RFC 3339 in UTC, with `Z`."""


class Message(BaseModel):
    """A request or an answer; keys that this version does not know are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Envelope(Message, Generic[DataT]):
    """Every answer but `/system/info`, `/metrics`, `/openapi.json` and event streams."""

    success: bool
    code: int
    message: str
    data: DataT | None
    timestamp: Time


class Ping(Message):
    """Answer of GET /ping; the only call that needs no token."""

    ok: Literal[True] = True
    version: str
    agent_id: str
    state: str


class GpuInfo(Message):
    """One GPU in `/system/info`."""

    index: int
    name: str
    memory_total: int
    memory_used: int
    utilization: int
    temperature: int


class SystemInfo(Message):
    """Answer of GET /system/info, sent without an envelope. CPU, memory and disk figures are never zero."""

    hostname: str
    os: str
    kernel: str
    cpu_cores: int
    memory_total: int
    memory_free: int
    disk_total: int
    disk_free: int
    gpu_count: int
    gpu_info: list[GpuInfo]
    uptime: int
    agent_id: str
    machine_id: str
    agent_version: str
    architecture: str
    ip_addresses: list[str]
    boot_time: str
    load_average: list[float]
    warnings: list[str]


class StopSignal(enum.StrEnum):
    """What POST /process/stop may send."""

    SIGTERM = "SIGTERM"
    SIGKILL = "SIGKILL"


def _default_signal(value: object) -> object:
    return StopSignal.SIGTERM if value in (None, "") else value


class ProcessStopRequest(Message):
    """Body of POST /process/stop. `host_id` may be anything; deployed callers send their own id.

    `process_id` is a JSON integer, never a string, float or bool, and fits the kernel's `pid_t`. An empty or null
    `signal` is the default one.
    """

    process_id: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
    signal: Annotated[
        StopSignal,
        BeforeValidator(_default_signal),
        WithJsonSchema({"enum": [*(signal.value for signal in StopSignal), "", None]}),
    ] = StopSignal.SIGTERM
    host_id: Any = None


class ProcessStopAnswer(Message):
    """`state` is `stopped` when the whole tree is gone, `stopping` when that takes longer than 8 s."""

    process_id: int
    state: Literal["stopped", "stopping"]
    task_id: str
    attempt_id: str
    run_no: int
    exit_code: int | None = None
    cause: Cause | None = None


class RunView(Message):
    """One start of the task's process."""

    attempt_id: str
    run_no: int
    state: RunState
    cause: Cause | None
    process_id: int | None
    exit_code: int | None
    signal: int | None
    error: str | None
    started_at: Time | None
    ended_at: Time | None
    usage: dict[str, float] | None


class TaskView(Message):
    """A task as the API and the CLI show it. `reason` says why it does not run, if it does not."""

    id: str
    name: str
    origin: Literal["local", "control_plane"]
    state: TaskState
    cause: Cause | None
    exit_code: int | None
    error: str | None
    reason: str | None
    priority: int
    command: str
    labels: dict[str, str]
    attempt_id: str
    run_no: int
    retries_used: int
    max_retries: int
    process_id: int | None
    progress_percent: float | None
    progress_message: str | None
    submitted_at: Time
    started_at: Time | None
    ended_at: Time | None
    is_stopping: bool
    lease_left_s: float | None
    is_synced: bool


class TaskDetail(TaskView):
    """GET /tasks/{id}: the task as it was submitted (values of its environment left out) and all its runs."""

    task: dict[str, Any]
    runs: list[RunView]


class TaskPage(Message):
    """GET /tasks?state=&limit=&offset=&label=k=v, newest first; `total` counts all that match."""

    tasks: list[TaskView]
    total: int
    limit: Annotated[int, Field(ge=1, le=limits.API_LIST_MAX)]
    offset: int


class SubmitAnswer(Message):
    """POST /tasks: the ids, in the order of the documents."""

    task_ids: list[str]


class LogChunk(Message):
    """GET /tasks/{id}/logs?stream=stdout|stderr&offset=N&limit=N&run=N.

    `text` is the bytes from `offset` (which is later than the one asked for when output was dropped at the bound)
    with what is not UTF-8 replaced; `next_offset` is in bytes. `is_end` says that no more will come.
    """

    stream: Literal["stdout", "stderr"]
    run_no: int
    offset: int
    next_offset: int
    text: str
    is_end: bool


class Capacity(Message):
    """Slots, CPUs and memory: in all, and what running tasks hold of it."""

    slots: int
    slots_used: int
    cpus: float
    cpus_used: float
    memory_mb: int
    memory_mb_used: int


class ControlPlaneStatus(Message):
    """How the agent stands with the control plane; `url` is null for a stand-alone agent."""

    url: str | None
    is_connected: bool
    is_registered: bool
    last_contact_at: Time | None
    error: str | None


class BlockView(Message):
    """A reason not to claim tasks: `kind` for machines, `reason` for people."""

    kind: str
    reason: str


class DrainRequest(Message):
    """Body of POST /drain, which may be empty; `reason` is shown wherever somebody asks why nothing runs."""

    reason: Annotated[str, Field(max_length=limits.DRAIN_REASON_MAX_CHARS)] = ""


class DrainAnswer(Message):
    """Answer of GET and POST /drain and POST /undrain.

    `is_drained` says that nothing runs and nothing claimed waits any more: the host may be taken away.
    """

    is_draining: bool
    is_drained: bool
    reason: str | None
    by: str | None
    since: Time | None
    running: int
    waiting: int


class DeadLetter(Message):
    """A report that the control plane has refused for good, with its answer in `error` and all that it says."""

    id: int
    kind: str
    task_id: str
    attempt_id: str
    created_at: Time
    tries: int
    error: str | None
    body: dict[str, Any]


class DeadLetterPage(Message):
    """GET /dead-letters?limit=&offset=, oldest first; bodies are left out here."""

    dead_letters: list[DeadLetter]
    total: int
    limit: int
    offset: int


class QueueStatus(Message):
    """GET /queue/status. `blocks` is what keeps the agent from claiming tasks."""

    agent_id: str
    machine_id: str
    version: str
    state: Literal["ready", "draining", "degraded"]
    reasons: list[str]
    blocks: list[BlockView]
    uptime_s: float
    tasks: dict[str, int]
    capacity: Capacity
    reports_waiting: int
    dead_letters: int
    control_plane: ControlPlaneStatus
