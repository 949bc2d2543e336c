"""The database's own constraints: each refuses what it is there for, whatever the program does."""

from __future__ import annotations

import re
import sqlite3

import pytest

from remotegpu_queue.store import migrations
from remotegpu_schemas.states import CAUSE_RULES, FINAL_TASK_STATES, STOP_CAUSES, Cause, RunState, TaskState
from tests.queue.support import begin, claim, end, report, started, stop, submit


@pytest.fixture
def rows(db: sqlite3.Connection) -> sqlite3.Connection:
    """A waiting, a claimed, a running and an ended attempt, the latter two with their runs, and two reports."""
    submit(db, "waiting", "running", "ended")
    claim(db, "claimed", "claimed")
    for name in ("running", "ended"):
        begin(db, name)
        started(db, name)
    end(db, "ended")
    report(db, "told", "start")
    report(db, "told", "progress")
    return db


_REFUSED = {
    "unknown origin": "UPDATE attempts SET origin = 'moon' WHERE attempt_id = 'waiting'",
    "unknown state": "UPDATE attempts SET state = 'lost' WHERE attempt_id = 'waiting'",
    "priority 0": "UPDATE attempts SET priority = 0",
    "priority 11": "UPDATE attempts SET priority = 11",
    "empty attempt id": "UPDATE attempts SET attempt_id = '' WHERE attempt_id = 'waiting'",
    "long attempt id": f"UPDATE attempts SET attempt_id = '{'x' * 129}' WHERE attempt_id = 'waiting'",
    "long task id": f"UPDATE attempts SET task_id = '{'x' * 129}' WHERE attempt_id = 'waiting'",
    "same attempt twice": "UPDATE attempts SET attempt_id = 'running' WHERE attempt_id = 'waiting'",
    "text for a number": "UPDATE attempts SET priority = 'high'",
    "task is no JSON": "UPDATE attempts SET task = '{'",
    "negative GPUs": "UPDATE attempts SET gpus = -1",
    "negative CPUs": "UPDATE attempts SET cpus = -0.5",
    "negative memory": "UPDATE attempts SET memory_gb = -1.0",
    "negative run number": "UPDATE attempts SET run_no = -1",
    "negative retries": "UPDATE attempts SET retries_used = -1",
    "negative free retries": "UPDATE attempts SET free_retries_used = -1",
    "negative delay": "UPDATE attempts SET ready_boottime_ns = -1",
    "is_latest 2": "UPDATE attempts SET is_latest = 2",
    "is_synced 2": "UPDATE attempts SET is_synced = 2 WHERE attempt_id = 'ended'",
    "is_start_accepted 2": "UPDATE attempts SET is_start_accepted = 2",
    "synced before its end": "UPDATE attempts SET is_synced = 1 WHERE attempt_id = 'running'",
    "ttl 0": "UPDATE attempts SET lease_ttl_ns = 0 WHERE attempt_id = 'claimed'",
    "renew interval 0": "UPDATE attempts SET renew_interval_ns = 0 WHERE attempt_id = 'claimed'",
    "lease without deadline": "UPDATE attempts SET lease_deadline_ns = NULL WHERE attempt_id = 'claimed'",
    "local with a lease": "UPDATE attempts SET lease_ttl_ns = 1, lease_deadline_ns = 1 WHERE attempt_id = 'waiting'",
    "local assigned": "UPDATE attempts SET state = 'assigned' WHERE attempt_id = 'waiting'",
    "running without a run": "UPDATE attempts SET state = 'running' WHERE attempt_id = 'waiting'",
    "a run without a start": "UPDATE attempts SET run_no = 1 WHERE attempt_id = 'waiting'",
    "unknown cause": "UPDATE attempts SET cause = 'moon' WHERE attempt_id = 'ended'",
    "final without cause": "UPDATE attempts SET cause = NULL WHERE attempt_id = 'ended'",
    "final without end": "UPDATE attempts SET ended_at_ms = NULL WHERE attempt_id = 'ended'",
    "final without exit code": "UPDATE attempts SET exit_code = NULL WHERE attempt_id = 'ended'",
    "waiting with a cause": "UPDATE attempts SET cause = 'cancelled' WHERE attempt_id = 'waiting'",
    "waiting with an end": "UPDATE attempts SET ended_at_ms = 1 WHERE attempt_id = 'waiting'",
    "completed with exit code 1": "UPDATE attempts SET exit_code = 1 WHERE attempt_id = 'ended'",
    "completed but failed": "UPDATE attempts SET cause = 'exit_code' WHERE attempt_id = 'ended'",
    "failed with exit code 0": "UPDATE attempts SET state = 'failed', cause = 'exit_code' WHERE attempt_id = 'ended'",
    "cancelled by a signal": "UPDATE attempts SET state = 'cancelled', cause = 'signal', exit_code = 1 "
    "WHERE attempt_id = 'ended'",
    "signal 65": "UPDATE attempts SET signal = 65 WHERE attempt_id = 'ended'",
    "progress 101": "UPDATE attempts SET progress_percent = 101 WHERE attempt_id = 'running'",
    "two latest attempts": "UPDATE attempts SET task_id = 'waiting' WHERE attempt_id = 'ended'",
    "two live attempts": "UPDATE attempts SET task_id = 'running', is_latest = 0, state = 'running', run_no = 1, "
    "started_at_ms = 1 WHERE attempt_id = 'waiting'",
    "run of nobody": "INSERT INTO runs (attempt_id, run_no, state, created_at_ms) VALUES ('nobody', 1, 'starting', 1)",
    "run number 0": "UPDATE runs SET run_no = 0 WHERE attempt_id = 'running'",
    "unknown run state": "UPDATE runs SET state = 'lost' WHERE attempt_id = 'running'",
    "two open runs": "INSERT INTO runs (attempt_id, run_no, state, created_at_ms) VALUES ('running', 2, 'starting', 1)",
    "unknown run cause": "UPDATE runs SET cause = 'moon' WHERE attempt_id = 'ended'",
    "unknown stop cause": "UPDATE runs SET stop_cause = 'exit_code' WHERE attempt_id = 'running'",
    "ended without cause": "UPDATE runs SET cause = NULL WHERE attempt_id = 'ended'",
    "ended without end": "UPDATE runs SET ended_at_ms = NULL WHERE attempt_id = 'ended'",
    "ended without exit code": "UPDATE runs SET exit_code = NULL WHERE attempt_id = 'ended'",
    "open with an end": "UPDATE runs SET ended_at_ms = 1 WHERE attempt_id = 'running'",
    "stopping without a reason": "UPDATE runs SET state = 'stopping' WHERE attempt_id = 'running'",
    "pid 0": "UPDATE runs SET pid = 0 WHERE attempt_id = 'running'",
    "negative start time": "UPDATE runs SET start_ticks = -1 WHERE attempt_id = 'running'",
    "pid without boot": "UPDATE runs SET boot_id = NULL WHERE attempt_id = 'running'",
    "pid without start time": "UPDATE runs SET start_ticks = NULL WHERE attempt_id = 'running'",
    "pid without start": "UPDATE runs SET started_at_ms = NULL WHERE attempt_id = 'running'",
    "running without a process": "UPDATE runs SET pid = NULL, boot_id = NULL, start_ticks = NULL, "
    "started_at_ms = NULL WHERE attempt_id = 'running'",
    "run signal 0": "UPDATE runs SET signal = 0 WHERE attempt_id = 'ended'",
    "usage is no JSON": "UPDATE runs SET usage = '{' WHERE attempt_id = 'ended'",
    "unknown report": "UPDATE outbox SET kind = 'moon'",
    "body is no JSON": "UPDATE outbox SET body = '{'",
    "negative tries": "UPDATE outbox SET tries = -1",
    "negative due time": "UPDATE outbox SET due_boottime_ns = -1",
    "is_dead 2": "UPDATE outbox SET is_dead = 2, due_boottime_ns = NULL",
    "dead and due": "UPDATE outbox SET is_dead = 1 WHERE due_boottime_ns IS NOT NULL",
    "two heads": "UPDATE outbox SET due_boottime_ns = 0",
    "two waiting progresses": "UPDATE outbox SET kind = 'progress'",
    "completed twice": "UPDATE outbox SET kind = 'complete'",
    "label of nobody": "INSERT INTO labels VALUES ('a', 'b', 999)",
    "empty meta": "INSERT INTO meta VALUES ('a', NULL)",
}


@pytest.mark.parametrize("statement", _REFUSED.values(), ids=_REFUSED.keys())
def test_refused(rows: sqlite3.Connection, statement: str) -> None:
    """What must not be in the database cannot be put there."""
    with pytest.raises(sqlite3.IntegrityError):
        rows.execute(statement)


def _listed(column: str, table: str) -> list[set[str]]:
    body = re.search(rf"CREATE TABLE {table} \((.*?)\n\) STRICT", migrations()[0], re.DOTALL)
    assert body is not None
    return [
        set(re.findall(r"'(\w+)'", found)) for found in re.findall(rf"CHECK \({column} IN\s*\(([^)]*)\)", body.group(1))
    ]


@pytest.mark.parametrize(
    ("table", "column", "values"),
    [
        ("attempts", "state", set(TaskState)),
        ("attempts", "cause", set(Cause)),
        ("runs", "state", set(RunState)),
        ("runs", "cause", set(Cause)),
        ("runs", "stop_cause", set(STOP_CAUSES)),
    ],
)
def test_closed_lists_are_those_of_the_program(table: str, column: str, values: set[str]) -> None:
    """The words that a column takes are the words of `states.py`, no more and no fewer."""
    assert _listed(column, table)[0] == values


def test_final_states_are_those_of_the_program() -> None:
    """The database means the same by `final`, and by `cancelled`, as the table of causes does."""
    text = migrations()[0]
    finals = re.findall(r"CHECK \(\(state IN \(([^)]*)\)\) = ", text)
    assert finals
    assert all(set(re.findall(r"'(\w+)'", each)) == FINAL_TASK_STATES for each in finals)
    cancelling = re.search(r"coalesce\(cause IN \(([^)]*)\)", text)
    assert cancelling is not None
    assert set(re.findall(r"'(\w+)'", cancelling.group(1))) == {
        cause for cause, rule in CAUSE_RULES.items() if rule.final_state is TaskState.CANCELLED
    }


@pytest.mark.parametrize("cause", sorted(STOP_CAUSES))
def test_every_stop_cause_can_be_stored(rows: sqlite3.Connection, cause: Cause) -> None:
    """Whatever a run may be stopped for, the database takes."""
    assert stop(rows, "running", cause) is cause
