"""What the attempt directories and the database say after a restart, brought together: each open run is taken over.

The sidecar has looked at the processes; the executor goes on with each, stores and reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import structlog

from remotegpu_agent.executor import Executor
from remotegpu_queue import views
from remotegpu_queue.store import Store
from remotegpu_schemas.attempt import AttemptId, RunNo
from remotegpu_sidecar.launcher import Adopted, AdoptedState

log = structlog.get_logger(__name__)

_Key: TypeAlias = tuple[AttemptId, RunNo]


@dataclass(frozen=True)
class Recovered:
    """How many runs go on, and how many have to be finished."""

    adopted: int
    finished: int


async def recover(store: Store, executor: Executor, found: Sequence[Adopted]) -> Recovered:
    """Hand every open run to the executor, then hold every lease. Safe to repeat after a crash."""
    attempts = await store.read(views.open_attempts)
    by_id = {attempt.attempt_id: attempt for attempt in attempts}
    open_runs = {(run.attempt_id, run.run_no): run for run in await store.read(views.open_runs)}
    by_key: dict[_Key, Adopted] = {}
    for each in found:
        if each.attempt_id is not None and each.run_no is not None and (each.attempt_id, each.run_no) in open_runs:
            by_key[each.attempt_id, each.run_no] = each
        else:
            _let_be(each)
    adopted = 0
    for key, run in open_runs.items():
        here = by_key.get(key)
        if run.attempt_id not in by_id:
            log.error("a run is open though its attempt has ended", attempt_id=run.attempt_id, run_no=run.run_no)
            continue
        executor.adopt(by_id[run.attempt_id], run, here)
        adopted += here is not None and here.run is not None
    for attempt in attempts:
        executor.hold_lease(attempt)
    return Recovered(adopted, len(open_runs) - adopted)


def _let_be(found: Adopted) -> None:
    """A directory of a run that the database does not know."""
    if found.run is None:
        if found.state is AdoptedState.UNREADABLE:
            log.warning("an attempt directory is left alone", directory=str(found.directory), reason=found.reason)
        return
    # The shim keeps its lease and its timeout all the same; nobody but an operator may end what nobody knows.
    log.error("a run goes on that the database does not know", directory=str(found.directory))
    found.run.close()
