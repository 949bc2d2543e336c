"""POST /process/stop: from a process id to the run that it belongs to, and to the end of that run's whole tree.

Never signals a process that this agent did not start, nor one that was given the number of one that it did.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from remotegpu_agent.executor import Active, Executor
from remotegpu_queue import views
from remotegpu_queue.store import Store
from remotegpu_schemas import limits
from remotegpu_schemas.api import ProcessStopAnswer, ProcessStopRequest, StopSignal
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.states import Cause


async def stop_process(
    store: Store, executor: Executor, boot_id: str, request: ProcessStopRequest
) -> ProcessStopAnswer:
    """Stop the run, as cause `stopped`; answers when its tree is gone, or after 8 s. Safe to repeat.

    Raises Refused: PROCESS_NOT_MANAGED, PROCESS_GONE.
    """
    pid = request.process_id
    active = await _run_of(executor, pid)
    if active is None:
        raise await _refusal(store, boot_id, pid)
    await executor.stop(active.attempt_id, Cause.STOPPED, is_kill=request.signal is StopSignal.SIGKILL)
    try:
        async with asyncio.timeout(limits.API_STOP_ANSWER_S):
            await active.ended.wait()
    except TimeoutError:
        return _answer(active, pid, is_gone=False)
    return _answer(active, pid, is_gone=True)


async def _run_of(executor: Executor, pid: int) -> Active | None:
    alive = list(executor.active.values())
    for active in alive:
        if active.started is not None and active.started.process.pid == pid:
            return active
    return await asyncio.to_thread(_run_above, alive, pid)


def _run_above(alive: Sequence[Active], pid: int) -> Active | None:
    """The run that a process descends from; /proc may be deep: not on the loop."""
    for active in alive:
        run = active.run
        if run is not None and run.contains(pid):
            return active
    return None


async def _refusal(store: Store, boot_id: str, pid: int) -> Refused:
    found = await store.read(lambda db: views.run_of_pid(db, pid, boot_id))
    if found is None:
        return Refused(Code.PROCESS_NOT_MANAGED, f"process {pid} was not started by this agent")
    run, task_id = found
    return Refused(
        Code.PROCESS_GONE,
        f"process {pid} was run {run.run_no} of task {task_id}, which has ended ({run.cause or 'not stored yet'})",
    )


def _answer(active: Active, pid: int, *, is_gone: bool) -> ProcessStopAnswer:
    outcome = active.outcome if is_gone else None
    return ProcessStopAnswer(
        process_id=pid,
        state="stopped" if is_gone else "stopping",
        task_id=active.task_id,
        attempt_id=active.attempt_id,
        run_no=active.run_no,
        exit_code=outcome.exit_code if outcome else None,
        cause=outcome.cause if outcome else None,
    )
