"""What the attempt directories and the database say after a restart, brought together: each run is adopted or finished.

Decides from both; the sidecar has looked at the processes, the executor stores and reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import structlog

from remotegpu_agent.executor import Executor, was_stopped
from remotegpu_agent.supervise import Loops
from remotegpu_queue import views
from remotegpu_queue.rows import Attempt, Run
from remotegpu_queue.store import Store
from remotegpu_queue.transitions import Missing
from remotegpu_schemas.attempt import AttemptId, RunNo, RunRecord
from remotegpu_schemas.states import Cause, RunState
from remotegpu_sidecar import identity, remains
from remotegpu_sidecar.launcher import Adopted, AdoptedState

log = structlog.get_logger(__name__)

_Key: TypeAlias = tuple[AttemptId, RunNo]

_MISSING = {
    AdoptedState.NEVER_STARTED: Missing.NEVER_STARTED,
    AdoptedState.OTHER_BOOT: Missing.REBOOTED,
}
"""Every other state without an end on record means that the shim was lost."""


@dataclass(frozen=True)
class Recovered:
    """How many runs go on, and how many had to be finished."""

    adopted: int
    finished: int


async def recover(store: Store, executor: Executor, loops: Loops, found: Sequence[Adopted]) -> Recovered:
    """Take over what runs and store the end of what does not; then hold every lease. Safe to repeat after a crash.

    A run of which processes are left that SIGKILL has not removed is finished in the background, once they are gone.
    """
    attempts = {attempt.attempt_id: attempt for attempt in await store.read(views.open_attempts)}
    open_runs: dict[_Key, Run] = {(run.attempt_id, run.run_no): run for run in await store.read(views.open_runs)}
    by_key: dict[_Key, Adopted] = {}
    for each in found:
        if each.attempt_id is not None and each.run_no is not None and (each.attempt_id, each.run_no) in open_runs:
            by_key[each.attempt_id, each.run_no] = each
        else:
            _let_be(each)
    adopted = 0
    for key, run in open_runs.items():
        attempt = attempts[run.attempt_id]
        here = by_key.get(key)
        if here is not None and here.run is not None:
            is_suspended = run.state is RunState.SUSPENDED
            executor.adopt(attempt, run.run_no, here.run, run.stop_cause, is_suspended=is_suspended)
            adopted += 1
        elif here is not None and (here.left_pids or here.state is AdoptedState.UNREADABLE):
            log.error("what is left of a run is being killed", directory=str(here.directory), reason=here.reason)
            loops.spawn(f"remains-{run.attempt_id}", partial(_kill_and_finish, executor, attempt, run, here))
        else:
            await _finish(executor, attempt, run, here)
    for attempt in await store.read(views.open_attempts):
        executor.hold_lease(attempt)
    return Recovered(adopted, len(open_runs) - adopted)


async def _kill_and_finish(executor: Executor, attempt: Attempt, run: Run, found: Adopted) -> None:
    key: remains.RunKey = (run.attempt_id, run.run_no)
    cgroup = found.record.cgroup if found.record is not None else None
    groups: dict[remains.RunKey, str] = {key: cgroup} if cgroup is not None else {}
    await remains.kill({key: run.process}, math.inf, groups)
    await remains.remove_groups(groups.values())
    await _finish(executor, attempt, run, found)


async def _finish(executor: Executor, attempt: Attempt, run: Run, found: Adopted | None) -> None:
    state, record = (found.state, found.record) if found is not None else (AdoptedState.NEVER_STARTED, None)
    stop_cause = run.stop_cause
    if stop_cause is None and record is not None and was_stopped(record) and _is_of_another_boot(record):
        stop_cause = Cause.HOST_SHUTDOWN  # no agent asked for it, nor lived to see it
    await executor.settle(attempt, run.run_no, stop_cause, record, _MISSING.get(state, Missing.SHIM_LOST))


def _is_of_another_boot(record: RunRecord) -> bool:
    return record.started is not None and record.started.shim.boot_id != identity.boot_id()


def _let_be(found: Adopted) -> None:
    """A directory of a run that has ended in the database, or that the database does not know."""
    if found.run is None:
        if found.state is AdoptedState.UNREADABLE:
            log.warning("an attempt directory is left alone", directory=str(found.directory), reason=found.reason)
        return
    # The shim keeps its lease and its timeout all the same; nobody but an operator may end what nobody knows.
    log.error("a run goes on that the database does not know", directory=str(found.directory))
    found.run.close()
