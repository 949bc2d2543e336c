"""Attempts that the database lost, or of which it knows less than their directories do, are written down again."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from typing import Any

import pytest

from remotegpu_queue import units, views
from remotegpu_queue.restoring import LostRun, WrittenBack, memo_of, write_back
from remotegpu_queue.rows import Attempt, Origin
from remotegpu_queue.store import LostRace
from remotegpu_queue.transitions import Outcome
from remotegpu_schemas.attempt import AttemptId, Memo, RunNo, RunStarted
from remotegpu_schemas.states import Cause, RunState, TaskState
from tests.queue import support

ENDED = Outcome(Cause.EXIT_CODE, 3, None, "the task exited with code 3")
ONE = AttemptId("t.1")


def memo(
    db: sqlite3.Connection, origin: Origin = "local", attempt_id: str = "t.1", **task: Any
) -> tuple[Memo, Attempt]:
    """What is remembered of an attempt of `t` at its first run, and the attempt as it was; then everything is lost."""
    if origin == "local":
        units.submit(db, [support.new_attempt("t", attempt_id, **task)], support.NOW_MS)
    else:
        support.claim(db, "t", attempt_id, **task)
    support.begin(db, attempt_id)
    before = views.attempt(db, AttemptId(attempt_id))
    assert before is not None
    kept = Memo.model_validate(memo_of(before, before.lease))
    db.execute("DELETE FROM attempts")
    return kept, before


def lost(run_no: int = 1, *, outcome: Outcome | None = None, is_suspended: bool = False) -> LostRun:
    """A run whose process was known."""
    process = support.process()
    started = RunStarted(process=process, shim=process, started_wall_ns=10**9, started_boottime_ns=10**9)
    return LostRun(RunNo(run_no), started, None, outcome, is_suspended=is_suspended)


def back(db: sqlite3.Connection, kept: Memo, *runs: LostRun, attempt_id: AttemptId = ONE) -> WrittenBack:
    """Write it back."""
    return write_back(db, attempt_id, kept, runs, support.BOOT, 9000)


@pytest.mark.parametrize("origin", ["local", "control_plane"])
def test_f26_an_attempt_comes_back_as_it_was(db: sqlite3.Connection, origin: Origin) -> None:
    """Task, labels, lease, times and counters; its run has the process that its directory names."""
    kept, before = memo(db, origin, labels={"team": "vision"}, priority=2)
    assert back(db, kept, lost()) is WrittenBack.NEW
    after = views.attempt(db, ONE)
    assert after is not None
    assert replace(after, seq=before.seq) == before
    run = views.run(db, ONE, RunNo(1))
    assert run is not None
    assert (run.state, run.process) == (RunState.RUNNING, support.process())
    assert db.execute("SELECT key, value FROM labels").fetchone()[:] == ("team", "vision")
    assert views.list_attempts(db, [], {"team": "vision"}, 10, 0)[1] == 1


def test_writing_back_twice_changes_nothing(db: sqlite3.Connection) -> None:
    """After a crash in between the next start does it again."""
    kept, _ = memo(db)
    back(db, kept, lost())
    before = support.dump(db)
    assert back(db, kept, lost()) is WrittenBack.ADVANCED
    assert support.dump(db) == before


def test_a_lease_of_another_boot_is_over(db: sqlite3.Connection) -> None:
    """Its deadline means nothing on this one's clock."""
    kept, _ = memo(db, "control_plane")
    write_back(db, ONE, kept, [lost()], "another boot", 9000)
    after = views.attempt(db, ONE)
    assert after is not None
    assert after.lease is not None
    assert (after.lease.deadline_boottime_ns, after.lease.boot_id) == (0, "another boot")


def test_a_suspended_run_comes_back_suspended(db: sqlite3.Connection) -> None:
    """What its directory says counts, so that nobody lets it go on."""
    kept, _ = memo(db)
    back(db, kept, lost(is_suspended=True))
    after, run = views.attempt(db, ONE), views.run(db, ONE, RunNo(1))
    assert after is not None
    assert run is not None
    assert (after.state, run.state) == (TaskState.SUSPENDED, RunState.SUSPENDED)


def test_earlier_runs_come_back_ended(db: sqlite3.Connection) -> None:
    """Only the last one is open."""
    kept, _ = memo(db)
    back(db, kept, lost(1, outcome=ENDED), lost(3))
    assert [(run.run_no, run.state, run.cause) for run in views.find_task(db, "t")[1]] == [
        (1, RunState.ENDED, Cause.EXIT_CODE),
        (3, RunState.RUNNING, None),
    ]
    after = views.attempt(db, ONE)
    assert after is not None
    assert after.run_no == 3


def test_a_row_that_is_behind_is_brought_up(db: sqlite3.Connection) -> None:
    """The database still waits for the start of a run that lives: never started a second time."""
    kept, _ = memo(db, "control_plane")
    support.claim(db, "t", "t.1")
    assert back(db, kept, lost()) is WrittenBack.ADVANCED
    assert views.waiting(db, 10) == []
    with pytest.raises(LostRace):
        support.begin(db, "t.1")


def test_an_open_run_of_which_a_later_one_tells_has_ended(db: sqlite3.Connection) -> None:
    """Whatever the database thinks of run 1: there was a run 2."""
    kept, _ = memo(db)
    support.submit(db, "t")
    db.execute("UPDATE attempts SET attempt_id = 't.1'")
    support.begin(db, "t.1")
    assert back(db, kept, lost(2)) is WrittenBack.ADVANCED
    assert [(run.state, run.cause) for run in views.find_task(db, "t")[1]] == [
        (RunState.ENDED, Cause.AGENT_LOST),
        (RunState.RUNNING, None),
    ]


def test_what_has_ended_in_the_database_is_left_alone(db: sqlite3.Connection) -> None:
    """A directory cannot know more than a final state."""
    kept, _ = memo(db)
    units.submit(db, [support.new_attempt("t", "t.1")], support.NOW_MS)
    units.end_waiting(db, ONE, Cause.CANCELLED, "cancelled", 143, 2000, None)
    before = support.dump(db)
    assert back(db, kept, lost()) is WrittenBack.LEFT
    assert support.dump(db) == before


def test_an_older_attempt_never_takes_the_place_of_a_newer_one(db: sqlite3.Connection) -> None:
    """F14: nor does it live beside it."""
    kept, _ = memo(db, "control_plane")
    units.add_claims(db, [support.new_attempt("t", "t.2", "control_plane")], support.NOW_MS + 1)
    assert back(db, kept, lost()) is WrittenBack.LEFT
    assert [row[0] for row in db.execute("SELECT attempt_id FROM attempts")] == ["t.2"]


def test_a_newer_attempt_supersedes_the_one_that_the_database_knows(db: sqlite3.Connection) -> None:
    """As its claim did, before that was lost."""
    kept, _ = memo(db, "control_plane", "t.2")
    kept = kept.model_copy(update={"submitted_at_ms": support.NOW_MS + 1})
    support.claim(db, "t", "t.1")
    assert back(db, kept, lost(), attempt_id=AttemptId("t.2")) is WrittenBack.NEW
    old = views.attempt(db, ONE)
    assert old is not None
    assert (old.state, old.cause) == (TaskState.FAILED, Cause.SUPERSEDED)


def test_f38_a_memo_of_another_release_is_read(db: sqlite3.Connection) -> None:
    """F38: what this release writes down it reads, and keys that it does not know are ignored."""
    kept, _ = memo(db, "control_plane")
    assert Memo.model_validate({**kept.model_dump(mode="json", exclude_defaults=True), "mood": "good"}) == kept
