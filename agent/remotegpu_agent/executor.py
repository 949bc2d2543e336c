"""One attempt from waiting to reported: launches its runs, takes over those of an earlier agent, waits, stops them.

Owns the runs that are alive (`active`): whatever goes wrong, one is let go of only when its end is on disk. What is
written down, and when, is `bookkeeping.py`'s; processes are the sidecar's.

Long, because one run is one life: whoever starts, suspends or stops it needs the same few values.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from remotegpu_agent.announcer import Announcer
from remotegpu_agent.bookkeeping import RETRY_S, Books, StopStored
from remotegpu_agent.clock import Clock
from remotegpu_agent.leases import LeaseKeeper
from remotegpu_agent.progress import read_progress
from remotegpu_agent.runspec import RunSettings, build_run_spec, prepare_work_dir, progress_path
from remotegpu_agent.supervise import Loops
from remotegpu_agent.task_user import settings_of
from remotegpu_queue import restoring
from remotegpu_queue.rows import Attempt
from remotegpu_queue.rows import Run as StoredRun
from remotegpu_queue.store import LostRace, StoreUnavailable
from remotegpu_queue.transitions import (
    IllegalTransition,
    Missing,
    Outcome,
    launch_cause,
    outcome_of,
    outcome_of_missing,
)
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import (
    AttemptId,
    EndedBy,
    Lease,
    ProcessIdentity,
    RunEnded,
    RunNo,
    RunRecord,
    RunStarted,
    TaskUser,
)
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.states import Cause, RunState, wire_exit_code
from remotegpu_schemas.task import Resources, TaskId
from remotegpu_sidecar import identity, remains
from remotegpu_sidecar.launcher import Adopted, AdoptedState, Launcher, LaunchError, Run

log = structlog.get_logger(__name__)

_AGAIN_AFTER_S: Final = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_NO_DEADLINE_NS: Final = 2**62
"""A century and a half after boot."""

MISSING: Final = {AdoptedState.NEVER_STARTED: Missing.NEVER_STARTED, AdoptedState.OTHER_BOOT: Missing.REBOOTED}
"""Every other state without an end on record means that the shim was lost."""


@dataclass
class Active:
    """A run that is being started, runs, or is being stopped. `run` is None until its shim was told to go."""

    attempt_id: AttemptId
    task_id: TaskId
    resources: Resources
    attempt: Attempt | None = None
    run_no: RunNo = RunNo(0)
    run: Run | None = None
    started: RunStarted | None = None
    known_process: ProcessIdentity | None = None
    """The main process, as an earlier agent stored it."""
    stop_cause: Cause | None = None
    is_kill: bool = False
    is_suspended: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: Outcome | None = None


class Executor:
    """Starts, adopts, stops and finishes runs.

    `on_free` is called when capacity or the queue has changed, `on_report` when a report is due.
    """

    def __init__(
        self,
        books: Books,
        launcher: Launcher,
        clock: Clock,
        settings: RunSettings,
        loops: Loops,
        announcer: Announcer,
        *,
        continues_when_unreachable: bool,
        on_free: Callable[[], None],
        on_report: Callable[[], None],
    ) -> None:
        self._books = books
        self._launcher = launcher
        self._clock = clock
        self._settings = settings
        self._loops = loops
        self._announcer = announcer
        self._continues_when_unreachable = continues_when_unreachable
        self._on_free = on_free
        self._on_report = on_report
        self._on_started: list[Callable[[Active], None]] = []
        self._on_ended: list[Callable[[Active], None]] = []
        self._starting = asyncio.Semaphore(limits.RUNS_STARTING_MAX)
        self.active: dict[AttemptId, Active] = {}
        self.leases: LeaseKeeper

    def watch(self, *, started: Callable[[Active], None], ended: Callable[[Active], None]) -> None:
        """Tell others when a run has started and when it has ended."""
        self._on_started.append(started)
        self._on_ended.append(ended)

    # --- owning ---

    def start(self, attempt_id: AttemptId, task_id: TaskId, resources: Resources) -> None:
        """Start the next run of a waiting attempt in the background; its capacity counts as taken from now on."""
        if attempt_id not in self.active:
            active = Active(attempt_id, task_id, resources)
            self._own(active, lambda: self._execute(active))

    def adopt(self, attempt: Attempt, run: StoredRun, found: Adopted | None) -> None:
        """Take over a run that another agent process wrote down: `found` is what its directory says, if it has one.

        It holds its capacity until its end is on disk.
        """
        active = Active(attempt.attempt_id, attempt.task_id, attempt.task.resources, attempt, run.run_no)
        active.run = found.run if found is not None else None
        active.known_process, active.stop_cause = run.process, run.stop_cause
        active.is_suspended = run.state is RunState.SUSPENDED
        self._own(active, lambda: self._take_over(active, found))

    def _own(self, active: Active, work: Callable[[], Awaitable[None]]) -> None:
        self.active[active.attempt_id] = active
        self._loops.spawn(f"run-{active.attempt_id}", lambda: self._until_done(active, work))

    async def _until_done(self, active: Active, work: Callable[[], Awaitable[None]]) -> None:
        """A run that was written down is never let go of before its end is: after a failure it is looked at again."""
        failures = 0
        try:
            while True:
                try:
                    await work()
                    return
                except Exception:
                    self._loops.count_failure("run")
                    log.exception("a run could not be followed; trying again", attempt_id=active.attempt_id)
                await asyncio.sleep(_AGAIN_AFTER_S[min(failures, len(_AGAIN_AFTER_S) - 1)])
                failures += 1
                if active.attempt is None:
                    return  # nothing was written down: it still waits
                work = partial(self._look_again, active)
        finally:
            self._let_go(active)

    def _let_go(self, active: Active) -> None:
        if active.run is not None:
            active.run.close()
        self.active.pop(active.attempt_id, None)
        active.ended.set()
        for tell in self._on_ended:
            tell(active)
        self._announcer.announce(active.task_id)
        self._on_free()

    async def _look_again(self, active: Active) -> None:
        if active.run is not None:
            active.run.close()
            active.run = None
        await self._take_over(active, await self._launcher.look_again(active.attempt_id, active.run_no))

    # --- starting ---

    async def _execute(self, active: Active) -> None:
        try:
            begun = await self._books.begin(active.attempt_id)
        except (LostRace, StoreUnavailable) as error:
            # It keeps its slot for a moment: whoever frees one makes the dispatcher try again at once.
            log.info("a task is not started", attempt_id=active.attempt_id, reason=str(error))
            await asyncio.sleep(RETRY_S if isinstance(error, StoreUnavailable) else RETRY_S / 10)
            return
        if begun.refusal is not None:
            self._ended_waiting(begun.attempt, begun.refusal[0])
            return
        active.attempt, active.run_no = begun.attempt, begun.run_no
        self.hold_lease(begun.attempt)
        try:
            async with self._starting:
                active.run = None if active.stop_cause is not None else await self._launch(begun.attempt, begun.run_no)
        except (LaunchError, OSError, ValueError) as error:
            why = launch_cause(getattr(error, "errno", None))
            code = wire_exit_code(why, None, None)
            failed = Outcome(why, code, None, f"the task was not started: {error}")
            await self._finish(active, None, lambda cause: failed if cause is None else _stopped_before(cause))
            return
        if active.run is None:
            await self._finish(active, None, lambda cause: _stopped_before(cause or Cause.CANCELLED))
        else:
            await self._follow(active, active.run)

    async def _launch(self, attempt: Attempt, run_no: RunNo) -> Run:
        settings = await settings_of(attempt.submitter_uid, self._settings)
        prepare_work_dir(attempt.task, settings)
        lease = self.leases.current(attempt.attempt_id) or attempt.lease
        ttl_s = lease.ttl_s if lease is not None else None
        spec = build_run_spec(attempt.task, attempt.attempt_id, run_no, settings, lease_ttl_s=ttl_s)
        spec = spec.model_copy(update={"memo": restoring.memo_of(attempt, lease)})
        return await self._launcher.launch(spec, self._fence_ns(lease))

    def _fence_ns(self, lease: Lease | None) -> int | None:
        """The deadline that the shim enforces; none for local tasks and where the operator prefers to go on."""
        if lease is None or self._continues_when_unreachable:
            return None
        return lease.deadline_boottime_ns

    # --- following ---

    async def _take_over(self, active: Active, found: Adopted | None) -> None:
        """Go on with a run by what its directory says. Raises while that cannot be told."""
        if found is not None and found.run is not None:
            if self._continues_when_unreachable and found.run.deadline_boottime_ns is not None:
                found.run.extend(_NO_DEADLINE_NS)  # from before the setting was changed
            if found.run.is_to_be_suspended != active.is_suspended:
                # What was stored counts, whether or not the other agent came to act on it.
                _suspend_or_resume(found.run, is_suspended=active.is_suspended)
            await self._follow(active, found.run)
            return
        state, record = (found.state, found.record) if found is not None else (AdoptedState.NEVER_STARTED, None)
        if found is None:
            # Its directory was never made, or somebody has removed it: then its shim may live, and nobody knows of it.
            left = await self._launcher.clear(active.attempt_id, active.run_no, active.known_process)
            if left:
                raise RuntimeError(f"processes of {active.attempt_id} that SIGKILL has not removed: {left}")
        elif found.left_pids or state is AdoptedState.UNREADABLE:
            await self._clear(active, found)
        if (
            active.stop_cause is None
            and record is not None
            and was_stopped(record)
            and _is_of_another_boot(record, self._books.boot_id)
        ):
            active.stop_cause = Cause.HOST_SHUTDOWN  # no agent asked for it, nor lived to see it
        missing = MISSING.get(state, Missing.SHIM_LOST)
        await self._finish(active, record, lambda cause: _judged(record, missing, cause))

    async def _clear(self, active: Active, found: Adopted) -> None:
        """See that nothing of a lost run is left.

        One that lives though its record cannot be read is left alone until its end is asked for.
        """
        started = found.record.started if found.record is not None else None
        main = started.process if started is not None else active.known_process
        key = (active.attempt_id, active.run_no)
        cgroup = found.record.cgroup if found.record is not None else None
        groups: dict[remains.RunKey, str] = {key: cgroup} if cgroup is not None else {}
        if found.state is AdoptedState.UNREADABLE:
            alive = [stat.pid for stat in (await asyncio.to_thread(remains.find, {key: main}))[key]]
            if not alive and (main is None or not identity.is_alive(main)):
                return
            if active.stop_cause is None:
                raise RuntimeError(f"{found.directory.name} cannot be read ({found.reason}), and {alive} live")
        log.error("what is left of a run is being killed", directory=str(found.directory), reason=found.reason)
        left = await remains.kill({key: main}, limits.REMAINS_PATIENCE_S, groups)
        if left[key]:
            raise RuntimeError(f"processes of {found.directory.name} that SIGKILL has not removed: {left[key]}")
        await remains.remove_groups(groups.values())

    async def _follow(self, active: Active, run: Run) -> None:
        active.run = run
        if active.stop_cause is not None:
            self._signal(active)
        started = await run.wait_started()
        if started is not None:
            await self._note_started(active, started)
        record = await run.wait()
        if active.stop_cause is None and was_stopped(record) and await self._launcher.is_host_stopping():
            active.stop_cause = Cause.HOST_SHUTDOWN
        await self._finish(active, record, lambda cause: _judged(record, Missing.SHIM_LOST, cause))

    async def _note_started(self, active: Active, started: RunStarted) -> None:
        """Store identity and report. Not waited for: the record has the identity, and units are committed in order."""
        active.started = started
        if active.attempt is not None:
            stored = await self._books.started(active.attempt, active.run_no, started)
            stored.add_done_callback(lambda done: self._on_started_stored(active, started, done))
        for tell in self._on_started:
            tell(active)

    def _on_started_stored(self, active: Active, started: RunStarted, done: asyncio.Future[None]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._announcer.announce(active.task_id)
            self._on_report()
        elif isinstance(error, StoreUnavailable):
            self._loops.spawn(f"started-{active.attempt_id}", lambda: self._store_started_again(active, started))
        else:
            log.error("the start of a run could not be stored", attempt_id=active.attempt_id, error=str(error))

    async def _store_started_again(self, active: Active, started: RunStarted) -> None:
        if active.attempt is not None:
            await asyncio.sleep(RETRY_S)
            await self._books.started_again(active.attempt, active.run_no, started)
            self._on_report()

    async def _finish(self, active: Active, record: RunRecord | None, judge: Callable[[Cause | None], Outcome]) -> None:
        attempt = active.attempt
        if attempt is None:
            raise RuntimeError("a run ended before it had begun")
        progress = read_progress(self._progress_path(active), record.spec.user) if record is not None else None
        ended = await self._books.ended(
            attempt, active.run_no, record, judge, asked=lambda: active.stop_cause, progress=progress
        )
        if ended is None:
            return
        active.outcome = ended.outcome
        if ended.after.is_final:
            self.leases.release(attempt.attempt_id)
        self._on_report()
        log.info(
            "a run has ended",
            task_id=attempt.task_id,
            attempt_id=attempt.attempt_id,
            run_no=active.run_no,
            cause=ended.outcome.cause,
            exit_code=ended.outcome.exit_code,
            follows=ended.after.event,
        )

    # --- progress ---

    async def store_progress(self, attempt_id: AttemptId, percent: float, message: str) -> None:
        """Store and report the progress of a run that is alive."""
        active = self.active.get(attempt_id)
        if active is not None and active.attempt is not None:
            await self._books.progress(active.attempt, (percent, message))
            self._on_report()

    def progress_file(self, active: Active) -> tuple[Path, TaskUser | None]:
        """Where a run that has started writes its progress, and whose it must be; None is the agent's own user."""
        return self._progress_path(active), active.run.spec.user if active.run is not None else self._settings.user

    def _progress_path(self, active: Active) -> Path:
        return progress_path(self._settings.state_dir, active.task_id)

    # --- suspending ---

    async def suspend(self, attempt_id: AttemptId) -> None:
        """Let a running task stand still: on disk first, then in fact. It keeps what it holds, and its lease.

        Raises Refused: STATE_CONFLICT (it does not run), UNAVAILABLE; StoreUnavailable.
        """
        await self._change_suspension(attempt_id, is_suspended=True)

    async def resume(self, attempt_id: AttemptId) -> None:
        """Let a suspended task go on. Raises Refused: STATE_CONFLICT (it is not suspended); StoreUnavailable."""
        await self._change_suspension(attempt_id, is_suspended=False)

    async def _change_suspension(self, attempt_id: AttemptId, *, is_suspended: bool) -> None:
        active = self.active.get(attempt_id)
        if active is None or active.run is None:
            raise Refused(Code.STATE_CONFLICT, "it has no process")
        run_no, run = active.run_no, active.run
        try:
            await self._books.suspended(attempt_id, run_no, is_suspended=is_suspended)
        except (LostRace, IllegalTransition) as error:
            raise Refused(Code.STATE_CONFLICT, str(error)) from None
        try:
            _suspend_or_resume(run, is_suspended=is_suspended)
        except OSError as error:
            with contextlib.suppress(LostRace, IllegalTransition):  # it has ended meanwhile
                await self._books.suspended(attempt_id, run_no, is_suspended=not is_suspended)
            raise Refused(Code.UNAVAILABLE, f"the run's directory cannot be written: {error.strerror}") from error
        active.is_suspended = is_suspended
        self._announcer.announce(active.task_id)
        event = "a run is suspended" if is_suspended else "a run is resumed"
        log.info(event, task_id=active.task_id, attempt_id=attempt_id, run_no=run_no)

    # --- stopping and leases ---

    async def stop(self, attempt_id: AttemptId, cause: Cause, *, is_kill: bool = False) -> bool:
        """Stop an attempt: its process with the grace period (or at once), or its waiting. False if it has ended.

        The reason is on disk before any signal is sent (unless the store does not answer: then it is stored with the
        end); the first reason counts. Safe to repeat. Raises StoreUnavailable for an attempt that has no run.
        """
        try:
            stored, counts = await self._books.stop(attempt_id, cause, self._stopped_late)
        except StoreUnavailable as error:
            active = self.active.get(attempt_id)
            if active is None or active.attempt is None or active.outcome is not None:
                raise
            log.error("a stop cannot be stored yet", attempt_id=attempt_id, cause=cause, error=str(error))
            stored = StopStored.REQUESTED
            counts = cause if cause is Cause.SUPERSEDED else active.stop_cause or cause
        active = self.active.get(attempt_id)
        if stored is StopStored.ENDED_NOW:
            self.leases.release(attempt_id)
            self._on_free()
            self._on_report()
            log.info("a waiting task has ended", attempt_id=attempt_id, cause=counts)
        elif stored is StopStored.REQUESTED and active is not None:
            active.stop_cause = counts
            active.is_kill = active.is_kill or is_kill
            self._signal(active)
        return stored is not StopStored.HAD_ENDED

    def _stopped_late(self) -> None:
        """The store took a stop that nobody waits for any more: there may be a report, and room."""
        self._on_report()
        self._on_free()

    def _signal(self, active: Active) -> None:
        if active.run is None:
            return
        if active.is_kill:
            active.run.kill()
        else:
            active.run.stop()

    def hold_lease(self, attempt: Attempt) -> None:
        """Keep an open attempt's lease, with or without a process; the later one of store and shim counts."""
        active, lease = self.active.get(attempt.attempt_id), attempt.lease
        if active is not None and active.run is not None and lease is not None:
            deadline_ns = max(lease.deadline_boottime_ns, active.run.deadline_boottime_ns or 0)
            lease = lease.model_copy(update={"deadline_boottime_ns": deadline_ns})
            attempt = replace(attempt, lease=lease)
        self.leases.hold(attempt)

    def extend(self, attempt_id: AttemptId, lease: Lease) -> None:
        """Move the shim's deadline to the renewed lease's."""
        active = self.active.get(attempt_id)
        fence_ns = self._fence_ns(lease)
        if active is not None and active.run is not None and fence_ns is not None:
            active.run.extend(fence_ns)

    def _ended_waiting(self, attempt: Attempt, cause: Cause) -> None:
        self.leases.release(attempt.attempt_id)
        self._on_report()
        log.info("a waiting task has ended", task_id=attempt.task_id, attempt_id=attempt.attempt_id, cause=cause)


def _suspend_or_resume(run: Run, *, is_suspended: bool) -> None:
    if is_suspended:
        run.suspend()
    else:
        run.resume()


def was_stopped(record: RunRecord) -> bool:
    """Whether it ended because somebody asked its shim to; if that was not this agent, it may have been a shutdown."""
    return record.ended is not None and record.ended.ended_by is EndedBy.STOP


def _is_of_another_boot(record: RunRecord, boot_id: str) -> bool:
    return record.started is not None and record.started.shim.boot_id != boot_id


def _judged(record: RunRecord | None, missing: str, stop_cause: Cause | None) -> Outcome:
    if record is None or record.ended is None:
        return outcome_of_missing(missing, stop_cause)
    return outcome_of(record.ended, stop_cause, record.spec.timeout_s)


def _stopped_before(cause: Cause) -> Outcome:
    """It was asked for before there was anything to stop."""
    return outcome_of(RunEnded(ended_by=EndedBy.STOP, ended_wall_ns=0), cause)
