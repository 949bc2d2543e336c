"""The outbox: order per attempt, parallel across attempts, due times, dead letters, and its cost when it is long."""

from __future__ import annotations

import sqlite3

from remotegpu_queue import outbox, units
from remotegpu_queue.queries import SQL
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.task import TaskId
from tests.queue.support import BOOT, NOW_MS, begin, claim, due, end, report, run_unit, started


def _kinds(db: sqlite3.Connection, now_ns: int = 0) -> list[tuple[str, str]]:
    return [(each.attempt_id, each.kind) for each in due(db, now_ns)]


def test_order_within_an_attempt_parallel_across(db: sqlite3.Connection) -> None:
    """Of each attempt the oldest report is due, of all attempts at once; the next one when it is delivered."""
    for name in ("a1", "a2"):
        for kind in ("start", "progress", "complete"):
            report(db, name, kind)
    assert _kinds(db) == [("a1", "start"), ("a2", "start")]
    outbox.report_delivered(db, due(db)[0])
    assert sorted(_kinds(db)) == [("a1", "progress"), ("a2", "start")]


def test_put_off_report_holds_its_attempt_back(db: sqlite3.Connection) -> None:
    """A report that was put off is due later, those behind it wait, and other attempts do not; tries are counted."""
    report(db, "a1", "start")
    report(db, "a1", "complete")
    report(db, "a2", "start")
    outbox.report_retry(db, due(db)[0].id, 50, "503", 7)
    due_now, next_ns = outbox.due_reports(db, 0, 10)
    assert ([each.attempt_id for each in due_now], next_ns) == (["a2"], 50)
    later = due(db, 50)
    assert [(each.attempt_id, each.tries, each.last_error, each.first_try_at_ms) for each in later if each.tries] == [
        ("a1", 1, "503", 7)
    ]
    outbox.report_retry(db, later[-1].id, 60, "502", 9)
    again = due(db, 60)[-1]
    assert (again.tries, again.first_try_at_ms, again.last_error) == (2, 7, "502")


def test_next_due_of_nothing(db: sqlite3.Connection) -> None:
    """An empty outbox has nothing due and no next time."""
    assert outbox.due_reports(db, 0, 10) == ([], None)


def test_dead_letter_is_kept_and_lets_the_rest_go_on(db: sqlite3.Connection) -> None:
    """A refused report stays as a dead letter; the one behind it is due; nothing brings it back."""
    report(db, "a1", "start")
    report(db, "a1", "complete")
    first = due(db)[0]
    outbox.report_dead(db, first.id, "30005")
    outbox.report_dead(db, first.id, "30005")
    outbox.report_retry(db, first.id, 0, "late", NOW_MS)
    assert _kinds(db) == [("a1", "complete")]
    row = db.execute("SELECT is_dead, tries, last_error FROM outbox WHERE id = ?", (first.id,)).fetchone()
    assert tuple(row) == (1, 1, "30005")


def test_dropping(db: sqlite3.Connection) -> None:
    """One report is dropped alone, all of an attempt together; dead letters stay; repeating is safe."""
    for kind in ("start", "progress", "complete"):
        report(db, "a1", kind)
    first = due(db)[0]
    outbox.drop_report(db, first.id)
    outbox.drop_report(db, first.id)
    assert _kinds(db) == [("a1", "progress")]
    outbox.report_dead(db, due(db)[0].id, "x")
    assert outbox.has_reports(db, AttemptId("a1"))
    outbox.drop_reports(db, AttemptId("a1"))
    assert not outbox.has_reports(db, AttemptId("a1"))
    assert db.execute("SELECT count(*) FROM outbox").fetchone()[0] == 1


def test_delivery_is_noted_on_the_attempt(db: sqlite3.Connection) -> None:
    """The attempt knows that its start was accepted and its result is synced; delivering twice is harmless."""
    claim(db, "t1", "a1")
    begin(db, "a1")
    started(db, "a1", report={})
    end(db, "a1", report={})
    flags = "SELECT is_start_accepted, is_synced FROM attempts"
    start = due(db)[0]
    outbox.report_delivered(db, start)
    assert tuple(db.execute(flags).fetchone()) == (1, 0)
    outbox.report_delivered(db, due(db)[0])
    outbox.report_delivered(db, start)
    assert tuple(db.execute(flags).fetchone()) == (1, 1)


def test_refused_claim_is_reported_once(db: sqlite3.Connection) -> None:
    """The completion of a claim that was never stored waits once, however often the claim is repeated."""
    for _ in range(3):
        report(db, "a1", "complete")
    assert _kinds(db) == [("a1", "complete")]
    outbox.report_dead(db, due(db)[0].id, "no")
    report(db, "a1", "complete")
    assert _kinds(db) == []


def test_progress_that_was_put_off_stays_put_off(db: sqlite3.Connection) -> None:
    """During an outage each new progress keeps the back-off of the one that it replaces: no stampede."""
    claim(db, "t1", "a1")
    begin(db, "a1")

    def progress(percent: float) -> None:
        units.set_progress(db, AttemptId("a1"), percent, "", NOW_MS, ({"percent": percent}, BOOT))

    progress(1.0)
    outbox.report_retry(db, due(db)[0].id, 500, "down", 3)
    progress(2.0)
    assert due(db) == []
    latest = due(db, 500)[0]
    assert (latest.body, latest.tries, latest.first_try_at_ms) == ({"percent": 2.0}, 1, 3)


def test_progress_that_is_on_its_way_may_be_replaced(db: sqlite3.Connection) -> None:
    """What became of a progress that was replaced meanwhile changes nothing of the newer one."""
    claim(db, "t1", "a1")
    begin(db, "a1")
    units.set_progress(db, AttemptId("a1"), 1.0, "", NOW_MS, ({"n": 1}, BOOT))
    on_its_way = due(db)[0]
    units.set_progress(db, AttemptId("a1"), 2.0, "", NOW_MS, ({"n": 2}, BOOT))
    outbox.report_retry(db, on_its_way.id, 500, "down", 3)
    outbox.report_delivered(db, on_its_way)
    assert [each.body for each in due(db)] == [{"n": 2}]


def test_progress_in_the_middle_is_replaced_at_the_end(db: sqlite3.Connection) -> None:
    """A progress between two starts is replaced behind the second; the first start stays due."""
    report(db, "a1", "start")
    report(db, "a1", "progress")
    report(db, "a1", "start")
    outbox.replace_progress(db, AttemptId("a1"), TaskId("t"), {}, NOW_MS, BOOT)
    kinds = []
    while found := due(db):
        kinds.append(found[0].kind)
        outbox.report_delivered(db, found[0])
    assert kinds == ["start", "start", "progress"]


def test_limit(db: sqlite3.Connection) -> None:
    """No more reports are read than asked for."""
    for number in range(10):
        report(db, f"a{number}")
    assert len(due(db, limit=3)) == 3


def test_the_bound_counts_dead_letters(db: sqlite3.Connection) -> None:
    """The outbox is full from its bound on, not one report before; a dead letter takes a place like any other."""
    report(db, "a1")
    report(db, "a2")
    outbox.report_dead(db, due(db)[0].id, "30005")
    assert not outbox.is_full(db, bound=3)
    report(db, "a3")
    assert outbox.is_full(db, bound=3)
    outbox.report_delivered(db, due(db)[0])
    assert not outbox.is_full(db, bound=3)


def _steps(db: sqlite3.Connection, query: str, values: dict[str, object]) -> int:
    """How many instructions SQLite needs for a query, in hundreds: its cost, without a clock."""
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return 0

    db.set_progress_handler(tick, 100)
    db.execute(SQL[query], values).fetchall()
    db.set_progress_handler(None, 0)
    return count


def test_f16_what_is_due_is_found_at_once_in_a_long_outbox(db: sqlite3.Connection) -> None:
    """With 10,000 attempts that wait, put off or behind each other, a look costs no more than with few."""

    def fill(db: sqlite3.Connection) -> None:
        for number in range(5000):
            report(db, f"a{number}", "start")
            report(db, f"a{number}", "complete", {"stdout": "x" * 2000})

    run_unit(db, fill)
    for each in due(db, limit=10_000):
        outbox.report_retry(db, each.id, 10**15 + each.id, "down", NOW_MS)
    values: dict[str, object] = {"now_ns": 5, "limit": 16}
    assert _steps(db, "due_reports", values) + _steps(db, "next_due_report", {"now_ns": 5}) <= 2
    assert _steps(db, "due_reports", {**values, "now_ns": 10**18}) <= 20
    assert _steps(db, "has_complete", {"attempt_id": "nobody"}) <= 1


def _letters(db: sqlite3.Connection) -> list[int]:
    return [letter.id for letter in outbox.dead_letters(db, 100, 0)[0]]


def test_dead_letters_are_paged_oldest_first(db: sqlite3.Connection) -> None:
    """A page, and how many there are in all; one alone is found by its number, one that waits is none."""
    for name in ("a1", "a2", "a3", "a4"):
        report(db, name, "complete")
    for each in due(db)[:3]:
        outbox.report_dead(db, each.id, "30005")
    page, total = outbox.dead_letters(db, 2, 1)
    assert ([letter.attempt_id for letter in page], total) == (["a2", "a3"], 3)
    found = outbox.dead_letter(db, page[0].id)
    assert found is not None
    assert (found.attempt_id, found.last_error) == ("a2", "30005")
    assert outbox.dead_letter(db, due(db)[0].id) is None


def test_a_dead_letter_that_is_sent_again_is_as_new(db: sqlite3.Connection) -> None:
    """Due at once, its tries forgotten; what is delivered then is no dead letter any more."""
    report(db, "a1", "complete")
    first = due(db)[0]
    outbox.report_retry(db, first.id, 0, "503", 7)
    outbox.report_dead(db, first.id, "30005")
    assert outbox.resend_dead(db, first.id, BOOT)
    [again] = due(db)
    assert (again.id, again.tries, again.first_try_at_ms) == (first.id, 0, None)
    assert not outbox.resend_dead(db, first.id, BOOT)
    assert _letters(db) == []


def test_a_dead_letter_waits_its_turn_behind_one_that_is_due(db: sqlite3.Connection) -> None:
    """An attempt never has two reports under way: what is sent again goes next."""
    report(db, "a1", "start")
    report(db, "a1", "complete")
    first = due(db)[0]
    outbox.report_dead(db, first.id, "30005")
    assert outbox.resend_dead(db, first.id, BOOT)
    assert _kinds(db) == [("a1", "complete")]
    outbox.report_delivered(db, due(db)[0])
    assert _kinds(db) == [("a1", "start")]


def test_progress_that_was_overtaken_is_not_sent_again(db: sqlite3.Connection) -> None:
    """Only the latest progress is worth a report: an older dead one is dropped instead."""
    report(db, "a1", "progress")
    first = due(db)[0]
    outbox.report_dead(db, first.id, "30005")
    report(db, "a1", "progress")
    assert outbox.resend_dead(db, first.id, BOOT)
    assert (_letters(db), len(due(db))) == ([], 1)


def test_a_dropped_dead_letter_is_gone(db: sqlite3.Connection) -> None:
    """Once; what waits for delivery cannot be dropped so."""
    report(db, "a1", "complete")
    report(db, "a2", "complete")
    first, second = due(db)
    outbox.report_dead(db, first.id, "30005")
    assert (outbox.drop_dead(db, first.id), outbox.drop_dead(db, first.id), outbox.drop_dead(db, second.id)) == (
        True,
        False,
        False,
    )
    assert _kinds(db) == [("a2", "complete")]


def test_f16_a_few_are_brought_forward(db: sqlite3.Connection) -> None:
    """F16: the next ones that were put off, as many as asked for, and none of the attempts that wait apart."""
    for number in range(1, 6):
        report(db, f"a{number}", "complete")
        outbox.report_retry(db, due(db)[0].id, 100 - number, "no connection", NOW_MS)
    apart = [AttemptId("a5"), AttemptId("a3")]
    assert sorted(outbox.hasten(db, 7, 2, apart)) == ["a2", "a4"]
    assert _kinds(db, 7) == [("a2", "complete"), ("a4", "complete")]
    assert outbox.hasten(db, 7, 2, apart) == ["a1"]
    assert outbox.hasten(db, 7, 2, apart) == []
