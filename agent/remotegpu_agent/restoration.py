"""What the attempt directories know and the database does not: written back before anything is adopted.

That is so after a damaged database or log, and after a backup was put back. A run that lives goes on as ever; the end
of one that is over is stored and reported, and no further run follows: whether one was still to come, or its end had
been asked for meanwhile, nobody knows any more.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog
from pydantic import ValidationError

from remotegpu_agent.executor import MISSING, was_stopped
from remotegpu_agent.reports import Reports, usage_of
from remotegpu_queue import restoring, units, views
from remotegpu_queue.restoring import LostRun, WrittenBack
from remotegpu_queue.store import LostRace, Store
from remotegpu_queue.transitions import AfterRun, Missing, Outcome, final_event, outcome_of, outcome_of_missing
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId, Lease, Memo, RunRecord, RunSpec
from remotegpu_schemas.states import CAUSE_RULES, Cause
from remotegpu_schemas.task import Task, TaskId
from remotegpu_sidecar import record
from remotegpu_sidecar.launcher import Adopted, AdoptedState

log = structlog.get_logger(__name__)

_RECORDS_ASKED_MAX: Final = 100
_NAMES: Final = {"REMOTEGPU_AGENT_ID": "agent_id", "REMOTEGPU_MACHINE_ID": "machine_id"}


@dataclass(frozen=True)
class Lost:
    """An attempt that the database does not know as its directories do, with these in the order of their runs."""

    attempt_id: AttemptId
    memo: Memo
    runs: list[Adopted]

    @property
    def is_over(self) -> bool:
        """Nothing of it lives."""
        return _is_dead(self.runs[-1])


@dataclass(frozen=True)
class Restored:
    """How many attempts were written back: alive, over, and those that could not be. `later` has been left for then."""

    alive: int = 0
    over: int = 0
    left: int = 0
    later: tuple[Lost, ...] = ()


@dataclass(frozen=True)
class Strays:
    """Run directories that no row knows and in which nothing lives; and the tasks of those that may live.

    `living` is None where a record cannot be read, so that it may be any task's.
    """

    directories: list[Path]
    living: frozenset[TaskId] | None


@dataclass(frozen=True)
class Restoration:
    """Writes back. `is_rebuild`: the database is new, so that even what an older release has left is taken in.

    `default_ttl_s` is the lease of a run whose release did not write it down.
    """

    store: Store
    reports: Reports
    boot_id: str
    now_ms: int
    is_rebuild: bool
    default_ttl_s: float

    async def restore(self, found: Sequence[Adopted]) -> Restored:
        """Write back what lives, and what the database waits for. Safe to repeat after a crash.

        What is over and not known at all may be a week's work: it is for `restore_later`, beside everything else.
        """
        groups: dict[AttemptId, list[Adopted]] = defaultdict(list)
        for each in sorted(found, key=lambda each: each.run_no or 0):
            if each.attempt_id is not None and each.run_no is not None and each.record is not None:
                groups[each.attempt_id].append(each)
        keys = [(attempt_id, each.run_no or 0) for attempt_id, group in groups.items() for each in group]
        runs = await self.store.read(lambda db: views.known_runs(db, keys))
        unknown = {attempt_id for attempt_id, run_no in keys if (attempt_id, run_no) not in runs}
        attempts = await self.store.read(lambda db: {each for each in unknown if views.attempt(db, each) is not None})
        lost = [
            Lost(each, memo, groups[each])
            for each in sorted(unknown)
            if (memo := self._memo(groups[each][-1])) is not None
        ]
        now = [each for each in lost if not each.is_over or each.attempt_id in attempts]
        later = tuple(each for each in lost if each.is_over and each.attempt_id not in attempts)
        alive, over = await self._write_all(now)
        return Restored(alive, over, len(unknown) - len(later) - alive - over, later)

    async def restore_later(self, restored: Restored) -> Restored:
        """Write back the rest. Safe to repeat after a crash."""
        _, over = await self._write_all(restored.later)
        left = restored.left + len(restored.later) - over
        return Restored(restored.alive, restored.over + over, left)

    async def strays(self, found: Sequence[Adopted]) -> Strays:
        """What no row knows after all of that."""
        known = await self.store.read(lambda db: views.known_runs(db, _keys_of(found)))
        unknown = [each for each in found if not known.intersection(_keys_of([each]))]
        living = [each for each in unknown if not _is_dead(each)]
        tasks = {each.record.spec.task_id for each in living if each.record is not None}
        is_complete = all(each.record is not None for each in living)
        return Strays([each.directory for each in unknown if _is_dead(each)], frozenset(tasks) if is_complete else None)

    async def _write_all(self, lost: Sequence[Lost]) -> tuple[int, int]:
        """How many that live, and how many that are over, have been written back."""
        # A task's attempts in their order: the last one is the task's.
        ordered = sorted(lost, key=lambda each: each.memo.submitted_at_ms)
        alive = over = 0
        for start in range(0, len(ordered), limits.STORE_BATCH_MAX_UNITS):
            batch = ordered[start : start + limits.STORE_BATCH_MAX_UNITS]
            written = await asyncio.gather(*(self._write_back(each) for each in batch))
            over += sum(each.is_over for each, is_written in zip(batch, written, strict=True) if is_written)
            alive += sum(not each.is_over for each, is_written in zip(batch, written, strict=True) if is_written)
        return alive, over

    async def _write_back(self, lost: Lost) -> bool:
        attempt_id, memo = lost.attempt_id, lost.memo

        def unit(db: sqlite3.Connection) -> WrittenBack:
            runs = [run for each in lost.runs if (run := self._lost_run(attempt_id, memo, each)) is not None]
            written = restoring.write_back(db, attempt_id, memo, runs, self.boot_id, self.now_ms)
            if written is WrittenBack.NEW and lost.is_over:
                self._conclude(db, attempt_id, runs[-1], lost.runs[-1].record)
            return written

        try:
            written = await self.store.insist(unit, "a lost attempt")
        except (sqlite3.IntegrityError, LostRace) as error:
            log.error("an attempt cannot be written back", attempt_id=attempt_id, error=str(error))
            return False
        was = written.name.lower()
        log.warning("an attempt was written back", attempt_id=attempt_id, task_id=memo.task.id, was=was)
        return written is not WrittenBack.LEFT

    def _conclude(self, db: sqlite3.Connection, attempt_id: AttemptId, run: LostRun, found: RunRecord | None) -> None:
        """Nothing lives of it: its last run's end is the attempt's."""
        attempt = views.attempt(db, attempt_id)
        if attempt is None or run.outcome is None:
            raise LostRace(f"attempt {attempt_id} was not written back")
        outcome, ended = run.outcome, run.ended
        ended_ms = ended.ended_wall_ns // 1_000_000 if ended is not None else self.now_ms
        outputs = self.reports.read_outputs(attempt, run.run_no, found)
        units.run_ended(
            db,
            attempt_id,
            run.run_no,
            outcome,
            AfterRun(final_event(outcome.cause), attempt.retries_used, attempt.free_retries_used),
            ended_at_ms=ended_ms,
            ready_boottime_ns=0,
            boot_id=self.boot_id,
            usage=usage_of(ended.usage) if ended is not None else None,
            report=self.reports.complete(attempt, run.run_no, outcome, outputs, ended_ms),
            drop_reports=not CAUSE_RULES[outcome.cause].is_reported,
        )

    def _lost_run(self, attempt_id: AttemptId, memo: Memo, found: Adopted) -> LostRun | None:
        if found.run_no is None or found.record is None:
            return None
        started = found.record.started
        report = None
        if started is not None and memo.origin == "control_plane":
            report = self.reports.start_body(attempt_id, found.run_no, started)
        return LostRun(
            found.run_no,
            started,
            found.record.ended,
            self._outcome(found.record, found) if found.run is None else None,
            report,
            found.run is not None and found.run.is_to_be_suspended,
        )

    def _outcome(self, found_record: RunRecord, found: Adopted) -> Outcome:
        started, ended = found_record.started, found_record.ended
        if ended is None:
            return outcome_of_missing(MISSING.get(found.state, Missing.SHIM_LOST))
        is_of_another_boot = started is not None and started.shim.boot_id != self.boot_id
        stop_cause = Cause.HOST_SHUTDOWN if was_stopped(found_record) and is_of_another_boot else None
        return outcome_of(ended, stop_cause, found_record.spec.timeout_s)

    def _memo(self, found: Adopted) -> Memo | None:
        spec = found.record.spec if found.record is not None else None
        if spec is None:
            return None
        if spec.memo is not None:
            try:
                return Memo.model_validate(spec.memo)
            except ValidationError as error:
                log.error("the memo of a run cannot be read", directory=str(found.directory), error=str(error)[:300])
        return self._guessed_memo(spec, found) if self.is_rebuild else None

    def _guessed_memo(self, spec: RunSpec, found: Adopted) -> Memo | None:
        """Of a run that an older release began: what its spec tells. It has no retries, labels nor priority."""
        deadline_ns = found.run.deadline_boottime_ns if found.run is not None else None
        has_lease = deadline_ns is not None or spec.lease_grace_s > 0
        started_ms = self.now_ms
        if found.record is not None and found.record.started is not None:
            started_ms = found.record.started.started_wall_ns // 1_000_000
        try:
            task = Task(id=spec.task_id, command=spec.argv[0], args=spec.argv[1:], timeout_s=spec.timeout_s or 0.0)
        except ValidationError:  # it runs all the same, though today it would not be taken
            task = Task(id=spec.task_id, name="not known any more", command="false")
        lease = None
        if has_lease:
            lease = Lease(ttl_s=self.default_ttl_s, deadline_boottime_ns=deadline_ns or 0, boot_id=self.boot_id)
        return Memo(
            task=task,
            origin="control_plane" if has_lease else "local",
            submitted_at_ms=started_ms,
            started_at_ms=started_ms,
            lease=lease,
        )


def _keys_of(found: Sequence[Adopted]) -> list[tuple[str, int]]:
    return [(each.attempt_id, each.run_no) for each in found if each.attempt_id is not None and each.run_no is not None]


def _is_dead(found: Adopted) -> bool:
    return found.run is None and not found.left_pids and found.state is not AdoptedState.UNREADABLE


def names_on_record(attempts_dir: Path) -> Mapping[str, str]:
    """What the agent and its machine were called, from the environment of the newest run that can be read."""
    for directory in _newest(attempts_dir):
        try:
            lines, _complaints = record.read(directory / record.FILE_NAME)
        except OSError:
            continue
        env = lines.get("spec", {}).get("env")
        if isinstance(env, dict):
            found = {key: str(env[name]) for name, key in _NAMES.items() if name in env}
            if found:
                return found
    return {}


def _newest(attempts_dir: Path) -> Iterator[Path]:
    try:
        with os.scandir(attempts_dir) as entries:
            dated = [(entry.stat(follow_symlinks=False).st_mtime_ns, entry.path) for entry in entries]
    except OSError:
        return
    for _, path in sorted(dated, reverse=True)[:_RECORDS_ASKED_MAX]:
        yield Path(path)
