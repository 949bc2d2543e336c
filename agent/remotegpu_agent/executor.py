"""One attempt from waiting to reported: writes down each step before it acts, launches, waits, stores the outcome.

Owns the runs that are alive (`active`). Decisions are the pure functions of `remotegpu_queue.transitions`; processes
are the sidecar's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import structlog

from remotegpu_agent.announcer import Announcer
from remotegpu_agent.clock import Clock
from remotegpu_agent.leases import LeaseKeeper
from remotegpu_agent.progress import Progress, read_progress
from remotegpu_agent.reports import Reports, usage_of
from remotegpu_agent.runspec import (
    RunSettings,
    build_run_spec,
    prepare_work_dir,
    progress_path,
    refusal,
)
from remotegpu_agent.supervise import Loops
from remotegpu_queue import units, views
from remotegpu_queue.rows import Attempt
from remotegpu_queue.store import LostRace, Store, StoreUnavailable
from remotegpu_queue.transitions import (
    AfterRun,
    IllegalTransition,
    Missing,
    Outcome,
    after_run,
    outcome_of,
    outcome_of_missing,
)
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId, EndedBy, Lease, RunEnded, RunNo, RunRecord, RunStarted
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.states import CAUSE_RULES, Cause, Retry, wire_exit_code
from remotegpu_schemas.task import Resources, TaskId
from remotegpu_schemas.wire import JsonObject
from remotegpu_sidecar.launcher import Launcher, LaunchError, Run

log = structlog.get_logger(__name__)

_STORE_RETRY_S: Final = 1.0


@dataclass(frozen=True)
class ExecutorSettings:
    """What the executor needs to know about the host."""

    run: RunSettings
    boot_id: str
    continues_when_unreachable: bool = False


@dataclass(frozen=True)
class _Begun:
    """A run that has been written down, or why there is none."""

    attempt: Attempt
    refusal: tuple[Cause, str] | None = None
    run_no: RunNo = RunNo(0)


@dataclass(frozen=True)
class _End:
    """All that is stored of a run's end."""

    outcome: Outcome
    after: AfterRun
    ended_ms: int
    record: RunRecord | None
    report: JsonObject | None


@dataclass
class Active:
    """A run that is being started, runs, or is being stopped. `run` is None until the shim exists."""

    attempt_id: AttemptId
    task_id: TaskId
    resources: Resources
    attempt: Attempt | None = None
    run_no: RunNo = RunNo(0)
    run: Run | None = None
    started: RunStarted | None = None
    stop_cause: Cause | None = None
    is_kill: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: Outcome | None = None


class Executor:
    """Starts, adopts, stops and finishes runs.

    `on_free` is called when capacity or the queue has changed, `on_report` when a report is due.
    """

    def __init__(
        self,
        store: Store,
        launcher: Launcher,
        reports: Reports,
        clock: Clock,
        settings: ExecutorSettings,
        loops: Loops,
        announcer: Announcer,
        *,
        on_free: Callable[[], None],
        on_report: Callable[[], None],
    ) -> None:
        self._store = store
        self._launcher = launcher
        self._reports = reports
        self._clock = clock
        self._settings = settings
        self._loops = loops
        self._announcer = announcer
        self._on_free = on_free
        self._on_report = on_report
        self._on_started: list[Callable[[Active], None]] = []
        self._on_ended: list[Callable[[Active], None]] = []
        self._starting = asyncio.Semaphore(limits.RUNS_STARTING_MAX)
        self.active: dict[AttemptId, Active] = {}
        self.leases: LeaseKeeper
        self.can_release: Callable[[], bool] = lambda: False

    def watch(self, *, started: Callable[[Active], None], ended: Callable[[Active], None]) -> None:
        """Tell others when a run has started and when it has ended."""
        self._on_started.append(started)
        self._on_ended.append(ended)

    # --- starting ---

    def start(self, attempt_id: AttemptId, task_id: TaskId, resources: Resources) -> None:
        """Start the next run of a waiting attempt in the background; its capacity counts as taken from now on."""
        if attempt_id in self.active:
            return
        active = Active(attempt_id, task_id, resources)
        self.active[attempt_id] = active
        self._loops.spawn(f"run-{attempt_id}", lambda: self._own(active, self._execute(active)))

    async def _own(self, active: Active, work: asyncio.Future[None] | object) -> None:
        try:
            await work  # type: ignore[misc]  # a coroutine
        finally:
            if active.run is not None:
                active.run.close()
            self.active.pop(active.attempt_id, None)
            active.ended.set()
            for tell in self._on_ended:
                tell(active)
            self._announcer.announce(active.task_id)
            self._on_free()

    async def _execute(self, active: Active) -> None:
        attempt_id = active.attempt_id
        try:
            begun = await self._store.write(lambda db: self._begin(db, attempt_id))
            if begun.refusal is not None:
                await self.end_waiting(begun.attempt, *begun.refusal)
                return
        except LostRace as race:
            log.info("a task is not started", attempt_id=attempt_id, reason=str(race))
            return
        except StoreUnavailable as error:
            # It keeps its slot meanwhile: whoever frees one makes the dispatcher try again at once.
            log.error("a task cannot be started yet", attempt_id=attempt_id, error=str(error))
            await asyncio.sleep(_STORE_RETRY_S)
            return
        attempt = begun.attempt
        active.attempt, active.run_no = attempt, begun.run_no
        self.hold_lease(attempt)
        if active.stop_cause is not None:
            # It was asked for before there was anything to stop; the cause is stored with the end.
            never_ran = RunEnded(ended_by=EndedBy.STOP, ended_wall_ns=self._clock.wall_ms() * 1_000_000)
            await self._finish(active, outcome_of(never_ran, active.stop_cause), None)
            return
        try:
            async with self._starting:
                run = await self._launch(attempt, begun.run_no)
        except (LaunchError, OSError, ValueError) as error:
            code = wire_exit_code(Cause.LAUNCH_FAILED, None, None)
            outcome = Outcome(Cause.LAUNCH_FAILED, code, None, f"the task was not started: {error}")
            await self._finish(active, outcome, None)
            return
        await self._follow(active, run)

    def _begin(self, db: sqlite3.Connection, attempt_id: AttemptId) -> _Begun:
        """Write the next run down, unless there is a reason not to start it: one look and one commit."""
        waiting = views.attempt(db, attempt_id)
        if waiting is None or not waiting.state.is_waiting:
            raise LostRace(f"attempt {attempt_id} no longer waits")
        if self._lease_is_over(waiting):
            return _Begun(waiting, (Cause.LEASE_LOST, "the lease ended before the task could be started"))
        reason = refusal(waiting.task)
        if reason is not None:
            return _Begun(waiting, (Cause.POLICY_REFUSED, reason))
        attempt, run_no = units.begin_run(db, attempt_id, self._clock.wall_ms())
        return _Begun(attempt, run_no=run_no)

    async def _launch(self, attempt: Attempt, run_no: RunNo) -> Run:
        prepare_work_dir(attempt.task, self._settings.run)
        lease = self.leases.current(attempt.attempt_id) or attempt.lease
        ttl_s = lease.ttl_s if lease is not None else None
        spec = build_run_spec(attempt.task, attempt.attempt_id, run_no, self._settings.run, lease_ttl_s=ttl_s)
        return await self._launcher.launch(spec, self._fence_ns(lease))

    def _fence_ns(self, lease: Lease | None) -> int | None:
        """The deadline that the shim enforces; none for local tasks and where the operator prefers to go on."""
        if lease is None or self._settings.continues_when_unreachable:
            return None
        return lease.deadline_boottime_ns

    def _lease_is_over(self, attempt: Attempt) -> bool:
        lease = self.leases.current(attempt.attempt_id) or attempt.lease
        return lease is not None and lease.deadline_boottime_ns <= self._clock.boottime_ns()

    # --- adopting ---

    def adopt(
        self, attempt: Attempt, run_no: RunNo, run: Run, stop_cause: Cause | None, *, is_suspended: bool = False
    ) -> None:
        """Take over a run that another agent process started; its identity and report are stored if they were not.

        What was stored about its suspension counts, whether or not the other agent came to act on it.
        """
        active = Active(attempt.attempt_id, attempt.task_id, attempt.task.resources, attempt, run_no)
        active.run, active.stop_cause = run, stop_cause
        self.active[attempt.attempt_id] = active
        if run.is_to_be_suspended != is_suspended:
            try:
                _suspend_or_resume(run, is_suspended=is_suspended)
            except OSError as error:
                log.error("a run is not as it should be", attempt_id=attempt.attempt_id, error=str(error))
        self._loops.spawn(f"run-{attempt.attempt_id}", lambda: self._own(active, self._follow(active, run)))

    def hold_lease(self, attempt: Attempt) -> None:
        """Keep an open attempt's lease, with or without a process; the later one of store and shim counts."""
        active, lease = self.active.get(attempt.attempt_id), attempt.lease
        if active is not None and active.run is not None and lease is not None:
            deadline_ns = max(lease.deadline_boottime_ns, active.run.deadline_boottime_ns or 0)
            lease = lease.model_copy(update={"deadline_boottime_ns": deadline_ns})
            attempt = replace(attempt, lease=lease)
        self.leases.hold(attempt)

    async def settle(
        self, attempt: Attempt, run_no: RunNo, stop_cause: Cause | None, record: RunRecord | None, missing: str
    ) -> None:
        """Finish a run that ended while no agent was there. `missing` says why when the record has no end."""
        active = Active(attempt.attempt_id, attempt.task_id, attempt.task.resources, attempt, run_no)
        active.stop_cause = stop_cause
        if record is not None and record.started is not None:
            await self._store.enqueue(self._started_unit(active, record.started))
        await self._finish(active, self._outcome(active, record, missing), record)
        self._announcer.announce(attempt.task_id)

    # --- following ---

    async def _follow(self, active: Active, run: Run) -> None:
        active.run = run
        if run.started is not None:
            await self._note_started(active, run.started)
        if active.stop_cause is not None:
            self._signal(active)
        record = await run.wait()
        if active.started is None and record.started is not None:
            await self._note_started(active, record.started)
        if active.stop_cause is None and was_stopped(record) and await self._launcher.is_host_stopping():
            active.stop_cause = Cause.HOST_SHUTDOWN
        await self._finish(active, self._outcome(active, record, Missing.SHIM_LOST), record)

    async def _note_started(self, active: Active, started: RunStarted) -> None:
        """Store identity and report. Not waited for: the record has the identity, and units are committed in order."""
        active.started = started
        unit = self._started_unit(active, started)
        stored = await self._store.enqueue(unit)
        stored.add_done_callback(lambda done: self._on_started_stored(active, unit, done))
        for tell in self._on_started:
            tell(active)

    def _on_started_stored(self, active: Active, unit: Callable[..., None], done: asyncio.Future[None]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._announcer.announce(active.task_id)
            self._on_report()
        elif isinstance(error, StoreUnavailable):
            self._loops.spawn(f"started-{active.attempt_id}", lambda: self._store_again(unit))
        else:
            log.error("the start of a run could not be stored", attempt_id=active.attempt_id, error=str(error))

    async def _store_again(self, unit: Callable[..., None]) -> None:
        while True:
            await asyncio.sleep(_STORE_RETRY_S)
            try:
                await self._store.write(unit)
            except StoreUnavailable:
                continue
            self._on_report()
            return

    def _started_unit(self, active: Active, started: RunStarted) -> Callable[..., None]:
        attempt_id, run_no = active.attempt_id, active.run_no
        report = self._reports.start(active.attempt, run_no, started) if active.attempt is not None else None
        started_ms = started.started_wall_ns // 1_000_000
        return lambda db: units.run_started(db, attempt_id, run_no, started.process, started_ms, report)

    def _outcome(self, active: Active, record: RunRecord | None, missing: str) -> Outcome:
        if record is None or record.ended is None:
            return outcome_of_missing(missing, active.stop_cause)
        return outcome_of(record.ended, active.stop_cause, record.spec.timeout_s)

    async def _finish(self, active: Active, outcome: Outcome, record: RunRecord | None) -> None:
        attempt, run_no = active.attempt, active.run_no
        if attempt is None:
            raise RuntimeError("a run ended before it had begun")
        active.outcome = outcome
        after = after_run(
            outcome,
            attempt.task.retry,
            retries_used=attempt.retries_used,
            free_retries_used=attempt.free_retries_used,
            may_run=not self._lease_is_over(attempt) and not _is_to_end(active),
        )
        ended_ms = record.ended.ended_wall_ns // 1_000_000 if record and record.ended else self._clock.wall_ms()
        is_final = after.event.value in {"complete", "fail", "cancel"}
        report = self._reports.complete(attempt, run_no, outcome, record, ended_ms) if is_final else None
        await self._store_end(active, _End(outcome, after, ended_ms, record, report))
        if is_final:
            self.leases.release(attempt.attempt_id)
        elif _is_to_end(active):
            # It was asked for while the end was on its way to disk.
            await self._end_anyway(active)
        log.info(
            "a run has ended",
            task_id=attempt.task_id,
            attempt_id=attempt.attempt_id,
            run_no=run_no,
            cause=outcome.cause,
            exit_code=outcome.exit_code,
            follows=after.event,
        )

    async def _end_anyway(self, active: Active) -> None:
        attempt = await self._store.read(lambda db: views.attempt(db, active.attempt_id))
        if attempt is not None and active.stop_cause is not None:
            await self.end_waiting(attempt, active.stop_cause, "it was to be stopped when its last run ended by itself")

    async def _store_end(self, active: Active, end: _End) -> None:
        """Store a run's end, once the store can be written. The last progress comes before it, in the same commit."""
        progress = self._last_progress(active) if end.record is not None else None
        while True:
            try:
                await self._store.write(lambda db: self._end_unit(db, active, end, progress))
            except (LostRace, IllegalTransition) as race:
                log.error("a run's end was stored before", attempt_id=active.attempt_id, reason=str(race))
                return
            except StoreUnavailable as error:
                # The record on disk keeps the result; it is stored as soon as there is room again.
                log.error("a result cannot be stored yet", attempt_id=active.attempt_id, error=str(error))
                await asyncio.sleep(_STORE_RETRY_S)
            else:
                if end.report is not None:
                    self._on_report()
                return

    def _end_unit(self, db: sqlite3.Connection, active: Active, end: _End, progress: Progress | None) -> None:
        after, ended = end.after, end.record.ended if end.record is not None else None
        if progress is not None:
            units.set_progress(db, active.attempt_id, *progress, end.ended_ms, self._progress_report(active, progress))
        units.run_ended(
            db,
            active.attempt_id,
            active.run_no,
            end.outcome,
            after,
            ended_at_ms=end.ended_ms,
            ready_boottime_ns=self._clock.boottime_ns() + round(after.delay_s * 1e9) if after.delay_s else 0,
            boot_id=self._settings.boot_id,
            usage=usage_of(ended.usage) if ended is not None else None,
            report=end.report,
            drop_reports=not CAUSE_RULES[end.outcome.cause].is_reported,
        )

    # --- progress ---

    async def store_progress(self, attempt_id: AttemptId, percent: float, message: str) -> None:
        """Store and report the progress of a run that is alive."""
        active = self.active.get(attempt_id)
        if active is None:
            return
        now_ms, report = self._clock.wall_ms(), self._progress_report(active, (percent, message))
        await self._store.write(lambda db: units.set_progress(db, attempt_id, percent, message, now_ms, report))
        self._on_report()

    def progress_file(self, active: Active) -> tuple[Path, int]:
        """Where the task writes its progress, and the uid that it must belong to."""
        run = self._settings.run
        return progress_path(run.state_dir, active.task_id), run.user.uid if run.user is not None else os.geteuid()

    def _last_progress(self, active: Active) -> Progress | None:
        return read_progress(*self.progress_file(active))

    def _progress_report(self, active: Active, progress: Progress) -> tuple[JsonObject, str] | None:
        report = self._reports.progress(active.attempt, *progress) if active.attempt is not None else None
        return (report, self._settings.boot_id) if report is not None else None

    # --- suspending ---

    async def suspend(self, attempt_id: AttemptId) -> None:
        """Let a running task stand still: on disk first, then in fact. It keeps what it holds, and its lease.

        Raises Refused: STATE_CONFLICT (it does not run), UNAVAILABLE; StoreUnavailable.
        """
        await self._change_suspension(attempt_id, units.suspend_run, is_suspended=True)

    async def resume(self, attempt_id: AttemptId) -> None:
        """Let a suspended task go on. Raises Refused: STATE_CONFLICT (it is not suspended); StoreUnavailable."""
        await self._change_suspension(attempt_id, units.resume_run, is_suspended=False)

    async def _change_suspension(
        self, attempt_id: AttemptId, unit: Callable[[sqlite3.Connection, AttemptId, RunNo], None], *, is_suspended: bool
    ) -> None:
        active = self.active.get(attempt_id)
        if active is None or active.run is None:
            raise Refused(Code.STATE_CONFLICT, "it has no process")
        run_no, run = active.run_no, active.run
        try:
            await self._store.write(lambda db: unit(db, attempt_id, run_no))
        except (LostRace, IllegalTransition) as error:
            raise Refused(Code.STATE_CONFLICT, str(error)) from None
        try:
            _suspend_or_resume(run, is_suspended=is_suspended)
        except OSError as error:
            undo = units.resume_run if is_suspended else units.suspend_run
            with contextlib.suppress(LostRace, IllegalTransition):  # it has ended meanwhile
                await self._store.write(lambda db: undo(db, attempt_id, run_no))
            raise Refused(Code.UNAVAILABLE, f"the run's directory cannot be written: {error.strerror}") from error
        self._announcer.announce(active.task_id)
        word = "suspended" if is_suspended else "resumed"
        log.info(f"a run is {word}", task_id=active.task_id, attempt_id=attempt_id, run_no=run_no)

    # --- stopping ---

    async def stop(self, attempt_id: AttemptId, cause: Cause, *, is_kill: bool = False) -> bool:
        """Stop an attempt: its process with the grace period (or at once), or its waiting. False if it has ended.

        The reason is on disk before any signal is sent (unless the disk is full: then it is stored with the end); the
        first reason counts. Safe to repeat. Raises StoreUnavailable for an attempt that waits.
        """
        active = self.active.get(attempt_id)
        if active is None:
            return await self._stop_waiting(attempt_id, cause)
        if active.run_no:
            try:
                cause = await self._store.write(lambda db: units.request_stop(db, attempt_id, active.run_no, cause))
            except LostRace:  # the run has ended just now; the task may be about to be repeated
                return await self._stop_waiting(attempt_id, cause)
            except StoreUnavailable as error:
                log.error("a stop cannot be stored yet", attempt_id=attempt_id, cause=cause, error=str(error))
                if cause is not Cause.SUPERSEDED:
                    cause = active.stop_cause or cause
        active.stop_cause = cause
        active.is_kill = active.is_kill or is_kill
        self._signal(active)
        return True

    async def _stop_waiting(self, attempt_id: AttemptId, cause: Cause) -> bool:
        attempt = await self._store.read(lambda db: views.attempt(db, attempt_id))
        if attempt is None or attempt.state.is_final:
            return False
        return await self.end_waiting(attempt, cause, _WAITING_SENTENCES.get(cause, f"ended: {cause}"))

    def _signal(self, active: Active) -> None:
        if active.run is None:
            return
        if active.is_kill:
            active.run.kill()
        else:
            active.run.stop()

    def extend(self, attempt_id: AttemptId, lease: Lease) -> None:
        """Move the shim's deadline to the renewed lease's."""
        active = self.active.get(attempt_id)
        fence_ns = self._fence_ns(lease)
        if active is not None and active.run is not None and fence_ns is not None:
            active.run.extend(fence_ns)

    async def end_waiting(self, attempt: Attempt, cause: Cause, sentence: str) -> bool:
        """End an attempt that has no process. False if it has one now, or has ended."""
        now_ms = self._clock.wall_ms()
        outcome = Outcome(cause, wire_exit_code(cause, None, None), None, sentence)
        report = self._reports.never_ran(attempt, outcome, now_ms, can_release=self.can_release())
        to_send = (*report, self._settings.boot_id) if report is not None else None
        try:
            await self._store.write(
                lambda db: units.end_waiting(
                    db, attempt.attempt_id, cause, sentence, outcome.exit_code, now_ms, to_send
                )
            )
        except (LostRace, IllegalTransition):
            return False
        self.leases.release(attempt.attempt_id)
        self._announcer.announce(attempt.task_id)
        self._on_free()
        self._on_report()
        log.info("a waiting task has ended", task_id=attempt.task_id, attempt_id=attempt.attempt_id, cause=cause)
        return True


def _suspend_or_resume(run: Run, *, is_suspended: bool) -> None:
    if is_suspended:
        run.suspend()
    else:
        run.resume()


def was_stopped(record: RunRecord) -> bool:
    """Whether it ended because somebody asked its shim to; if that was not this agent, it may have been a shutdown."""
    return record.ended is not None and record.ended.ended_by is EndedBy.STOP


def _is_to_end(active: Active) -> bool:
    """Whether somebody has asked for a stop that no further run may follow."""
    return active.stop_cause is not None and CAUSE_RULES[active.stop_cause].retry is Retry.NEVER


_WAITING_SENTENCES: Final = {
    Cause.CANCELLED: "cancelled on request before it ran",
    Cause.SUPERSEDED: "another attempt has this task now",
    Cause.LEASE_LOST: "the lease ended before the task could be started",
}
