"""A real API server on a thread of its own, behind it tasks whose states and output the test writes.

The command line is called from the test's thread, in this process or as a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from remotegpu_agent.api import ApiServer, ApiSettings
from remotegpu_agent.audit import AuditLog
from remotegpu_agent.operations import Stream
from remotegpu_agent.task_user import Submitter
from remotegpu_schemas.api import LogChunk, RunView, TaskDetail, TaskPage, TaskView
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.states import FINAL_TASK_STATES, Cause, RunState, TaskState
from remotegpu_schemas.task import Task
from tests.agent.api.fake_operations import MACHINE_ID, FakeOperations, task_view

DEADLINE_S = 20.0


def run_view(run_no: int, **changes: Any) -> RunView:
    """A run that goes on."""
    values: dict[str, Any] = {
        "attempt_id": "attempt-1",
        "run_no": run_no,
        "state": RunState.RUNNING,
        "cause": None,
        "process_id": 4711,
        "exit_code": None,
        "signal": None,
        "error": None,
        "started_at": "2026-02-05T12:00:00Z",
        "ended_at": None,
        "usage": None,
    }
    return RunView(**{**values, **changes})


class ScriptedOperations(FakeOperations):
    """Tasks by id; output by task, run and stream. Lives on the server's loop."""

    def __init__(self) -> None:
        super().__init__()
        self.details: dict[str, TaskDetail] = {}
        self.refuse: dict[str, Refused] = {}
        """By the name of a call: how it is refused."""
        self.output: dict[tuple[str, int, str], bytes] = {}
        self.called = threading.Condition()
        self._changed = asyncio.Event()

    def add(self, task_id: str, state: TaskState = TaskState.RUNNING, runs: int = 1, **changes: Any) -> None:
        """A task with so many runs."""
        values: dict[str, Any] = {**task_view(state).model_dump(), "id": task_id, **changes}
        values["task"], values["runs"] = {"command": "train"}, [run_view(number + 1) for number in range(runs)]
        self.details[task_id] = TaskDetail(**values)
        self.change()

    def start_run(self, task_id: str) -> None:
        """One run more."""
        detail = self.details[task_id]
        runs = [*detail.runs, run_view(len(detail.runs) + 1)]
        self.details[task_id] = detail.model_copy(update={"runs": runs, "state": TaskState.RUNNING})
        self.change()

    def write(self, task_id: str, data: bytes, stream: str = "stdout", run_no: int = 1) -> None:
        """More output."""
        key = (task_id, run_no, stream)
        self.output[key] = self.output.get(key, b"") + data
        self.change()

    def end_run(self, task_id: str, **changes: Any) -> None:
        """The last run has ended; its output is whole."""
        detail = self.details[task_id]
        last = detail.runs[-1].model_copy(update={"state": RunState.ENDED, **changes})
        self.details[task_id] = detail.model_copy(update={"runs": [*detail.runs[:-1], last]})
        self.change()

    def end(self, task_id: str, state: TaskState = TaskState.COMPLETED, **changes: Any) -> None:
        """The task has ended, and its last run with it."""
        if self.details[task_id].runs:
            self.end_run(task_id, **{key: value for key, value in changes.items() if key in RunView.model_fields})
        known = {key: value for key, value in changes.items() if key in TaskDetail.model_fields}
        self.details[task_id] = self.details[task_id].model_copy(update={"state": state, **known})
        self.change()

    def change(self) -> None:
        """Wake everybody who waits."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def submit(self, tasks: Sequence[Task], submitter: Submitter | None) -> list[str]:
        """As it says."""
        task_ids = await super().submit(tasks, submitter)
        for task in tasks:
            self.add(task.id, TaskState.PENDING, runs=0, name=task.name or "")
        return task_ids

    async def list_tasks(
        self, *, states: Sequence[TaskState], labels: Mapping[str, str], limit: int, offset: int
    ) -> TaskPage:
        """As it says; labels are not looked at."""
        self._called("list_tasks", states=list(states), labels=dict(labels), limit=limit, offset=offset)
        found = [task for task in self.details.values() if not states or task.state in states]
        views = [TaskView(**task.model_dump(include=set(TaskView.model_fields))) for task in found]
        return TaskPage(tasks=views[offset : offset + limit], total=len(found), limit=limit, offset=offset)

    async def show_task(self, task_id: str, *, wait_s: float = 0.0) -> TaskDetail:
        """As it says."""
        self._called("show_task", task_id=task_id, wait_s=wait_s)
        detail = self._find(task_id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s or None):
                while wait_s and detail.state not in FINAL_TASK_STATES:
                    await self._changed.wait()
                    detail = self.details[detail.id]
        return self.details[detail.id]

    async def cancel_task(self, task_id: str) -> TaskView:
        """As it says: at once."""
        self._called("cancel_task", task_id=task_id)
        detail = self._find(task_id)
        if detail.state in FINAL_TASK_STATES:
            raise Refused(Code.TASK_FINISHED)
        self.end(detail.id, TaskState.CANCELLED, cause=Cause.CANCELLED)
        return TaskView(**self.details[detail.id].model_dump(include=set(TaskView.model_fields)))

    async def suspend_task(self, task_id: str) -> TaskView:
        """As it says."""
        return self._move("suspend_task", task_id, TaskState.RUNNING, TaskState.SUSPENDED)

    async def resume_task(self, task_id: str) -> TaskView:
        """As it says."""
        return self._move("resume_task", task_id, TaskState.SUSPENDED, TaskState.RUNNING)

    def _move(self, call: str, task_id: str, old: TaskState, new: TaskState) -> TaskView:
        self._called(call, task_id=task_id)
        detail = self._find(task_id)
        if detail.state is not old:
            raise Refused(Code.STATE_CONFLICT, f"task {detail.id} is {detail.state}")
        self.details[detail.id] = detail.model_copy(update={"state": new})
        return TaskView(**self.details[detail.id].model_dump(include=set(TaskView.model_fields)))

    async def read_log(self, task_id: str, *, stream: Stream, offset: int, limit: int, run_no: int | None) -> LogChunk:
        """As it says."""
        self._called("read_log", task_id=task_id, stream=stream, offset=offset, limit=limit, run_no=run_no)
        return self._chunk(task_id, stream, offset, limit, run_no)

    async def follow_log(
        self, task_id: str, *, stream: Stream, offset: int, run_no: int | None
    ) -> AsyncGenerator[LogChunk, None]:
        """As it says."""
        self._called("follow_log", task_id=task_id, stream=stream, offset=offset, run_no=run_no)
        while True:
            changed = self._changed  # of before the look: what changes while the chunk is on its way counts
            chunk = self._chunk(task_id, stream, offset, 1 << 20, run_no)
            offset = chunk.next_offset
            if chunk.text or chunk.is_end:
                yield chunk
            if chunk.is_end:
                return
            await changed.wait()

    def _chunk(self, task_id: str, stream: Stream, offset: int, limit: int, run_no: int | None) -> LogChunk:
        detail = self._find(task_id)
        numbers = [run.run_no for run in detail.runs]
        number = max(numbers, default=0) if run_no is None else run_no
        if number not in numbers:
            raise Refused(Code.INVALID_PARAMETERS, f"task {detail.id} has no run {number or ''}")
        data = self.output.get((detail.id, number, stream), b"")
        start = max(0, len(data) + offset) if offset < 0 else min(offset, len(data))
        piece = data[start : start + limit]
        has_ended = detail.runs[number - 1].state is not RunState.RUNNING
        return LogChunk(
            stream=stream,
            run_no=number,
            offset=start,
            next_offset=start + len(piece),
            text=piece.decode("utf-8", "replace"),
            is_end=has_ended and start + len(piece) == len(data),
        )

    def _find(self, prefix: str) -> TaskDetail:
        found = [task for task_id, task in self.details.items() if task_id.startswith(prefix)]
        if prefix in self.details:
            return self.details[prefix]
        if not found:
            raise Refused(Code.TASK_NOT_FOUND, f"there is no task {prefix}")
        if len(found) > 1:
            raise Refused(Code.INVALID_PARAMETERS, f"{prefix} fits several tasks")
        return found[0]

    def _called(self, name: str, **arguments: object) -> None:
        with self.called:
            self.calls.append((name, arguments))
            self.called.notify_all()
        if name in self.refuse:
            raise self.refuse[name]
        if self.failure is not None:
            raise self.failure


class LiveAgent:
    """The server's thread. `operations` is to be changed by `do` only."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "agent.sock"
        self.token_file = directory / "tokens"
        self.token_file.write_text("ci:operate:operator-secret\nboard:read:reader-secret\n")
        self.token_file.chmod(0o600)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._server: ApiServer | None = None
        self._listen = "127.0.0.1:0"
        self.operations: ScriptedOperations

    @property
    def url(self) -> str:
        """Where TCP listens; the same over restarts."""
        return f"http://{self._listen}"

    def start(self) -> None:
        """Serve."""

        async def start() -> ApiServer:
            settings = ApiSettings(
                state_dir=self.directory,
                machine_id=MACHINE_ID,
                listen=self._listen,
                socket=self.socket,
                tokens_file=self.token_file,
            )
            server = ApiServer(self.operations, settings, AuditLog(self.directory / "audit"))
            await server.start()
            return server

        server: ApiServer = self._run(start())
        self._server = server
        self._listen = str(server.endpoints.url).removeprefix("http://")

    def stop(self) -> None:
        """Serve no more; the tasks stay."""
        if self._server is not None:
            self._run(self._server.stop())
            self._server = None

    def do(self, change: Callable[[ScriptedOperations], None]) -> None:
        """Change something, between two steps of the server."""

        async def run() -> None:
            change(self.operations)

        self._run(run())

    def wait_called(self, name: str, times: int = 1, **arguments: object) -> None:
        """Until this call, with these arguments among its own, has come so often."""

        def has_come() -> bool:
            calls = [found for called, found in self.operations.calls if called == name]
            return sum(arguments.items() <= found.items() for found in calls) >= times

        with self.operations.called:
            assert self.operations.called.wait_for(has_come, DEADLINE_S), (
                f"{name} did not come: {self.operations.calls}"
            )

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE_S)

    @contextlib.contextmanager
    def running(self) -> Generator[Self]:
        """The thread's life."""
        self._thread.start()
        try:

            async def make() -> ScriptedOperations:
                return ScriptedOperations()

            self.operations = self._run(make())
            self.start()
            yield self
        finally:
            self.stop()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(DEADLINE_S)
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
