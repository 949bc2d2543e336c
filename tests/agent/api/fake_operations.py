"""A hand-written stand-in for the daemon behind the API: it answers at once, and tests hold or break single calls."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence

from remotegpu_agent.operations import Stream
from remotegpu_agent.task_user import Submitter
from remotegpu_schemas.api import (
    Capacity,
    ControlPlaneStatus,
    DeadLetter,
    DeadLetterPage,
    DrainAnswer,
    LogChunk,
    Ping,
    ProcessStopAnswer,
    ProcessStopRequest,
    QueueStatus,
    SystemInfo,
    TaskDetail,
    TaskPage,
    TaskView,
)
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.states import TaskState
from remotegpu_schemas.task import Task

TASK_ID = "task-1"
PROCESS_ID = 4711
MACHINE_ID = "machine-1"


def task_view(state: TaskState = TaskState.RUNNING) -> TaskView:
    """The one task of the fake."""
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
        command="python train.py",
        labels={"team": "vision"},
        attempt_id="attempt-1",
        run_no=1,
        retries_used=0,
        max_retries=0,
        process_id=PROCESS_ID,
        progress_percent=None,
        progress_message=None,
        submitted_at="2026-02-05T12:00:00Z",
        started_at=None,
        ended_at=None,
        is_stopping=False,
        lease_left_s=None,
        is_synced=True,
    )


def chunk(text: str, offset: int = 0, *, is_end: bool = False) -> LogChunk:
    """A piece of standard output of the first run."""
    end = offset + len(text.encode())
    return LogChunk(stream="stdout", run_no=1, offset=offset, next_offset=end, text=text, is_end=is_end)


DEAD_LETTER = DeadLetter(
    id=17,
    kind="complete",
    task_id=TASK_ID,
    attempt_id="attempt-1",
    created_at="2026-02-05T12:00:00Z",
    tries=1,
    error="30005: exit_code is missing",
    body={"exit_code": 0},
)


def drain_answer(reason: str | None) -> DrainAnswer:
    """Draining for this reason, or not."""
    is_on = reason is not None
    by, since = ("root", "2026-02-05T12:00:00Z") if is_on else (None, None)
    return DrainAnswer(is_draining=is_on, is_drained=False, reason=reason, by=by, since=since, running=1, waiting=0)


class FakeOperations:
    """Knows one task and one process. `failure` is raised by every call; events hold the calls named after them."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.calls: list[tuple[str, dict[str, object]]] = []
        self.submitted: list[Task] = []
        self.submitters: list[Submitter | None] = []
        self.task_ended = asyncio.Event()
        self.show_waits = asyncio.Event()
        self.show_cancelled = asyncio.Event()
        self.submit_entered = asyncio.Event()
        self.submit_may_go = asyncio.Event()
        self.submit_may_go.set()
        self.stop_may_go = asyncio.Event()
        self.stop_may_go.set()
        self.chunks: asyncio.Queue[LogChunk | Exception] = asyncio.Queue()
        self.follower_opened = asyncio.Event()
        self.follower_closed = asyncio.Event()

    def ping(self) -> Ping:
        """As it says."""
        self._called("ping")
        return Ping(version="0.1.0", agent_id="agent-1", state="ready")

    async def system_info(self) -> SystemInfo:
        """As it says."""
        self._called("system_info")
        return SystemInfo(
            hostname="gpu-1",
            os="Debian GNU/Linux 12",
            kernel="6.1",
            cpu_cores=8,
            memory_total=1 << 34,
            memory_free=1 << 33,
            disk_total=1 << 40,
            disk_free=1 << 39,
            gpu_count=0,
            gpu_info=[],
            uptime=10,
            agent_id="agent-1",
            machine_id=MACHINE_ID,
            agent_version="0.1.0",
            architecture="x86_64",
            ip_addresses=["10.0.0.1"],
            boot_time="2026-02-05T12:00:00Z",
            load_average=[0.1, 0.2, 0.3],
            warnings=[],
        )

    async def submit(self, tasks: Sequence[Task], submitter: Submitter | None) -> list[str]:
        """As it says."""
        self._called("submit")
        self.submitters.append(submitter)
        self.submit_entered.set()
        await self.submit_may_go.wait()
        self.submitted.extend(tasks)
        return [task.id for task in tasks]

    async def list_tasks(
        self, *, states: Sequence[TaskState], labels: Mapping[str, str], limit: int, offset: int
    ) -> TaskPage:
        """As it says."""
        self._called("list_tasks", states=list(states), labels=dict(labels), limit=limit, offset=offset)
        return TaskPage(tasks=[task_view()], total=1, limit=limit, offset=offset)

    async def show_task(self, task_id: str, *, wait_s: float = 0.0) -> TaskDetail:
        """As it says."""
        self._called("show_task", task_id=task_id, wait_s=wait_s)
        self._known(task_id)
        if wait_s > 0 and not self.task_ended.is_set():
            self.show_waits.set()
            try:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.task_ended.wait(), wait_s)
            except asyncio.CancelledError:
                self.show_cancelled.set()
                raise
        state = TaskState.COMPLETED if self.task_ended.is_set() else TaskState.RUNNING
        return TaskDetail(**task_view(state).model_dump(), task={"command": "python train.py"}, runs=[])

    async def cancel_task(self, task_id: str) -> TaskView:
        """As it says."""
        self._called("cancel_task", task_id=task_id)
        self._known(task_id)
        return task_view(TaskState.CANCELLED)

    async def suspend_task(self, task_id: str) -> TaskView:
        """As it says."""
        self._called("suspend_task", task_id=task_id)
        self._known(task_id)
        return task_view(TaskState.SUSPENDED)

    async def resume_task(self, task_id: str) -> TaskView:
        """As it says."""
        self._called("resume_task", task_id=task_id)
        self._known(task_id)
        raise Refused(Code.STATE_CONFLICT)

    async def read_log(self, task_id: str, *, stream: Stream, offset: int, limit: int, run_no: int | None) -> LogChunk:
        """As it says."""
        self._called("read_log", stream=stream, offset=offset, limit=limit, run_no=run_no)
        self._known(task_id)
        return chunk("hello\n")

    async def follow_log(
        self, task_id: str, *, stream: Stream, offset: int, run_no: int | None
    ) -> AsyncGenerator[LogChunk, None]:
        """As it says; ends after the chunk that says so."""
        self._called("follow_log", task_id=task_id, stream=stream, offset=offset, run_no=run_no)
        self.follower_opened.set()
        try:
            while True:
                item = await self.chunks.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.is_end:
                    return
        finally:
            self.follower_closed.set()

    async def stop_process(self, request: ProcessStopRequest) -> ProcessStopAnswer:
        """As it says."""
        self._called("stop_process", process_id=request.process_id, signal=request.signal.value)
        if request.process_id != PROCESS_ID:
            raise Refused(Code.PROCESS_NOT_MANAGED)
        await self.stop_may_go.wait()
        return ProcessStopAnswer(
            process_id=PROCESS_ID, state="stopped", task_id=TASK_ID, attempt_id="attempt-1", run_no=1
        )

    async def drain(self, by: str, reason: str) -> DrainAnswer:
        """As it says."""
        self._called("drain", by=by, reason=reason)
        return drain_answer(reason)

    async def undrain(self) -> DrainAnswer:
        """As it says."""
        self._called("undrain")
        return drain_answer(None)

    async def drain_state(self, *, wait_s: float = 0.0) -> DrainAnswer:
        """As it says."""
        self._called("drain_state", wait_s=wait_s)
        return drain_answer("new driver")

    async def metrics(self) -> bytes:
        """As it says."""
        self._called("metrics")
        return b"# EOF"

    async def dead_letters(self, *, limit: int, offset: int) -> DeadLetterPage:
        """As it says."""
        self._called("dead_letters", limit=limit, offset=offset)
        return DeadLetterPage(dead_letters=[DEAD_LETTER], total=1, limit=limit, offset=offset)

    async def show_dead_letter(self, letter_id: int) -> DeadLetter:
        """As it says."""
        return self._letter("show_dead_letter", letter_id)

    async def resend_dead_letter(self, letter_id: int) -> DeadLetter:
        """As it says."""
        return self._letter("resend_dead_letter", letter_id)

    async def drop_dead_letter(self, letter_id: int) -> DeadLetter:
        """As it says."""
        return self._letter("drop_dead_letter", letter_id)

    def _letter(self, call: str, letter_id: int) -> DeadLetter:
        self._called(call, letter_id=letter_id)
        if letter_id != DEAD_LETTER.id:
            raise Refused(Code.DEAD_LETTER_NOT_FOUND)
        return DEAD_LETTER

    async def queue_status(self) -> QueueStatus:
        """As it says."""
        self._called("queue_status")
        return QueueStatus(
            agent_id="agent-1",
            machine_id=MACHINE_ID,
            version="0.1.0",
            state="ready",
            reasons=[],
            blocks=[],
            uptime_s=1.0,
            tasks={"running": 1},
            capacity=Capacity(slots=1, slots_used=1, cpus=8, cpus_used=0, memory_mb=1024, memory_mb_used=0),
            reports_waiting=0,
            dead_letters=0,
            control_plane=ControlPlaneStatus(
                url=None, is_connected=False, is_registered=False, last_contact_at=None, error=None
            ),
        )

    def _called(self, name: str, **arguments: object) -> None:
        self.calls.append((name, arguments))
        if self.failure is not None:
            raise self.failure

    def _known(self, task_id: str) -> None:
        if task_id != TASK_ID:
            raise Refused(Code.TASK_NOT_FOUND)
