"""From rows of the queue to what the API shows of a task. Pure; values of a task's environment never get through."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, Final

from remotegpu_queue.rows import Attempt, Run
from remotegpu_schemas.api import RunView, TaskDetail, TaskView
from remotegpu_schemas.attempt import Lease
from remotegpu_schemas.states import RunState
from remotegpu_schemas.task import Task
from remotegpu_schemas.wire import format_time

HIDDEN: Final = "[hidden]"
_COMMAND_MAX_CHARS: Final = 1000


def task_view(
    attempt: Attempt, last_run: Run | None, *, lease: Lease | None, reason: str | None, now_boottime_ns: int
) -> TaskView:
    """One task by its latest attempt. `lease` is the newest one known; `reason` says why a waiting task waits."""
    lease_left_s = None
    if lease is not None and not attempt.state.is_final:
        lease_left_s = round(max(0.0, (lease.deadline_boottime_ns - now_boottime_ns) / 1e9), 1)
    is_alive = last_run is not None and last_run.state is not RunState.ENDED
    return TaskView(
        id=attempt.task.id,
        name=attempt.task.name,
        origin=attempt.origin,
        state=attempt.state,
        cause=attempt.cause,
        exit_code=attempt.exit_code,
        error=attempt.error or None,
        reason=reason if attempt.state.is_waiting else None,
        priority=attempt.task.priority,
        command=command_line(attempt.task),
        labels=attempt.task.labels,
        attempt_id=attempt.attempt_id,
        run_no=attempt.run_no,
        retries_used=attempt.retries_used,
        max_retries=attempt.task.retry.max,
        process_id=last_run.process.pid if last_run is not None and is_alive and last_run.process else None,
        progress_percent=attempt.progress_percent,
        progress_message=attempt.progress_message,
        submitted_at=_time(attempt.submitted_at_ms) or "",
        started_at=_time(attempt.started_at_ms),
        ended_at=_time(attempt.ended_at_ms),
        is_stopping=last_run is not None and last_run.state is RunState.STOPPING,
        lease_left_s=lease_left_s,
        is_synced=attempt.origin == "local" or attempt.is_synced,
    )


def task_detail(view: TaskView, attempt: Attempt, runs: Sequence[Run]) -> TaskDetail:
    """The task as it was submitted, without the values of its environment, and all its runs."""
    return TaskDetail(**dict(view), task=_described(attempt.task), runs=[run_view(run) for run in runs])


def run_view(run: Run) -> RunView:
    """One run."""
    return RunView(
        attempt_id=run.attempt_id,
        run_no=run.run_no,
        state=run.state,
        cause=run.cause,
        process_id=run.process.pid if run.process is not None else None,
        exit_code=run.exit_code,
        signal=run.signal,
        error=run.error or None,
        started_at=_time(run.started_at_ms),
        ended_at=_time(run.ended_at_ms),
        usage=run.usage,
    )


def command_line(task: Task) -> str:
    """What runs, as one line a person can read: the shell string, the quoted vector, or the script's first line."""
    if task.command is None:
        script = task.script or ""
        line = next((text.strip() for text in script.splitlines() if text.strip() and not text.startswith("#")), "")
        text = f"script: {line}"
    elif task.args is None:
        text = " ".join(task.command.split())
    else:
        text = shlex.join((task.command, *task.args))
    return text if len(text) <= _COMMAND_MAX_CHARS else text[:_COMMAND_MAX_CHARS] + "…"


def _described(task: Task) -> dict[str, Any]:
    described = task.model_dump(mode="json", exclude_defaults=True)
    if task.env:
        described["env"] = dict.fromkeys(task.env, HIDDEN)
    return described


def _time(wall_ms: int | None) -> str | None:
    return None if wall_ms is None else format_time(wall_ms / 1000)
