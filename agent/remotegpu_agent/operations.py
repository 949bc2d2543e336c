"""What a person or a program may ask of the running agent; the HTTP API is a thin skin over it.

`agent_operations.py` answers from the running parts; handlers and tests see only this protocol.
Ids may be given by unique prefix. Refusals are `Refused` with the business code of the answer.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Literal, Protocol

from remotegpu_agent.task_user import Submitter
from remotegpu_schemas.api import (
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
from remotegpu_schemas.states import TaskState
from remotegpu_schemas.task import Task

Stream = Literal["stdout", "stderr"]


class Operations(Protocol):
    """The calls behind the API, each safe to repeat unless it says otherwise."""

    def ping(self) -> Ping:
        """Version and state, without touching the disk."""
        ...

    async def system_info(self) -> SystemInfo:
        """Hardware and system figures; never fails because one of them cannot be had (see `warnings`)."""
        ...

    async def submit(self, tasks: Sequence[Task], submitter: Submitter | None) -> list[str]:
        """Store local tasks, all or none, and return their ids; they are on disk when this returns.

        `submitter` is None for a caller that is no user of this host.
        Raises Refused: DRAINING, QUEUE_FULL, ALREADY_EXISTS (an id that is taken), POLICY_REFUSED (tasks run as their
        submitter, and there is none). Not idempotent.
        """
        ...

    async def list_tasks(
        self, *, states: Sequence[TaskState], labels: Mapping[str, str], limit: int, offset: int
    ) -> TaskPage:
        """One page, newest first; empty `states` means all."""
        ...

    async def show_task(self, task_id: str, *, wait_s: float = 0.0) -> TaskDetail:
        """The task and its runs; with `wait_s` the answer waits until the task has ended or the time is over.

        Raises Refused: TASK_NOT_FOUND, INVALID_PARAMETERS (the prefix fits several tasks).
        """
        ...

    async def cancel_task(self, task_id: str) -> TaskView:
        """Ask for the end of a task; a running one is stopped with its grace period after this returns.

        Raises Refused: TASK_NOT_FOUND, TASK_FINISHED.
        """
        ...

    async def suspend_task(self, task_id: str) -> TaskView:
        """Let a running task stand still, with all that it holds; its timeout stands still too, its lease does not.

        Raises Refused: TASK_NOT_FOUND, STATE_CONFLICT (it does not run).
        """
        ...

    async def resume_task(self, task_id: str) -> TaskView:
        """Let a suspended task go on.

        Raises Refused: TASK_NOT_FOUND, STATE_CONFLICT (it is not suspended).
        """
        ...

    async def read_log(self, task_id: str, *, stream: Stream, offset: int, limit: int, run_no: int | None) -> LogChunk:
        """A piece of output; a negative offset counts from the end. `run_no` None means the last run.

        Raises Refused: TASK_NOT_FOUND, INVALID_PARAMETERS (no such run).
        """
        ...

    def follow_log(
        self, task_id: str, *, stream: Stream, offset: int, run_no: int | None
    ) -> AsyncGenerator[LogChunk, None]:
        """Chunks as they are written, the last one with `is_end`; event-driven. The caller closes the generator.

        Refuses as `read_log` does.
        """
        ...

    async def stop_process(self, request: ProcessStopRequest) -> ProcessStopAnswer:
        """Stop the run whose process id that is, its whole tree; answers within 8 s.

        Cancelling the call undoes nothing.
        Raises Refused: INVALID_PARAMETERS, PROCESS_NOT_MANAGED, PROCESS_GONE.
        """
        ...

    async def queue_status(self) -> QueueStatus:
        """Counts per state, capacity, reports that wait, and how the agent stands with the control plane."""
        ...

    # --- the host as a whole ---

    async def drain(self, by: str, reason: str) -> DrainAnswer:
        """Take on no more tasks from now on, over restarts too; what runs goes on. The first order stays."""
        ...

    async def undrain(self) -> DrainAnswer:
        """Take back the order of `drain`; one of the control plane stays."""
        ...

    async def drain_state(self, *, wait_s: float = 0.0) -> DrainAnswer:
        """How far the host is emptied; with `wait_s` the answer waits until it is, or the time is over."""
        ...

    async def metrics(self) -> bytes:
        """All figures in the text format of Prometheus."""
        ...

    # --- dead letters ---

    async def dead_letters(self, *, limit: int, offset: int) -> DeadLetterPage:
        """One page of reports that were refused for good, oldest first, without their bodies."""
        ...

    async def show_dead_letter(self, letter_id: int) -> DeadLetter:
        """One of them, with all that it says. Raises Refused: DEAD_LETTER_NOT_FOUND."""
        ...

    async def resend_dead_letter(self, letter_id: int) -> DeadLetter:
        """Put it up for delivery as if it had never been tried. Raises Refused: DEAD_LETTER_NOT_FOUND."""
        ...

    async def drop_dead_letter(self, letter_id: int) -> DeadLetter:
        """Forget it for good. Raises Refused: DEAD_LETTER_NOT_FOUND."""
        ...
