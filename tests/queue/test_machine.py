"""Every order of units that hypothesis finds, on a real database: the promises hold after each step."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from remotegpu_queue import outbox, units, views
from remotegpu_queue.store import Failed, LostRace, run_batch
from remotegpu_queue.transitions import IllegalTransition, Missing, after_run, outcome_of, outcome_of_missing
from remotegpu_schemas.attempt import AttemptId, EndedBy, RunEnded, RunNo
from remotegpu_schemas.errors import Refused
from remotegpu_schemas.states import (
    CAUSE_RULES,
    RUN_TRANSITIONS,
    STOP_CAUSES,
    TASK_TRANSITIONS,
    Cause,
    RunState,
    TaskState,
)
from remotegpu_schemas.task import RetryPolicy
from tests.queue.support import NOW_MS, dump, new_attempt, open_inline, process

_EXPECTED = (LostRace, IllegalTransition, Refused)
_TASK_MOVES = {(str(old), str(new)) for (old, _), new in TASK_TRANSITIONS.items()}
_RUN_MOVES = {(str(old), str(new)) for (old, _), new in RUN_TRANSITIONS.items()}
_POLICY = RetryPolicy(max=2, delay_s=1)
_TASKS = st.integers(0, 1)
_ATTEMPTS = st.integers(0, 9)
_ENDS = st.sampled_from(
    [
        RunEnded(ended_by=EndedBy.EXIT, exit_code=0, ended_wall_ns=1),
        RunEnded(ended_by=EndedBy.EXIT, exit_code=1, ended_wall_ns=1),
        RunEnded(ended_by=EndedBy.EXIT, signal=9, ended_wall_ns=1),
        RunEnded(ended_by=EndedBy.STOP, exit_code=0, ended_wall_ns=1),
        RunEnded(ended_by=EndedBy.TIMEOUT, signal=15, ended_wall_ns=1),
        RunEnded(ended_by=EndedBy.LEASE, signal=9, ended_wall_ns=1),
        RunEnded(ended_by=EndedBy.LAUNCH, errno=2, ended_wall_ns=1),
        RunEnded(ended_by=EndedBy.ABANDONED, ended_wall_ns=1),
        *Missing,
    ]
)


class Units(RuleBasedStateMachine):
    """Units as the agent's parts run them, in any order, also late, twice, and for the wrong attempt."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="remotegpu-machine-"))
        self.db: sqlite3.Connection = open_inline(self.folder / "queue.db")
        self.attempts: list[str] = []
        self.boot = 1
        self.clock_ns = 0
        self.task_states: dict[str, str] = {}
        self.run_states: dict[tuple[str, int], str] = {}
        self.completed: Counter[str] = Counter()
        self.reports_seen: set[int] = set()

    def teardown(self) -> None:
        self.db.close()
        shutil.rmtree(self.folder)

    # --- steps ---

    def _run(self, unit: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run a unit as the store does; anything but a refusal that the agent knows is a bug."""
        before = dump(self.db)
        (result,) = run_batch(self.db, [unit])
        if isinstance(result, Failed):
            assert isinstance(result.error, _EXPECTED), repr(result.error)
            assert dump(self.db) == before
            return None
        return result

    def _pick(self, number: int) -> AttemptId:
        """Mostly an open attempt, the newest first; sometimes any."""
        is_open = [name for name in self.attempts if not TaskState(self.task_states.get(name, "failed")).is_final]
        names = is_open[::-1] if number < 8 and is_open else self.attempts
        return AttemptId(names[number % len(names)])

    def _boot_id(self) -> str:
        return f"boot-{self.boot}"

    @initialize(task=_TASKS)
    def first(self, task: int) -> None:
        self.claim(task)

    @precondition(lambda self: len(self.attempts) < 12)
    @rule(task=_TASKS)
    def submit(self, task: int) -> None:
        name = f"l{len(self.attempts)}"
        self.attempts.append(name)
        self._run(lambda db: units.submit(db, [new_attempt(f"local-{task}", name)], NOW_MS))

    @precondition(lambda self: len(self.attempts) < 12)
    @rule(task=_TASKS)
    def claim(self, task: int) -> None:
        name = f"c{len(self.attempts)}"
        self.attempts.append(name)
        result = self._run(lambda db: units.add_claims(db, [new_attempt(f"t{task}", name, "control_plane")], NOW_MS))
        assert result[0].is_new

    @rule(number=_ATTEMPTS, task=_TASKS)
    def claim_again(self, number: int, task: int) -> None:
        known = self._pick(number)
        if views.attempt(self.db, known) is not None:
            again = new_attempt(f"t{task}", known, "control_plane")
            assert not self._run(lambda db: units.add_claims(db, [again], NOW_MS))[0].is_new

    @rule(number=_ATTEMPTS)
    def begin(self, number: int) -> None:
        self._run(lambda db: units.begin_run(db, self._pick(number), NOW_MS))

    @rule(number=_ATTEMPTS, how=_ENDS)
    def go_on(self, number: int, how: RunEnded | Missing) -> None:
        """The natural next step of an attempt."""
        attempt_id = self._pick(number)
        run = views.run(self.db, attempt_id, self._run_no(number, is_late=False))
        if run is None or run.state is RunState.ENDED:
            self.begin(number)
        elif run.process is None:
            self.started(number, is_late=False)
        else:
            self.end(number, how, is_late=False, is_leased=True)

    @rule(number=_ATTEMPTS, is_late=st.booleans())
    def started(self, number: int, is_late: bool) -> None:
        attempt_id, run_no = self._pick(number), self._run_no(number, is_late=is_late)
        report = {"run_no": run_no} if attempt_id.startswith("c") else None
        identity = process(100 + run_no, self._boot_id())
        self._run(lambda db: units.run_started(db, attempt_id, run_no, identity, NOW_MS, report))

    @rule(number=_ATTEMPTS, cause=st.sampled_from(sorted(STOP_CAUSES)), is_late=st.booleans())
    def request_stop(self, number: int, cause: Cause, is_late: bool) -> None:
        run_no = self._run_no(number, is_late=is_late)
        self._run(lambda db: units.request_stop(db, self._pick(number), run_no, cause))

    @rule(number=_ATTEMPTS, is_late=st.booleans(), is_resumed=st.booleans())
    def suspend_or_resume(self, number: int, is_late: bool, is_resumed: bool) -> None:
        run_no = self._run_no(number, is_late=is_late)
        unit = units.resume_run if is_resumed else units.suspend_run
        self._run(lambda db: unit(db, self._pick(number), run_no))

    def _run_no(self, number: int, *, is_late: bool) -> RunNo:
        attempt = views.attempt(self.db, self._pick(number))
        return RunNo(max(1, (attempt.run_no if attempt else 0) - is_late))

    @rule(number=_ATTEMPTS, how=_ENDS, is_late=st.booleans(), is_leased=st.booleans())
    def end(self, number: int, how: RunEnded | Missing, is_late: bool, is_leased: bool) -> None:
        """What the executor does when a run has ended."""
        attempt_id, run_no = self._pick(number), self._run_no(number, is_late=is_late)
        attempt, run = views.attempt(self.db, attempt_id), views.run(self.db, attempt_id, run_no)
        if attempt is None:
            return
        stop_cause = run.stop_cause if run is not None else None
        outcome = outcome_of_missing(how, stop_cause) if isinstance(how, Missing) else outcome_of(how, stop_cause)
        after = after_run(
            outcome,
            _POLICY,
            retries_used=attempt.retries_used,
            free_retries_used=attempt.free_retries_used,
            may_run=is_leased,
        )
        rule_ = CAUSE_RULES[outcome.cause]
        is_last = after.event in {"complete", "fail", "cancel"}
        is_told = is_last and attempt.origin == "control_plane" and rule_.is_reported
        report = {"exit_code": outcome.exit_code} if is_told else None
        self._run(
            lambda db: units.run_ended(
                db,
                attempt_id,
                run_no,
                outcome,
                after,
                ended_at_ms=NOW_MS,
                ready_boottime_ns=self.clock_ns + round(after.delay_s * 1e9),
                boot_id=self._boot_id(),
                usage=None,
                report=report,
                drop_reports=not rule_.is_reported,
            )
        )

    @rule(number=_ATTEMPTS, cause=st.sampled_from([Cause.CANCELLED, Cause.SUPERSEDED, Cause.LEASE_LOST]))
    def end_waiting(self, number: int, cause: Cause) -> None:
        attempt_id = self._pick(number)
        is_told = attempt_id.startswith("c") and CAUSE_RULES[cause].is_reported
        report: tuple[outbox.ReportKind, outbox.Body, str] | None = (
            ("complete", {}, self._boot_id()) if is_told else None
        )
        self._run(lambda db: units.end_waiting(db, attempt_id, cause, "x", 143, NOW_MS, report))

    @rule(number=_ATTEMPTS, ttl_s=st.sampled_from([0.5, 300.0]))
    def renew(self, number: int, ttl_s: float) -> None:
        deadline_ns = self.clock_ns + round(ttl_s * 1e9)
        self._run(lambda db: units.extend_lease(db, self._pick(number), ttl_s, deadline_ns))

    @rule(number=_ATTEMPTS, percent=st.sampled_from([0.0, 50.0, 100.0]))
    def progress(self, number: int, percent: float) -> None:
        attempt_id = self._pick(number)
        report = ({"percent": percent}, self._boot_id()) if attempt_id.startswith("c") else None
        self._run(lambda db: units.set_progress(db, attempt_id, percent, "m", NOW_MS, report))

    @rule(number=st.integers(0, 5), fate=st.sampled_from(["delivered", "again", "dead", "drop", "drop all"]))
    def deliver(self, number: int, fate: str) -> None:
        reports, _ = outbox.due_reports(self.db, self.clock_ns, 16)
        if not reports:
            return
        report = reports[number % len(reports)]
        fates: dict[str, Callable[[sqlite3.Connection], None]] = {
            "delivered": lambda db: outbox.report_delivered(db, report),
            "again": lambda db: outbox.report_retry(db, report.id, self.clock_ns + 10**9, "down", NOW_MS),
            "dead": lambda db: outbox.report_dead(db, report.id, "refused"),
            "drop": lambda db: outbox.drop_report(db, report.id),
            "drop all": lambda db: outbox.drop_reports(db, report.attempt_id),
        }
        self._run(fates[fate])

    @rule()
    def time_passes(self) -> None:
        self.clock_ns += 2 * 10**9

    @rule()
    def reboot(self) -> None:
        self.boot += 1
        self.clock_ns = 0
        self._run(lambda db: units.rebase(db, self._boot_id()))
        self._run(lambda db: units.rebase(db, self._boot_id()))

    # --- what holds after each ---

    def _all(self, query: str) -> list[sqlite3.Row]:
        return self.db.execute(query).fetchall()

    @invariant()
    def one_live_attempt_per_task_and_one_open_run_per_attempt(self) -> None:
        live = (
            "SELECT task_id FROM attempts WHERE state IN ('running', 'suspended') GROUP BY task_id HAVING count(*) > 1"
        )
        assert self._all(live) == []
        assert self._all("SELECT 1 FROM runs WHERE state <> 'ended' GROUP BY attempt_id HAVING count(*) > 1") == []

    @invariant()
    def a_run_is_open_exactly_while_its_attempt_is_live(self) -> None:
        live = {
            (row[0], row[1])
            for row in self._all("SELECT attempt_id, run_no FROM attempts WHERE state IN ('running', 'suspended')")
        }
        assert {
            (row[0], row[1]) for row in self._all("SELECT attempt_id, run_no FROM runs WHERE state <> 'ended'")
        } == live

    @invariant()
    def a_run_is_suspended_only_while_its_attempt_is(self) -> None:
        """The attempt stays so until its run has ended, also while that is being stopped."""
        query = (
            "SELECT a.state, r.state FROM runs r JOIN attempts a USING (attempt_id, run_no) WHERE r.state <> 'ended'"
        )
        for attempt_state, run_state in self._all(query):
            assert (attempt_state == "suspended") == (run_state == "suspended") or run_state == "stopping"

    @invariant()
    def one_open_attempt_waits_per_task(self) -> None:
        """What waits is the latest attempt of its task: an older one never runs again."""
        assert self._all("SELECT 1 FROM attempts WHERE state IN ('pending', 'assigned') AND NOT is_latest") == []
        newest = "SELECT max(seq) AS seq FROM attempts GROUP BY task_id ORDER BY 1"
        assert self._all("SELECT seq FROM attempts WHERE is_latest ORDER BY 1") == self._all(newest)

    @invariant()
    def states_move_along_the_tables(self) -> None:
        now = {row[0]: row[1] for row in self._all("SELECT attempt_id, state FROM attempts")}
        runs = {(row[0], row[1]): row[2] for row in self._all("SELECT attempt_id, run_no, state FROM runs")}
        for name, state in now.items():
            old = self.task_states.get(name, state)
            assert old == state or (old, state) in _TASK_MOVES, (name, old, state)
        for key, state in runs.items():
            before = self.run_states.get(key, RunState.STARTING)
            assert before == state or (before, state) in _RUN_MOVES, (key, before, state)
        assert set(self.task_states) <= set(now)
        assert set(self.run_states) <= set(runs)
        self.task_states, self.run_states = now, runs

    @invariant()
    def a_final_attempt_was_completed_exactly_once(self) -> None:
        """Claimed ones that nobody superseded; local and superseded ones say nothing."""
        for row in self._all("SELECT id, attempt_id FROM outbox WHERE kind = 'complete'"):
            if row["id"] not in self.reports_seen:
                self.reports_seen.add(row["id"])
                self.completed[row["attempt_id"]] += 1
        for row in self._all("SELECT attempt_id, origin, state, cause FROM attempts"):
            is_told = (
                TaskState(row["state"]).is_final and row["origin"] == "control_plane" and row["cause"] != "superseded"
            )
            assert self.completed[row["attempt_id"]] == is_told, dict(row)

    @invariant()
    def the_oldest_report_of_each_attempt_is_the_one_with_a_due_time(self) -> None:
        heads = [row[0] for row in self._all("SELECT min(id) FROM outbox WHERE is_dead = 0 GROUP BY attempt_id")]
        assert sorted(heads) == [
            row[0] for row in self._all("SELECT id FROM outbox WHERE due_boottime_ns IS NOT NULL ORDER BY id")
        ]
        reports, _ = outbox.due_reports(self.db, 2**62, 1000)
        assert sorted(report.id for report in reports) == sorted(heads)

    @invariant()
    def an_ended_attempt_says_nothing_after_its_completion(self) -> None:
        late = "SELECT 1 FROM outbox c JOIN outbox o USING (attempt_id) WHERE c.kind = 'complete' AND o.id > c.id"
        assert self._all(late) == []

    @invariant()
    def retries_are_bounded(self) -> None:
        assert self._all("SELECT 1 FROM attempts WHERE retries_used > 2 OR free_retries_used > 10") == []

    @invariant()
    def the_views_can_read_it_all(self) -> None:
        page, total = views.list_attempts(self.db, [], {}, 1000, 0)
        assert sum(views.counts(self.db).by_state.values()) == total == len(page)
        waits = [item.attempt_id for item in views.waiting(self.db, 1000)]
        assert sorted(waits) == sorted(
            name for name, state in self.task_states.items() if state in {"pending", "assigned"}
        )
        assert len(views.open_runs(self.db)) == len([run for run in self.run_states.values() if run != "ended"])
        views.open_attempts(self.db)


TestUnits = Units.TestCase
TestUnits.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestUnits = pytest.mark.timeout(300)(TestUnits)
