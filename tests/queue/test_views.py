"""What is read: finding, listing, counting, and what that costs with 100,000 tasks (F48)."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from remotegpu_queue import outbox, units, views
from remotegpu_queue.queries import SQL, parse_queries
from remotegpu_queue.scheduling import Capacity
from remotegpu_schemas.attempt import AttemptId, RunNo
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.states import TaskState
from remotegpu_schemas.task import Resources
from tests.queue.support import (
    BOOT,
    FAILED,
    NOW_MS,
    RETRY,
    begin,
    claim,
    due,
    end,
    end_waiting,
    new_attempt,
    open_inline,
    process,
    report,
    run_unit,
    submit,
)

_MANY = 100_000


# --- one task ---


def test_find_task_by_prefix(db: sqlite3.Connection) -> None:
    """A whole id wins over longer ones; a prefix must fit one task, however many attempts that has."""
    submit(db, "abc", "abcd")
    claim(db, "xyz-1", "a1")
    claim(db, "xyz-1", "a2")
    assert views.find_task(db, "abc")[0].task_id == "abc"
    assert views.find_task(db, "abcd")[0].task_id == "abcd"
    assert views.find_task(db, "xy")[0].attempt_id == "a2"


def test_ambiguous_prefix_names_what_it_fits(db: sqlite3.Connection) -> None:
    """A prefix of several tasks is refused with examples, and says whether there are more."""
    submit(db, "ab1", "ab2")
    with pytest.raises(Refused, match=r"'ab' fits several tasks \(ab1, ab2\); give more") as refusal:
        views.find_task(db, "ab")
    assert refusal.value.code is Code.INVALID_PARAMETERS
    submit(db, "ab3")
    with pytest.raises(Refused, match=r"\(ab1, ab2, \.\.\.\)"):
        views.find_task(db, "ab")


@pytest.mark.parametrize(
    "text", ["", "%", "_", "a%", "a_c", "*", "a*", "'", "\\", "\0", "abc\0", "\ud800", "ABC", "ä", "x" * 200]
)
def test_f34_no_pattern_no_surprise(db: sqlite3.Connection, text: str) -> None:
    """What is no id finds nothing: no wildcard, no empty prefix, no character that SQLite cannot take."""
    submit(db, "abc")
    with pytest.raises(Refused) as refusal:
        views.find_task(db, text)
    assert refusal.value.code is Code.TASK_NOT_FOUND


def test_prefix_ends_where_it_should(db: sqlite3.Connection) -> None:
    """Neighbours in the order of ids are not taken for what the prefix begins."""
    submit(db, "ab", "ac", "aB", "b")
    assert views.find_task(db, "ac")[0].task_id == "ac"
    with pytest.raises(Refused):
        views.find_task(db, "abz")


def test_found_task_has_all_its_runs(db: sqlite3.Connection) -> None:
    """The runs of all attempts come in order."""
    claim(db, "t1", "a1")
    begin(db, "a1")
    end(db, "a1", FAILED, RETRY)
    begin(db, "a1")
    end(db, "a1", FAILED, RETRY, run_no=2)
    claim(db, "t1", "a2")
    begin(db, "a2")
    assert [(run.attempt_id, run.run_no) for run in views.find_task(db, "t1")[1]] == [("a1", 1), ("a1", 2), ("a2", 1)]


def test_run_of_pid(db: sqlite3.Connection) -> None:
    """A process id names the last run of this boot that had it; of another boot, or never seen: none."""
    submit(db, "t1", "t2")
    for name in ("t1", "t2"):
        begin(db, name)
    units.run_started(db, AttemptId("t1"), RunNo(1), process(42), 5, None)
    units.run_started(db, AttemptId("t2"), RunNo(1), process(42), 9, None)
    found = views.run_of_pid(db, 42, BOOT)
    assert found is not None
    assert (found[0].attempt_id, found[1]) == ("t2", "t2")
    assert views.run_of_pid(db, 42, "boot-2") is None
    assert views.run_of_pid(db, 43, BOOT) is None


def test_open_attempts_and_runs(db: sqlite3.Connection) -> None:
    """After a restart: leased attempts that have not ended, whatever has a process, and the runs that are open."""
    submit(db, "waits", "runs", "ended")
    claim(db, "t1", "leased")
    for name in ("runs", "ended"):
        begin(db, name)
    end(db, "ended")
    assert [each.attempt_id for each in views.open_attempts(db)] == ["runs", "leased"]
    assert [(run.attempt_id, run.run_no) for run in views.open_runs(db)] == [("runs", 1)]


# --- what waits ---


def _names(found: Sequence[object]) -> list[str]:
    return [str(getattr(each, "attempt_id")) for each in found]  # noqa: B009 - several types


def test_waiting_by_priority_then_age(db: sqlite3.Connection) -> None:
    """Waiting attempts come most urgent first, then oldest first, with what they need; others do not come."""
    submit(db, "late")
    submit(db, "urgent", priority=1, resources=Resources(gpus=1, cpus=0.5, memory_gb=2))
    claim(db, "t1", "claimed")
    submit(db, "runs", "ended")
    begin(db, "runs")
    end_waiting(db, "ended")
    found = views.waiting(db, 10)
    assert _names(found) == ["urgent", "late", "claimed"]
    assert found[0].resources == Resources(gpus=1, cpus=0.5, memory_gb=2)
    assert _names(views.waiting(db, 2)) == ["urgent", "late"]


def test_f48_what_cannot_start_does_not_hide_what_can(db: sqlite3.Connection) -> None:
    """Within a limit, tasks whose delay lasts or that this host can never run do not take the places of others."""
    submit(db, *[f"big{number}" for number in range(5)], priority=1, resources=Resources(gpus=8))
    submit(db, "much", priority=1, resources=Resources(memory_gb=2.001))
    submit(db, "delayed", priority=1)
    begin(db, "delayed")
    end(db, "delayed", FAILED, RETRY, ready_ns=100)
    submit(db, "can", resources=Resources(gpus=1, cpus=2, memory_gb=2))
    total = Capacity(1, 2.0, 2048, 1)
    assert _names(views.waiting(db, 3, now_ns=99, total=total)) == ["can"]
    assert _names(views.waiting(db, 3, now_ns=100, total=total)) == ["delayed", "can"]
    assert len(views.waiting(db, 100)) == 8


def test_next_ready(db: sqlite3.Connection) -> None:
    """The next end of a delay is that of the earliest attempt that waits for one."""
    assert views.next_ready_boottime_ns(db, 0) is None
    submit(db, "t1", "t2", "t3")
    for name, ready_ns in (("t1", 300), ("t2", 200), ("t3", 100)):
        begin(db, name)
        end(db, name, FAILED, RETRY, ready_ns=ready_ns)
    end_waiting(db, "t3")
    assert [views.next_ready_boottime_ns(db, now_ns) for now_ns in (0, 200, 300)] == [200, 300, None]


# --- pages and counts ---


def test_list_is_newest_first_one_row_per_task(db: sqlite3.Connection) -> None:
    """A page holds tasks, not attempts: the latest attempt of each, with its last run, and how many there are."""
    submit(db, "t1")
    claim(db, "t2", "old")
    submit(db, "t3")
    claim(db, "t2", "new")
    begin(db, "t1")
    end(db, "t1", FAILED, RETRY)
    begin(db, "t1")
    page, total = views.list_attempts(db, [], {}, 10, 0)
    assert ([(attempt.attempt_id, run.run_no if run else None) for attempt, run in page], total) == (
        [("new", None), ("t3", None), ("t1", 2)],
        3,
    )


def test_pages_tile_the_list(db: sqlite3.Connection) -> None:
    """Pages of any size, one after the other, give every task once; behind the end there is nothing."""
    names = [f"t{number}" for number in range(23)]
    submit(db, *names)
    seen: list[str] = []
    for offset in range(0, 30, 5):
        page, total = views.list_attempts(db, [], {}, 5, offset)
        seen += [attempt.attempt_id for attempt, _ in page]
        assert total == 23
    assert seen == names[::-1]


def test_list_filters(db: sqlite3.Connection) -> None:
    """States are alternatives, labels all have to fit, as texts."""
    submit(db, "t1", labels={"team": "a", "x": "1"})
    submit(db, "t2", labels={"team": "a", "x": "2"})
    submit(db, "t3", "t4", labels={"team": "b", "it's": "%"})
    begin(db, "t2")
    end_waiting(db, "t4")

    def listed(states: Sequence[TaskState] = (), **labels: str) -> list[str]:
        page, total = views.list_attempts(db, states, labels, 10, 0)
        assert total == len(page)
        return _names([attempt for attempt, _ in page])

    assert listed([TaskState.RUNNING, TaskState.CANCELLED]) == ["t4", "t2"]
    assert listed(team="a") == ["t2", "t1"]
    assert listed([TaskState.PENDING], team="a", x="1") == ["t1"]
    assert listed(team="a", x="3") == []
    assert views.list_attempts(db, [], {"it's": "%"}, 10, 0)[1] == 2
    assert listed(team="%") == []


def test_labels_of_an_older_attempt_do_not_count(db: sqlite3.Connection) -> None:
    """A task is found by the labels of its latest attempt."""
    claim(db, "t1", "a1", labels={"team": "old"})
    claim(db, "t1", "a2", labels={"team": "new"})
    assert views.list_attempts(db, [], {"team": "old"}, 10, 0) == ([], 0)
    assert views.list_attempts(db, [], {"team": "new"}, 10, 0)[1] == 1


def test_counts_tasks_and_reports(db: sqlite3.Connection) -> None:
    """Every state is counted, a task with two attempts once; reports that wait and dead letters apart."""
    submit(db, "t1", "t2")
    begin(db, "t1")
    claim(db, "t3", "a1")
    claim(db, "t3", "a2")
    for name in ("r1", "r2", "r3"):
        report(db, name)
    outbox.report_dead(db, due(db)[0].id, "x")
    counts = views.counts(db)
    assert {state: n for state, n in counts.by_state.items() if n} == {"pending": 1, "running": 1, "assigned": 1}
    assert set(counts.by_state) == set(TaskState)
    assert (counts.reports_waiting, counts.dead_letters) == (2, 1)


# --- many tasks ---


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    """100,000 tasks: most wait, some run or have ended; every hundredth has a label."""
    path = tmp_path_factory.mktemp("many") / "queue.db"
    with contextlib.closing(open_inline(path)) as db:
        units.submit(db, [new_attempt("seed", "seed", labels={"rare": "yes"}, resources=Resources(cpus=1))], NOW_MS)
        db.execute("BEGIN")
        columns = [str(row["name"]) for row in db.execute("PRAGMA table_info(attempts)")]
        computed = {"seq": "n", "attempt_id": "'a' || n", "task_id": "'t' || n", "priority": "1 + n % 10"}
        chosen = [computed.get(name) or name for name in columns]
        db.execute(
            f"INSERT INTO attempts ({', '.join(columns)}) SELECT {', '.join(chosen)} FROM attempts, "
            "(WITH RECURSIVE c(n) AS (SELECT 1000 UNION ALL SELECT n + 1 FROM c WHERE n < ?) SELECT n FROM c)",
            (999 + _MANY,),
        )
        db.execute("INSERT INTO labels SELECT 'rare', 'yes', seq FROM attempts WHERE seq % 100 = 0")
        db.execute("COMMIT")
        run_unit(db, lambda db: [begin(db, f"a{number}") for number in range(1000, 1100)])
        run_unit(db, lambda db: [end(db, f"a{number}") for number in range(1000, 1050)])
        yield db


def _steps(db: sqlite3.Connection, read: Callable[[sqlite3.Connection], object]) -> int:
    """How many instructions SQLite needs, in thousands: the cost of a read without a clock."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    db.set_progress_handler(tick, 1000)
    try:
        read(db)
    finally:
        db.set_progress_handler(None, 0)
    return count


_COSTS: dict[str, tuple[int, Callable[[sqlite3.Connection], object]]] = {
    "waiting": (10, lambda db: views.waiting(db, 256)),
    "next ready": (1, lambda db: views.next_ready_boottime_ns(db, 5)),
    "find": (1, lambda db: views.find_task(db, "t5000")),
    "run of pid": (1, lambda db: views.run_of_pid(db, 100, BOOT)),
    "open runs": (5, views.open_runs),
    "begin": (1, lambda db: begin(db, "a60000")),
    "end": (1, lambda db: end(db, "a1060")),
    "submit": (1, lambda db: submit(db, "one-more")),
    "claim": (2, lambda db: claim(db, "t70000", "newer")),  # which supersedes an older attempt
    # A whole count walks one index once: a few steps per task, no more.
    "counts": (1000, views.counts),
    "page": (1000, lambda db: views.list_attempts(db, [], {}, 100, 0)),
    "last page": (2000, lambda db: views.list_attempts(db, [], {}, 100, 90_000)),
    "page of a state": (1000, lambda db: views.list_attempts(db, [TaskState.PENDING], {}, 100, 0)),
    "page of states": (3000, lambda db: views.list_attempts(db, [TaskState.PENDING, TaskState.FAILED], {}, 100, 0)),
    "page of a rare state": (20, lambda db: views.list_attempts(db, [TaskState.RUNNING], {}, 100, 0)),
    "page of a label": (60, lambda db: views.list_attempts(db, [], {"rare": "yes"}, 100, 0)),
}


@pytest.mark.parametrize(("thousand_steps", "read"), _COSTS.values(), ids=_COSTS.keys())
def test_f48_cost_with_100_000_tasks(
    many: sqlite3.Connection, thousand_steps: int, read: Callable[[sqlite3.Connection], object]
) -> None:
    """No read or step grows with the square of the queue, and what the scheduler does often does not grow at all."""
    assert _steps(many, read) <= thousand_steps


def test_f48_no_query_scans_without_need(db: sqlite3.Connection) -> None:
    """Every named query finds its rows by an index, except those for all rows, up to a bound, or once per start."""
    scanning = set()
    for name, text in SQL.items():
        values = dict.fromkeys(re.findall(r":(\w+)", text), 1)
        plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {text}", values)]
        if any(
            re.match(r"SCAN (?!CONSTANT|\(|json_each |.*USING INDEX (attempts_waiting|runs_one_open))", step)
            for step in plan
        ):
            scanning.add(name)
    assert scanning == {
        "count_by_state",
        "count_reports",
        "dead_letters",
        "ended_runs",
        "is_outbox_full",
        "rebase_outbox",
    }


def test_query_names_are_unique() -> None:
    """A name given twice is refused when the program is loaded."""
    assert parse_queries("-- head\n-- name: a\nSELECT 1;\n\n-- name: b\nSELECT 2;\n") == {
        "a": "SELECT 1;",
        "b": "SELECT 2;",
    }
    with pytest.raises(ValueError, match="twice"):
        parse_queries("-- name: a\nSELECT 1;\n-- name: a\nSELECT 2;\n")


def test_every_query_is_used() -> None:
    """No statement is left over from what the program once did."""
    package = Path(views.__file__).parent
    code = "".join(path.read_text() for path in package.glob("*.py"))
    assert [name for name in SQL if f'"{name}"' not in code] == []


def test_every_update_of_a_state_names_the_state_it_expects() -> None:
    """Zero changed rows is then a lost race, and never a change that nobody meant."""
    updates = {name: text for name, text in SQL.items() if re.search(r"\bSET state =", text)}
    of_attempts = {"start_attempt", "end_attempt", "retry_attempt", "attempt_suspension", "restore_attempt"}
    assert set(updates) == of_attempts | {"run_started", "run_stopping", "run_ended", "run_suspension"}
    for text in updates.values():
        where = text.partition("WHERE")[2]
        assert all(name in where for name in (":attempt_id", ":run_no", "state = :state"))
