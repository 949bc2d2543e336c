"""The units: submissions, claims, runs and their races; a refused one changes nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remotegpu_queue import units, views
from remotegpu_queue.rows import Attempt
from remotegpu_queue.store import LostRace, run_batch
from remotegpu_queue.transitions import AfterRun, IllegalTransition, Outcome
from remotegpu_queue.units import ClaimResult
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId, RunNo
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.states import Cause, RunState, TaskEvent, TaskState
from remotegpu_schemas.task import Resources, TaskId
from tests.queue.support import (
    BOOT,
    FAIL,
    FAILED,
    NOW_MS,
    RETRY,
    SUCCEEDED,
    S,
    begin,
    claim,
    due,
    dump,
    end,
    end_waiting,
    make_task,
    new_attempt,
    process,
    run_unit,
    started,
    stop,
    submit,
)


def _attempt(db: sqlite3.Connection, attempt_id: str) -> Attempt:
    found = views.attempt(db, AttemptId(attempt_id))
    assert found is not None
    return found


def _refused(db: sqlite3.Connection, unit: Callable[[sqlite3.Connection], Any], error: type[Exception]) -> None:
    """The unit is refused with `error`, and nothing was changed."""
    before = dump(db)
    with pytest.raises(error):
        run_unit(db, unit)
    assert dump(db) == before


# --- submissions ---


def test_submitted_task_comes_back_as_it_was(db: sqlite3.Connection) -> None:
    """A task is read as it was submitted, pending, without lease or run."""
    task = make_task("t1", labels={"team": "ä"}, resources=Resources(gpus=2, cpus=1.5, memory_gb=0.5), env={"A": "b\n"})
    units.submit(db, [units.NewAttempt(task, AttemptId("a1"), "local", BOOT)], NOW_MS)
    found = _attempt(db, "a1")
    assert (found.task, found.task_id, found.state, found.lease) == (task, TaskId("t1"), TaskState.PENDING, None)
    assert (found.run_no, found.submitted_at_ms, found.started_at_ms, found.is_synced) == (0, NOW_MS, None, False)


def test_an_id_is_used_once(db: sqlite3.Connection) -> None:
    """A task id that was ever used is refused, also within one submission; all or nothing is stored."""
    submit(db, "t1")
    end_waiting(db, "t1")
    with pytest.raises(Refused) as refusal:
        submit(db, "t1")
    assert refusal.value.code is Code.ALREADY_EXISTS
    twice = [new_attempt("t2", "a2"), new_attempt("t2", "a3")]
    _refused(db, lambda db: units.submit(db, twice, NOW_MS), Refused)


def test_queue_has_a_bound(db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the bound a submission is refused whole; what has ended does not count."""
    monkeypatch.setattr(limits, "QUEUE_MAX_TASKS", 3)
    submit(db, "t1", "t2")
    three = [new_attempt(f"n{number}", f"n{number}") for number in range(2)]
    with pytest.raises(Refused) as refusal:
        run_unit(db, lambda db: units.submit(db, three, NOW_MS))
    assert refusal.value.code is Code.QUEUE_FULL
    end_waiting(db, "t1")
    run_unit(db, lambda db: units.submit(db, three, NOW_MS))
    _refused(db, lambda db: submit(db, "t9"), Refused)


# --- claims ---


def test_claimed_attempt(db: sqlite3.Connection) -> None:
    """A claimed attempt is assigned, with its lease and renewal interval."""
    assert claim(db, "t1", "a1") == ClaimResult(AttemptId("a1"), is_new=True)
    found = _attempt(db, "a1")
    assert found.lease is not None
    assert (found.state, found.origin, found.lease.ttl_s, found.lease.deadline_boottime_ns, found.renew_interval_s) == (
        TaskState.ASSIGNED,
        "control_plane",
        300.0,
        300 * S,
        60.0,
    )


def test_f50_repeated_claim_is_ignored(db: sqlite3.Connection) -> None:
    """A known attempt is left alone however often it is claimed, whatever has become of it."""
    claim(db, "t1", "a1")
    for step in (lambda: None, lambda: begin(db, "a1"), lambda: end(db, "a1")):
        step()
        before = dump(db)
        assert claim(db, "t1", "a1", priority=1) == ClaimResult(AttemptId("a1"), is_new=False)
        assert dump(db) == before


def test_f14_newer_attempt_supersedes_a_waiting_one(db: sqlite3.Connection) -> None:
    """An older attempt that waits is ended, without a word to the plane; the new one is the task's latest."""
    claim(db, "t1", "a1")
    begin(db, "a1")
    started(db, "a1", report={"x": 1})
    end(db, "a1", FAILED, RETRY)
    assert claim(db, "t1", "a2") == ClaimResult(AttemptId("a2"), is_new=True)
    old = _attempt(db, "a1")
    assert (old.state, old.cause, old.exit_code, old.is_synced) == (TaskState.FAILED, Cause.SUPERSEDED, 125, True)
    assert due(db) == []
    assert views.find_task(db, "t1")[0].attempt_id == "a2"


def test_f14_newer_attempt_names_a_running_one(db: sqlite3.Connection) -> None:
    """An older attempt with a process is named, and the new one cannot start before that one has ended."""
    claim(db, "t1", "a1")
    begin(db, "a1")
    assert claim(db, "t1", "a2").superseded == ("a1",)
    _refused(db, lambda db: begin(db, "a2"), LostRace)
    end(db, "a1", Outcome(Cause.SUPERSEDED, 125, None, "x"), FAIL, drop_reports=True)
    assert begin(db, "a2") == 1


def test_superseded_attempt_never_goes_on(db: sqlite3.Connection) -> None:
    """A run that ends by itself before its stop was asked for is not repeated when a newer attempt has the task."""
    claim(db, "t1", "a1")
    begin(db, "a1")
    started(db, "a1", report={"x": 1})
    claim(db, "t1", "a2")
    assert end(db, "a1", FAILED, RETRY) is TaskState.FAILED
    old = _attempt(db, "a1")
    assert (old.cause, old.retries_used, old.is_synced) == (Cause.SUPERSEDED, 0, True)
    assert due(db) == []
    run = views.run(db, AttemptId("a1"), RunNo(1))
    assert run is not None
    assert run.cause is Cause.EXIT_CODE


def test_one_claim_answer_with_one_task_twice(db: sqlite3.Connection) -> None:
    """Two attempts of one task in one answer leave the later one."""
    both = [new_attempt("t1", name, "control_plane") for name in ("a1", "a2")]
    units.add_claims(db, both, NOW_MS)
    assert [_attempt(db, name).state for name in ("a1", "a2")] == [TaskState.FAILED, TaskState.ASSIGNED]


# --- runs ---


def test_way_of_a_run(db: sqlite3.Connection) -> None:
    """A run is begun, started and ended; the attempt is completed and the run holds what was used."""
    submit(db, "t1")
    attempt, run_no = units.begin_run(db, AttemptId("t1"), 5)
    assert (attempt.state, attempt.run_no, attempt.started_at_ms, run_no) == (TaskState.RUNNING, 1, 5, 1)
    started(db, "t1", pid=42)
    assert end(db, "t1") is TaskState.COMPLETED
    run = views.run(db, AttemptId("t1"), RunNo(1))
    assert run is not None
    assert (run.state, run.cause, run.exit_code, run.process, run.usage) == (
        RunState.ENDED,
        Cause.SUCCEEDED,
        0,
        process(42),
        {"wall_s": 1.5},
    )
    ended = _attempt(db, "t1")
    assert (ended.cause, ended.exit_code, ended.ended_at_ms, ended.is_synced) == (Cause.SUCCEEDED, 0, NOW_MS, True)


def test_retry_keeps_attempt_and_counts(db: sqlite3.Connection) -> None:
    """A retry waits with its delay and counters; the next run has the next number; the first start's time stays."""
    submit(db, "t1")
    units.begin_run(db, AttemptId("t1"), 5)
    assert end(db, "t1", FAILED, AfterRun(TaskEvent.RETRY, 1, 2), ready_ns=77) is TaskState.PENDING
    waiting = _attempt(db, "t1")
    assert (waiting.retries_used, waiting.free_retries_used, waiting.ready_boottime_ns) == (1, 2, 77)
    assert waiting.cause is None
    again, run_no = units.begin_run(db, AttemptId("t1"), 9)
    assert (run_no, again.ready_boottime_ns, again.started_at_ms) == (2, 0, 5)
    assert end(db, "t1", FAILED, AfterRun(TaskEvent.FAIL, 1, 2), run_no=2) is TaskState.FAILED


def test_preempted_attempt_waits_for_requeue(db: sqlite3.Connection) -> None:
    """A preempted attempt does not wait for capacity, and can be cancelled."""
    submit(db, "t1")
    begin(db, "t1")
    preempted = Outcome(Cause.PREEMPTED, 125, None, "x")
    assert end(db, "t1", preempted, AfterRun(TaskEvent.PREEMPT, 0, 1)) is TaskState.PREEMPTED
    _refused(db, lambda db: begin(db, "t1"), LostRace)
    end_waiting(db, "t1")
    assert _attempt(db, "t1").state is TaskState.CANCELLED


def test_lost_races_of_begin(db: sqlite3.Connection) -> None:
    """A run is begun only for an attempt that waits: not for an unknown, a running or an ended one."""
    submit(db, "running", "ended")
    begin(db, "running")
    end_waiting(db, "ended")
    for name in ("nobody", "running", "ended"):
        _refused(db, lambda db, name=name: begin(db, name), LostRace)  # type: ignore[misc]


def test_a_broken_constraint_is_no_lost_race(db: sqlite3.Connection) -> None:
    """Only the promise `one live attempt per task` is a race; another violated constraint is a mistake and says so."""
    submit(db, "t1")
    db.execute("DROP INDEX runs_one_open")
    db.execute("CREATE TRIGGER broken BEFORE UPDATE ON attempts BEGIN SELECT raise(ABORT, 'broken'); END")
    _refused(db, lambda db: begin(db, "t1"), sqlite3.IntegrityError)


def test_start_is_stored_once(db: sqlite3.Connection) -> None:
    """Identity and start report are stored once, however often an adopting agent repeats them; never after the end."""
    claim(db, "t1", "a1")
    begin(db, "a1")
    started(db, "a1", pid=42, report={"n": 1})
    started(db, "a1", pid=43, report={"n": 2})
    assert [each.body for each in due(db)] == [{"n": 1}]
    end(db, "a1", report={"n": 3})
    before = dump(db)
    started(db, "a1", pid=44, report={"n": 4})
    assert dump(db) == before


def test_start_of_an_unknown_run(db: sqlite3.Connection) -> None:
    """The identity of a run that does not exist is a lost race."""
    submit(db, "t1")
    _refused(db, lambda db: started(db, "t1", 1), LostRace)


def test_start_after_a_stop_request(db: sqlite3.Connection) -> None:
    """A run that was to be stopped while it started gets its identity and stays `stopping`."""
    submit(db, "t1")
    begin(db, "t1")
    stop(db, "t1", Cause.CANCELLED)
    started(db, "t1", pid=42)
    run = views.run(db, AttemptId("t1"), RunNo(1))
    assert run is not None
    assert (run.state, run.process) == (RunState.STOPPING, process(42))


def _states(db: sqlite3.Connection, attempt_id: str) -> tuple[TaskState, RunState]:
    run = views.run(db, AttemptId(attempt_id), RunNo(1))
    assert run is not None
    return _attempt(db, attempt_id).state, run.state


def test_suspended_and_resumed(db: sqlite3.Connection) -> None:
    """Task and run change together, there and back, and a suspended task can be stopped and can end."""
    submit(db, "t1")
    begin(db, "t1")
    started(db, "t1")
    key = AttemptId("t1"), RunNo(1)
    units.suspend_run(db, *key)
    assert _states(db, "t1") == (TaskState.SUSPENDED, RunState.SUSPENDED)
    units.resume_run(db, *key)
    assert _states(db, "t1") == (TaskState.RUNNING, RunState.RUNNING)
    units.suspend_run(db, *key)
    stop(db, "t1", Cause.CANCELLED)
    assert _states(db, "t1") == (TaskState.SUSPENDED, RunState.STOPPING)
    end(db, "t1", FAILED, FAIL)
    assert _states(db, "t1") == (TaskState.FAILED, RunState.ENDED)


def test_what_does_not_run_cannot_be_suspended(db: sqlite3.Connection) -> None:
    """Waiting, starting, suspended, stopping, ended, unknown: refused, and nothing has changed."""
    submit(db, "t1")
    key = AttemptId("t1"), RunNo(1)
    _refused(db, lambda db: units.suspend_run(db, *key), LostRace)
    begin(db, "t1")
    _refused(db, lambda db: units.suspend_run(db, *key), IllegalTransition)
    started(db, "t1")
    _refused(db, lambda db: units.resume_run(db, *key), IllegalTransition)
    _refused(db, lambda db: units.suspend_run(db, key[0], RunNo(2)), LostRace)
    units.suspend_run(db, *key)
    _refused(db, lambda db: units.suspend_run(db, *key), IllegalTransition)
    stop(db, "t1", Cause.CANCELLED)
    _refused(db, lambda db: units.suspend_run(db, *key), IllegalTransition)
    _refused(db, lambda db: units.resume_run(db, *key), IllegalTransition)
    end(db, "t1")
    _refused(db, lambda db: units.suspend_run(db, *key), IllegalTransition)
    _refused(db, lambda db: units.resume_run(db, *key), IllegalTransition)


def test_first_stop_request_counts(db: sqlite3.Connection) -> None:
    """The first reason is kept; only superseded, which forbids every report, takes its place."""
    submit(db, "t1")
    begin(db, "t1")
    assert stop(db, "t1", Cause.CANCELLED) is Cause.CANCELLED
    assert stop(db, "t1", Cause.LEASE_LOST) is Cause.CANCELLED
    assert stop(db, "t1", Cause.SUPERSEDED) is Cause.SUPERSEDED
    assert stop(db, "t1", Cause.CANCELLED) is Cause.SUPERSEDED
    assert stop(db, "t1", Cause.SUPERSEDED) is Cause.SUPERSEDED


def test_lost_races_of_stop(db: sqlite3.Connection) -> None:
    """A run that does not exist or has ended cannot be asked to stop."""
    submit(db, "t1")
    _refused(db, lambda db: stop(db, "t1", Cause.CANCELLED), LostRace)
    begin(db, "t1")
    end(db, "t1", FAILED, RETRY)
    _refused(db, lambda db: stop(db, "t1", Cause.CANCELLED), LostRace)
    begin(db, "t1")
    _refused(db, lambda db: stop(db, "t1", Cause.CANCELLED, run_no=1), LostRace)
    assert stop(db, "t1", Cause.CANCELLED, run_no=2) is Cause.CANCELLED


@pytest.mark.parametrize("cause", [Cause.CANCELLED, Cause.STOPPED])
def test_f31_cancelled_local_task_is_not_repeated(db: sqlite3.Connection, cause: Cause) -> None:
    """A local task whose end was asked for ends with its run, although that failed by itself and had retries left."""
    submit(db, "t1")
    begin(db, "t1")
    stop(db, "t1", cause)
    assert end(db, "t1", FAILED, RETRY) is TaskState.CANCELLED
    ended = _attempt(db, "t1")
    assert (ended.cause, ended.exit_code, ended.retries_used) == (cause, 143, 0)


def test_f31_stop_for_another_task_lets_it_go_on(db: sqlite3.Connection) -> None:
    """A run that failed by itself when it was to make room is repeated as its policy says."""
    submit(db, "t1")
    begin(db, "t1")
    stop(db, "t1", Cause.PREEMPTED)
    assert end(db, "t1", FAILED, RETRY) is TaskState.PENDING


def test_lost_races_of_end(db: sqlite3.Connection) -> None:
    """A run ends once; a run that does not exist, or an older one, does not end."""
    submit(db, "t1")
    _refused(db, lambda db: end(db, "t1"), LostRace)
    begin(db, "t1")
    end(db, "t1", FAILED, RETRY)
    _refused(db, lambda db: end(db, "t1"), LostRace)
    begin(db, "t1")
    _refused(db, lambda db: end(db, "t1"), LostRace)
    end(db, "t1", run_no=2)
    _refused(db, lambda db: end(db, "t1", run_no=2), LostRace)


def test_end_that_does_not_fit_changes_nothing(db: sqlite3.Connection) -> None:
    """An event that the table does not know takes the run's end back as well."""
    submit(db, "t1")
    begin(db, "t1")
    _refused(db, lambda db: end(db, "t1", SUCCEEDED, AfterRun(TaskEvent.RESUME, 0, 0)), IllegalTransition)


def test_an_attempt_row_that_is_elsewhere_is_a_lost_race(db: sqlite3.Connection) -> None:
    """A run whose attempt has another run by now is a lost race, and its end is taken back."""
    submit(db, "t1")
    begin(db, "t1")
    db.execute("UPDATE attempts SET run_no = 2")
    _refused(db, lambda db: end(db, "t1"), LostRace)


def test_end_and_report_are_one(db: sqlite3.Connection) -> None:
    """The completion is in the outbox when the attempt is final, and the attempt is synced once it is delivered."""
    claim(db, "t1", "a1")
    begin(db, "a1")
    end(db, "a1", report={"exit_code": 0})
    assert [(each.kind, each.body, each.task_id) for each in due(db)] == [("complete", {"exit_code": 0}, "t1")]
    assert not _attempt(db, "a1").is_synced


def test_superseded_run_says_nothing(db: sqlite3.Connection) -> None:
    """What a superseded attempt still had to say is forgotten with its end."""
    claim(db, "t1", "a1")
    begin(db, "a1")
    started(db, "a1", report={"n": 1})
    end(db, "a1", Outcome(Cause.SUPERSEDED, 125, None, "x"), FAIL, drop_reports=True)
    assert due(db) == []
    assert _attempt(db, "a1").is_synced


# --- ends without a process ---


def test_end_waiting(db: sqlite3.Connection) -> None:
    """An attempt that waits ends with its cause, and its report waits for delivery."""
    claim(db, "t1", "a1")
    end_waiting(db, "a1", Cause.CANCELLED, ("complete", {"n": 1}, BOOT))
    ended = _attempt(db, "a1")
    assert (ended.state, ended.cause, ended.error, ended.exit_code) == (
        TaskState.CANCELLED,
        Cause.CANCELLED,
        "because",
        143,
    )
    assert [each.kind for each in due(db)] == ["complete"]


def test_end_waiting_after_a_run_keeps_order(db: sqlite3.Connection) -> None:
    """A task cancelled between two runs is reported after what its first run said."""
    claim(db, "t1", "a1")
    begin(db, "a1")
    started(db, "a1", report={"n": 1})
    end(db, "a1", FAILED, RETRY, ready_ns=99)
    end_waiting(db, "a1", Cause.CANCELLED, ("complete", {"n": 2}, BOOT))
    assert [row[0] for row in db.execute("SELECT kind FROM outbox ORDER BY id")] == ["start", "complete"]
    assert _attempt(db, "a1").ready_boottime_ns == 0


def test_lost_races_of_end_waiting(db: sqlite3.Connection) -> None:
    """An attempt with a process, an ended one and an unknown one do not wait."""
    submit(db, "running", "ended")
    begin(db, "running")
    end_waiting(db, "ended")
    for name in ("running", "ended", "nobody"):
        _refused(db, lambda db, name=name: end_waiting(db, name), LostRace)  # type: ignore[misc]


# --- leases and progress ---


def test_extend_lease(db: sqlite3.Connection) -> None:
    """A renewal moves deadline and ttl of an open attempt; not of an ended one, nor of one without a lease."""
    claim(db, "t1", "a1")
    submit(db, "local")
    assert units.extend_lease(db, AttemptId("a1"), 60.0, 5)
    lease = _attempt(db, "a1").lease
    assert lease is not None
    assert (lease.ttl_s, lease.deadline_boottime_ns) == (60.0, 5)
    end_waiting(db, "a1")
    assert not units.extend_lease(db, AttemptId("a1"), 60.0, 6)
    assert not units.extend_lease(db, AttemptId("local"), 60.0, 6)
    assert not units.extend_lease(db, AttemptId("nobody"), 60.0, 6)


def test_progress_of_a_running_attempt_only(db: sqlite3.Connection) -> None:
    """Progress is kept while the attempt runs, and ignored before and after."""
    submit(db, "t1")
    units.set_progress(db, AttemptId("t1"), 10.0, "early", NOW_MS, ({}, BOOT))
    begin(db, "t1")
    units.set_progress(db, AttemptId("t1"), 20.0, "now", NOW_MS, None)
    end(db, "t1")
    units.set_progress(db, AttemptId("t1"), 30.0, "late", NOW_MS, ({}, BOOT))
    found = _attempt(db, "t1")
    assert (found.progress_percent, found.progress_message) == (20.0, "now")
    assert due(db) == []


def test_latest_progress_only(db: sqlite3.Connection) -> None:
    """A new progress takes the place of the one that waits, behind the start."""
    claim(db, "t1", "a1")
    begin(db, "a1")
    started(db, "a1", report={})
    for percent in (1.0, 2.0, 3.0):
        units.set_progress(db, AttemptId("a1"), percent, "", NOW_MS, ({"percent": percent}, BOOT))
    rows = db.execute("SELECT kind, body FROM outbox ORDER BY id").fetchall()
    assert [tuple(row) for row in rows] == [("start", "{}"), ("progress", '{"percent": 3.0}')]


# --- the database as a whole ---


def test_f21_rebase_after_a_reboot(db: sqlite3.Connection) -> None:
    """After a reboot leases of open attempts are over, delays and back-offs too; ended attempts keep their history."""
    claim(db, "t1", "open")
    claim(db, "t2", "over")
    end_waiting(db, "over", Cause.CANCELLED, ("complete", {}, BOOT))
    submit(db, "local")
    begin(db, "local")
    end(db, "local", FAILED, RETRY, ready_ns=10**15)
    db.execute("UPDATE outbox SET due_boottime_ns = 99")
    for _ in range(2):
        units.rebase(db, "boot-2")
        lease, ended = _attempt(db, "open").lease, _attempt(db, "over").lease
        assert lease is not None
        assert ended is not None
        assert (lease.deadline_boottime_ns, lease.boot_id, ended.boot_id) == (0, "boot-2", BOOT)
        assert _attempt(db, "local").ready_boottime_ns == 0
        assert len(due(db)) == 1
    units.extend_lease(db, AttemptId("open"), 60.0, 77)
    units.rebase(db, "boot-2")
    lease = _attempt(db, "open").lease
    assert lease is not None
    assert lease.deadline_boottime_ns == 77


def test_meta_keeps_the_first_value(db: sqlite3.Connection) -> None:
    """A value is stored the first time, and counts from then on."""
    assert [units.meta(db, "agent_id", value) for value in ("a", "b")] == ["a", "a"]


def test_a_long_life_leaves_no_garbage(db: sqlite3.Connection) -> None:
    """What an attempt leaves besides its history goes with it."""
    submit(db, "t1", labels={"a": "b"})
    begin(db, "t1")
    end(db, "t1")
    db.execute("DELETE FROM attempts")
    assert [len(rows) for table, rows in dump(db).items() if table in {"runs", "labels"}] == [0, 0]


def test_units_run_on_an_inline_connection(tmp_path: Path, db: sqlite3.Connection) -> None:
    """A batch of units gives each its own result, as in the running agent."""
    submit(db, "t1")
    results = run_batch(
        db, [lambda db: begin(db, "t1"), lambda db: begin(db, "t1"), lambda db: stop(db, "t1", Cause.STOPPED)]
    )
    assert results[0] == 1
    assert isinstance(results[1].error, LostRace)
    assert results[2] is Cause.STOPPED
