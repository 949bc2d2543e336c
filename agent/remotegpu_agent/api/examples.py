"""One example of each request and answer for the description of the API: typed, so that they cannot grow stale."""

from __future__ import annotations

from typing import Any, Final

from remotegpu_schemas.api import (
    Capacity,
    ControlPlaneStatus,
    DeadLetter,
    DeadLetterPage,
    DrainAnswer,
    DrainRequest,
    GpuInfo,
    LogChunk,
    Message,
    Ping,
    ProcessStopAnswer,
    ProcessStopRequest,
    QueueStatus,
    RunView,
    SubmitAnswer,
    SystemInfo,
    TaskDetail,
    TaskPage,
    TaskView,
)
from remotegpu_schemas.limits import GIB
from remotegpu_schemas.states import RunState, TaskState

TIMESTAMP: Final = "2026-02-05T12:00:00.000Z"
TASK_ID: Final = "0198a2f0-4d6e-7c11-9a53-2f60c1b7d9e4"
_ATTEMPT_ID: Final = "0198a2f0-4d6f-70aa-8b1e-5d0c7e8f9a01"
_AGENT_ID: Final = "agent-1"
_MACHINE_ID: Final = "machine-1"

PING: Final = Ping(version="0.1.0", agent_id=_AGENT_ID, state="ready")

SYSTEM_INFO: Final = SystemInfo(
    hostname="gpu-1",
    os="Debian GNU/Linux 12 (bookworm)",
    kernel="6.1.0-18-amd64",
    cpu_cores=64,
    memory_total=512 * GIB,
    memory_free=400 * GIB,
    disk_total=2000 * GIB,
    disk_free=1500 * GIB,
    gpu_count=1,
    gpu_info=[
        GpuInfo(
            index=0,
            name="NVIDIA H100 80GB HBM3",
            memory_total=80 * GIB,
            memory_used=2 * GIB,
            utilization=97,
            temperature=61,
        )
    ],
    uptime=86400,
    agent_id=_AGENT_ID,
    machine_id=_MACHINE_ID,
    agent_version="0.1.0",
    architecture="x86_64",
    ip_addresses=["10.0.0.1"],
    boot_time="2026-02-04T12:00:00Z",
    load_average=[1.5, 1.2, 0.9],
    warnings=[],
)

STOP_REQUEST: Final = ProcessStopRequest(process_id=4711)
STOPPED: Final = ProcessStopAnswer(
    process_id=4711, state="stopped", task_id=TASK_ID, attempt_id=_ATTEMPT_ID, run_no=1, exit_code=143
)

QUEUE_STATUS: Final = QueueStatus(
    agent_id=_AGENT_ID,
    machine_id=_MACHINE_ID,
    version="0.1.0",
    state="ready",
    reasons=[],
    blocks=[],
    uptime_s=3600.0,
    tasks={"running": 1, "pending": 3, "completed": 120},
    capacity=Capacity(slots=4, slots_used=1, cpus=64.0, cpus_used=8.0, memory_mb=524288, memory_mb_used=65536),
    reports_waiting=0,
    dead_letters=1,
    control_plane=ControlPlaneStatus(
        url="https://plane.example", is_connected=True, is_registered=True, last_contact_at=TIMESTAMP, error=None
    ),
)

METRICS: Final = """\
# HELP remotegpu_slots Slots for tasks.
# TYPE remotegpu_slots gauge
remotegpu_slots 4.0
"""

TASK_FILE: Final[dict[str, Any]] = {
    "task": {
        "name": "train",
        "command": "python",
        "args": ["train.py", "--epochs=100"],
        "env": {"SEED": "1"},
        "resources": {"gpus": 1, "cpus": 8, "memory_gb": 64},
        "timeout": "24h",
        "labels": {"team": "vision"},
    }
}
SUBMITTED: Final = SubmitAnswer(task_ids=[TASK_ID])


def _task(state: TaskState) -> TaskView:
    return TaskView(
        id=TASK_ID,
        name="train",
        origin="local",
        state=state,
        cause=None,
        exit_code=None,
        error=None,
        reason=None,
        priority=5,
        command="python train.py --epochs=100",
        labels={"team": "vision"},
        attempt_id=_ATTEMPT_ID,
        run_no=1,
        retries_used=0,
        max_retries=0,
        process_id=4711,
        progress_percent=12.5,
        progress_message="epoch 12 of 100",
        submitted_at="2026-02-05T11:00:00.000Z",
        started_at="2026-02-05T11:00:01.000Z",
        ended_at=None,
        is_stopping=False,
        lease_left_s=None,
        is_synced=True,
    )


TASK: Final = _task(TaskState.RUNNING)
TASK_SUSPENDED: Final = _task(TaskState.SUSPENDED)
TASK_PAGE: Final = TaskPage(tasks=[TASK], total=1, limit=100, offset=0)
TASK_DETAIL: Final = TaskDetail(
    **dict(TASK),
    task={"id": TASK_ID, "name": "train", "command": "python", "env": {"SEED": "[hidden]"}},
    runs=[
        RunView(
            attempt_id=_ATTEMPT_ID,
            run_no=1,
            state=RunState.RUNNING,
            cause=None,
            process_id=4711,
            exit_code=None,
            signal=None,
            error=None,
            started_at="2026-02-05T11:00:01.000Z",
            ended_at=None,
            usage=None,
        )
    ],
)

LOG_CHUNK: Final = LogChunk(stream="stdout", run_no=1, offset=0, next_offset=14, text="epoch 1 of 10\n", is_end=False)
LOG_EVENT: Final = {"id": str(LOG_CHUNK.next_offset), "event": "message", "data": LOG_CHUNK.model_dump_json()}

DRAIN_REQUEST: Final = DrainRequest(reason="new driver")
DRAINING: Final = DrainAnswer(
    is_draining=True, is_drained=False, reason="new driver", by="uid:0", since=TIMESTAMP, running=1, waiting=0
)
NOT_DRAINING: Final = DrainAnswer(
    is_draining=False, is_drained=False, reason=None, by=None, since=None, running=1, waiting=0
)

DEAD_LETTER: Final = DeadLetter(
    id=17,
    kind="complete",
    task_id=TASK_ID,
    attempt_id=_ATTEMPT_ID,
    created_at=TIMESTAMP,
    tries=1,
    error="30005: exit_code is missing",
    body={"exit_code": 0},
)
DEAD_LETTER_PAGE: Final = DeadLetterPage(
    dead_letters=[DEAD_LETTER.model_copy(update={"body": {}})], total=1, limit=100, offset=0
)


def plain(message: Message) -> dict[str, Any]:
    """An example as JSON shows it."""
    return message.model_dump(mode="json")
