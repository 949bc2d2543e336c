"""What is written down of an attempt's way: begun, started, ended, stopped. Each step is one commit, decided inside it.

Because the store has one writer, a decision made inside of a unit cannot be overtaken: a stop that comes while a run
ends, or while the next one begins, meets exactly one of the two. Knows no process.
"""

from __future__ import annotations

import asyncio
import enum
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

import structlog

from remotegpu_agent.clock import Clock
from remotegpu_agent.progress import Progress
from remotegpu_agent.reports import Outputs, Reports, usage_of
from remotegpu_agent.runspec import refusal
from remotegpu_queue import units, views
from remotegpu_queue.outbox import add_report
from remotegpu_queue.rows import Attempt
from remotegpu_queue.store import LostRace, Store, StoreUnavailable
from remotegpu_queue.transitions import AfterRun, IllegalTransition, Outcome, after_run
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId, RunNo, RunRecord, RunStarted
from remotegpu_schemas.states import CAUSE_RULES, Cause, Retry, TaskState, wire_exit_code

if TYPE_CHECKING:
    from remotegpu_agent.leases import LeaseKeeper

log = structlog.get_logger(__name__)

T = TypeVar("T")
Judge = Callable[[Cause | None], Outcome]
"""How a run ended, given what it was asked to be stopped for."""

RETRY_S: Final = 1.0
_STOP_PATIENCE_S: Final = 2.0
"""A stop is signalled though the store has not answered for so long: a backup may hold its lock for half a minute."""


@dataclass(frozen=True)
class Begun:
    """A run that has been written down, or why there is none."""

    attempt: Attempt
    refusal: tuple[Cause, str] | None = None
    run_no: RunNo = RunNo(0)


@dataclass(frozen=True)
class Ended:
    """What was stored of a run's end."""

    outcome: Outcome
    after: AfterRun


class StopStored(enum.Enum):
    """What a request to stop an attempt came to."""

    HAD_ENDED = enum.auto()
    ENDED_NOW = enum.auto()
    """It had no process."""
    REQUESTED = enum.auto()
    """It has a process, which is to be told."""


class Books:
    """The executor's clerk. `leases` is set once the keeper exists; `can_release` says what the plane offers."""

    def __init__(self, store: Store, reports: Reports, clock: Clock, boot_id: str) -> None:
        self._store = store
        self._reports = reports
        self._clock = clock
        self.boot_id = boot_id
        self.leases: LeaseKeeper
        self.can_release: Callable[[], bool] = lambda: False

    # --- begun ---

    async def begin(self, attempt_id: AttemptId) -> Begun:
        """Write the next run down, unless there is a reason not to start it. Raises LostRace, StoreUnavailable."""
        return await self._store.write(lambda db: self._begin(db, attempt_id))

    def _begin(self, db: sqlite3.Connection, attempt_id: AttemptId) -> Begun:
        waiting = views.attempt(db, attempt_id)
        if waiting is None or not waiting.state.is_waiting:
            raise LostRace(f"attempt {attempt_id} no longer waits")
        reason = waiting.unreadable or refusal(waiting.task)
        if self.lease_is_over(waiting):
            found = Begun(waiting, (Cause.LEASE_LOST, "the lease ended before the task could be started"))
        elif reason is not None:
            found = Begun(waiting, (Cause.POLICY_REFUSED, reason))
        else:
            attempt, run_no = units.begin_run(db, attempt_id, self._clock.wall_ms())
            return Begun(attempt, run_no=run_no)
        self._end_waiting(db, waiting, *found.refusal or (Cause.LEASE_LOST, ""))
        return found

    def lease_is_over(self, attempt: Attempt) -> bool:
        """Whether the attempt may not have a process any more."""
        lease = self.leases.current(attempt.attempt_id) or attempt.lease
        return lease is not None and lease.deadline_boottime_ns <= self._clock.boottime_ns()

    # --- started ---

    async def started(self, attempt: Attempt, run_no: RunNo, started: RunStarted) -> asyncio.Future[None]:
        """Queue identity and start report for the next commit; whoever has the future need not wait for it."""
        return await self._store.enqueue(self._started_unit(attempt, run_no, started))

    async def started_again(self, attempt: Attempt, run_no: RunNo, started: RunStarted) -> None:
        """As `started`, until it is on disk."""
        await self._until_stored(self._started_unit(attempt, run_no, started), "a start")

    def _started_unit(self, attempt: Attempt, run_no: RunNo, started: RunStarted) -> Callable[..., None]:
        report = self._reports.start(attempt, run_no, started)
        started_ms = started.started_wall_ns // 1_000_000
        return lambda db: units.run_started(db, attempt.attempt_id, run_no, started.process, started_ms, report)

    # --- ended ---

    async def ended(
        self,
        attempt: Attempt,
        run_no: RunNo,
        record: RunRecord | None,
        judge: Judge,
        *,
        asked: Callable[[], Cause | None],
        progress: Progress | None,
    ) -> Ended | None:
        """Store a run's end, what follows from it and the completion, as soon as the store can be written.

        `asked` is what the process was stopped for where that could not be stored. None: it was stored before.
        """
        outputs = self._reports.read_outputs(attempt, run_no, record)

        def unit(db: sqlite3.Connection) -> Ended:
            return self._end(db, attempt, run_no, record, judge, asked(), progress, outputs)

        try:
            return await self._until_stored(unit, "a result")
        except (LostRace, IllegalTransition) as race:
            log.error("a run's end was stored before", attempt_id=attempt.attempt_id, reason=str(race))
            return None

    def _end(
        self,
        db: sqlite3.Connection,
        attempt: Attempt,
        run_no: RunNo,
        record: RunRecord | None,
        judge: Judge,
        asked: Cause | None,
        progress: Progress | None,
        outputs: Outputs,
    ) -> Ended:
        attempt_id = attempt.attempt_id
        ended = record.ended if record is not None else None
        ended_ms = ended.ended_wall_ns // 1_000_000 if ended is not None else self._clock.wall_ms()
        if record is not None and record.started is not None:
            self._started_unit(attempt, run_no, record.started)(db)
        if progress is not None:
            body = self._reports.progress(attempt, *progress)
            report = (body, self.boot_id) if body is not None else None
            units.set_progress(db, attempt_id, *progress, ended_ms, report)
        stop_cause = units.stop_cause(db, attempt_id, run_no) or asked
        outcome = judge(stop_cause)
        # What costs no retry is not the task's end either: where the lease is over too, it waits, and so ends as
        # `lease_lost`, which gives it back.
        may_run = CAUSE_RULES[outcome.cause].retry is Retry.FREE or not self.lease_is_over(attempt)
        after = after_run(
            outcome,
            attempt.task.retry,
            retries_used=attempt.retries_used,
            free_retries_used=attempt.free_retries_used,
            may_run=may_run and not _forbids_more(stop_cause),
        )
        complete = None
        if after.is_final:
            complete = self._reports.complete(attempt, run_no, outcome, outputs, ended_ms)
        units.run_ended(
            db,
            attempt_id,
            run_no,
            outcome,
            after,
            ended_at_ms=ended_ms,
            ready_boottime_ns=self._clock.boottime_ns() + round(after.delay_s * 1e9) if after.delay_s else 0,
            boot_id=self.boot_id,
            usage=usage_of(ended.usage) if ended is not None else None,
            report=complete,
            drop_reports=not CAUSE_RULES[outcome.cause].is_reported,
        )
        has_begun = record is not None and record.started is not None
        if not (after.is_final or has_begun or self.lease_is_over(attempt)):
            begun = self._reports.begun(attempt, run_no)
            if begun is not None:
                add_report(db, attempt_id, "start", begun, ended_ms, self.boot_id)
        return Ended(outcome, after)

    async def _until_stored(self, unit: Callable[[sqlite3.Connection], T], what: str) -> T:
        """What was stored is also in the run's record until then. Raises what the unit raises."""
        while True:
            try:
                return await self._store.write(unit)
            except StoreUnavailable as error:
                log.error("something cannot be stored yet", what=what, error=str(error))
                await asyncio.sleep(RETRY_S)

    # --- stopped ---

    async def stop(
        self, attempt_id: AttemptId, cause: Cause, when_late: Callable[[], None]
    ) -> tuple[StopStored, Cause]:
        """Write down that the attempt is to end: the run that it has, or its waiting. The first cause counts.

        Raises StoreUnavailable, also when the store does not answer soon; if it is written after all, `when_late` is
        called.
        """
        stored: asyncio.Future[tuple[StopStored, Cause]] | None = None
        try:
            async with asyncio.timeout(_STOP_PATIENCE_S):
                stored = await self._store.enqueue(lambda db: self._stop(db, attempt_id, cause))
                return await asyncio.shield(stored)
        except TimeoutError:
            if stored is not None:
                stored.add_done_callback(
                    lambda done: when_late() if not done.cancelled() and done.exception() is None else None
                )
            raise StoreUnavailable("the database is busy") from None

    def _stop(self, db: sqlite3.Connection, attempt_id: AttemptId, cause: Cause) -> tuple[StopStored, Cause]:
        attempt = views.attempt(db, attempt_id)
        if attempt is None or attempt.state.is_final:
            return StopStored.HAD_ENDED, cause
        if attempt.state in {TaskState.RUNNING, TaskState.SUSPENDED}:
            return StopStored.REQUESTED, units.request_stop(db, attempt_id, attempt.run_no, cause)
        self._end_waiting(db, attempt, cause, _WAITING_SENTENCES.get(cause, f"ended before it ran: {cause}"))
        return StopStored.ENDED_NOW, cause

    def _end_waiting(self, db: sqlite3.Connection, attempt: Attempt, cause: Cause, sentence: str) -> None:
        now_ms = self._clock.wall_ms()
        outcome = Outcome(cause, wire_exit_code(cause, None, None), None, sentence)
        report = self._reports.never_ran(attempt, outcome, now_ms, can_release=self.can_release())
        to_send = (*report, self.boot_id) if report is not None else None
        units.end_waiting(db, attempt.attempt_id, cause, sentence, outcome.exit_code, now_ms, to_send)

    # --- suspended ---

    async def suspended(self, attempt_id: AttemptId, run_no: RunNo, *, is_suspended: bool) -> None:
        """Write down that a run is to stand still, or to go on.

        Raises LostRace, IllegalTransition, StoreUnavailable.
        """
        unit = units.suspend_run if is_suspended else units.resume_run
        await self._store.write(lambda db: unit(db, attempt_id, run_no), patience_s=limits.STORE_PATIENCE_S)

    # --- progress ---

    async def progress(self, attempt: Attempt, progress: Progress) -> None:
        """Store and report how far a run is. Raises StoreUnavailable."""
        now_ms, body = self._clock.wall_ms(), self._reports.progress(attempt, *progress)
        report = (body, self.boot_id) if body is not None else None
        await self._store.write(lambda db: units.set_progress(db, attempt.attempt_id, *progress, now_ms, report))


def _forbids_more(stop_cause: Cause | None) -> bool:
    """Whether somebody has asked for a stop that no further run may follow."""
    return stop_cause is not None and CAUSE_RULES[stop_cause].retry is Retry.NEVER


_WAITING_SENTENCES: Final = {
    Cause.CANCELLED: "cancelled on request before it ran",
    Cause.SUPERSEDED: "another attempt has this task now",
    Cause.LEASE_LOST: "the lease ended before the task could be started",
}
