"""What may be forgotten and what may not; checks and backups of the whole file, also while it is in use."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest

from remotegpu_queue import maintenance, outbox, units
from remotegpu_queue.queries import SQL
from remotegpu_queue.store import Store
from remotegpu_schemas.attempt import AttemptId, RunNo
from remotegpu_schemas.states import Cause
from remotegpu_schemas.task import TaskId
from tests.queue import support

LATER_MS = 10**12


def finish(db: sqlite3.Connection, attempt_id: str, *, at_ms: int = 2000, report: outbox.Body | None = None) -> None:
    """One run, to its end."""
    support.begin(db, attempt_id)
    units.run_ended(
        db,
        AttemptId(attempt_id),
        RunNo(1),
        support.SUCCEEDED,
        support.COMPLETE,
        ended_at_ms=at_ms,
        ready_boottime_ns=0,
        boot_id=support.BOOT,
        usage=None,
        report=report,
    )


def expired(db: sqlite3.Connection, before_ms: int = LATER_MS) -> list[str]:
    """The tasks that age would remove, oldest first."""
    return [task.task_id for task in maintenance.finished_before(db, before_ms, 100)]


def test_only_what_has_ended_long_enough_ago_is_found_oldest_first(db: sqlite3.Connection) -> None:
    """Waiting and running tasks, and young ones, are never found."""
    support.submit(db, "waiting", "running", "old", "older", "young", labels={"a": "b"})
    support.begin(db, "running")
    for name, at_ms in (("old", 2000), ("older", 1500), ("young", 3000)):
        finish(db, name, at_ms=at_ms)
    assert expired(db, 3000) == ["older", "old"]
    found = maintenance.finished_before(db, 3000, 1)
    assert [(task.task_id, task.runs) for task in found] == [("older", (("older", 1),))]


@pytest.mark.parametrize("is_dead", [False, True])
def test_what_waits_for_delivery_keeps_its_task(db: sqlite3.Connection, is_dead: bool) -> None:
    """A result that the control plane does not have yet is never forgotten, nor is a dead letter."""
    support.claim(db, "t", "t.1")
    finish(db, "t.1", report={"exit_code": 0})
    [report], _ = outbox.due_reports(db, 0, 10)
    if is_dead:
        outbox.report_dead(db, report.id, "refused")
    assert expired(db) == []
    assert maintenance.finished_newest_first(db, None, 10) == ([], None)
    assert not maintenance.forget(db, TaskId("t"))
    if is_dead:
        outbox.drop_dead(db, report.id)
    else:
        outbox.report_delivered(db, report)
    assert expired(db) == ["t"]
    assert maintenance.forget(db, TaskId("t"))


def test_an_older_attempt_that_is_not_over_keeps_the_task(db: sqlite3.Connection) -> None:
    """A superseded attempt whose process is still being stopped needs its row."""
    support.claim(db, "t", "t.1")
    support.begin(db, "t.1")
    support.claim(db, "t", "t.2")
    units.end_waiting(db, AttemptId("t.2"), Cause.CANCELLED, "cancelled", 143, 2000, None)
    assert expired(db) == []
    assert not maintenance.may_be_forgotten(db, TaskId("t"))
    assert not maintenance.forget(db, TaskId("t"))


def test_forgetting_leaves_nothing_of_the_task_and_all_of_the_others(db: sqlite3.Connection) -> None:
    """Attempts, runs and labels go together; the id may be used again."""
    support.submit(db, "gone", "kept", labels={"a": "b"})
    for name in ("gone", "kept"):
        finish(db, name)
    assert maintenance.forget(db, TaskId("gone"))
    assert not maintenance.forget(db, TaskId("gone"))
    for table, column in (("attempts", "task_id"), ("runs", "attempt_id")):
        assert [row[0] for row in db.execute(f"SELECT {column} FROM {table}")] == ["kept"]
    assert db.execute("SELECT count(*) FROM labels").fetchone()[0] == 1
    assert db.execute("PRAGMA foreign_key_check").fetchall() == []
    support.submit(db, "gone")


def test_pages_newest_first_go_over_everything_once(db: sqlite3.Connection) -> None:
    """Also over tasks that ended in the same millisecond."""
    names = [f"t-{number}" for number in range(25)]
    support.submit(db, *names)
    for number, name in enumerate(names):
        finish(db, name, at_ms=2000 + number // 10)
    seen: list[str] = []
    place: tuple[int, int] | None = None
    while True:
        page, place = maintenance.finished_newest_first(db, place, 4)
        seen += [task.task_id for task in page]
        if place is None:
            break
    assert seen == list(reversed(names))


def test_age_is_looked_up_by_index(db: sqlite3.Connection) -> None:
    """A hundred thousand finished tasks are not walked through to find the oldest."""
    for name in ("finished_before", "finished_newest_first"):
        plan = db.execute(
            f"EXPLAIN QUERY PLAN {SQL[name]}", {"before_ms": 1, "limit": 1, "ended_at_ms": 1, "seq": 1}
        ).fetchall()
        assert "USING INDEX attempts_ended" in plan[0]["detail"] or "attempts_ended" in plan[0]["detail"], name
        assert not any("TEMP B-TREE" in row["detail"] for row in plan), name


# --- the whole file ---


async def test_a_backup_of_a_running_store_is_whole_private_and_one_file(tmp_path: Path) -> None:
    """Writers go on meanwhile; what was committed before is in it."""
    opened = await Store.open(tmp_path)
    await opened.write(lambda db: support.submit(db, *(f"t-{number}" for number in range(200))))
    copying = asyncio.create_task(asyncio.to_thread(maintenance.back_up, tmp_path / "queue.db", tmp_path / "copy.db"))
    await opened.write(lambda db: support.submit(db, "meanwhile"))
    size = await copying
    await opened.write(lambda db: support.submit(db, "after"))
    copy = tmp_path / "copy.db"
    assert size == copy.stat().st_size
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    with closing(sqlite3.connect(copy)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert db.execute("SELECT count(*) FROM attempts").fetchone()[0] in {200, 201}
    assert not list(tmp_path.glob(".copy*"))
    await opened.close()
    (tmp_path / "restored").mkdir()
    copy.rename(tmp_path / "restored" / "queue.db")
    again = await Store.open(tmp_path / "restored")
    assert not again.is_new
    await again.close()


async def test_a_backup_never_replaces_a_file(tmp_path: Path) -> None:
    """Not even a link that leads nowhere."""
    opened = await Store.open(tmp_path)
    (tmp_path / "there").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        maintenance.back_up(tmp_path / "queue.db", tmp_path / "there")
    assert not (tmp_path / "nowhere").exists()
    await opened.close()


def test_there_is_nothing_to_back_up_or_check(tmp_path: Path) -> None:
    """A missing database is said to be missing, and none is made."""
    for work in (
        lambda: maintenance.check(tmp_path / "a.db"),
        lambda: maintenance.back_up(tmp_path / "a.db", tmp_path / "b"),
    ):
        with pytest.raises(FileNotFoundError, match=r"there is no database .*a\.db"):
            work()
    assert list(tmp_path.iterdir()) == []


async def test_a_check_finds_what_is_wrong_and_says_what_there_is(tmp_path: Path) -> None:
    """A sound database has no problems; one whose index disagrees has, though every page is well-formed."""
    opened = await Store.open(tmp_path)
    await opened.write(lambda db: support.submit(db, "t-1", "t-2"))
    health = await asyncio.to_thread(maintenance.check, tmp_path / "queue.db")
    assert (health.problems, health.rows) == ((), {"attempts": 2, "runs": 0, "outbox": 0})
    await opened.close()
    with closing(sqlite3.connect(tmp_path / "queue.db")) as db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute(
            "UPDATE sqlite_schema SET sql = replace(sql, '(task_id, seq)', '(state, seq)') "
            "WHERE name = 'attempts_of_task'"
        )
        db.commit()
    health = maintenance.check(tmp_path / "queue.db")
    assert any("attempts_of_task" in problem for problem in health.problems)


async def test_the_log_stays_short_while_somebody_reads_all_the_time(tmp_path: Path) -> None:
    """Readers come and go without a pause, and what is written is many times the bound: the log stays."""
    opened = await Store.open(tmp_path)
    log = tmp_path / "queue.db-wal"
    is_over = asyncio.Event()

    async def read() -> None:
        while not is_over.is_set():
            await opened.read(lambda db: db.execute("SELECT count(value), max(length(value)) FROM meta").fetchone())

    reading = [asyncio.create_task(read()) for _ in range(3)]
    longest = 0
    for number in range(400):
        await opened.write(lambda db, number=number: units.set_meta(db, f"k-{number % 40}", "x" * 100_000))  # type: ignore[misc]
        longest = max(longest, log.stat().st_size)
    is_over.set()
    await asyncio.gather(*reading)
    assert longest < 24 * 2**20  # 40 MB went through it
    await opened.close()
