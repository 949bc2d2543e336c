"""Rounds of retention on a real store and real directories: what goes, what stays, and in which order."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import pytest

from remotegpu_agent.audit import AuditEntry, AuditLog
from remotegpu_agent.retention import SIZE_SPARES_S, Retention, RetentionSettings, Round
from remotegpu_queue import outbox, units
from remotegpu_queue.store import Store
from remotegpu_queue.transitions import AfterRun, Outcome
from remotegpu_schemas.attempt import RunNo
from remotegpu_schemas.limits import MIB
from remotegpu_schemas.states import Cause, TaskEvent
from tests.agent.support import BOOT, MovableClock, add_attempt, open_store

DAY_S = 86400.0
NOW_S = 100 * DAY_S


@dataclass
class Kept:
    """A store, the directories of its tasks, and who is live."""

    store: Store
    state_dir: Path
    live: set[str]
    now_s: float = NOW_S

    def retention(
        self, *, max_age_s: float = 7 * DAY_S, size_max_bytes: int = 0, audit_max_bytes: int = 0
    ) -> Retention:
        """One that keeps so much."""
        settings = RetentionSettings(max_age_s, size_max_bytes, 90 * DAY_S, audit_max_bytes)
        audit = AuditLog(self.state_dir / "audit")
        return Retention(
            self.store, self.state_dir, audit, settings, wall_s=lambda: self.now_s, is_live=self.live.__contains__
        )

    async def finished(self, task_id: str, age_s: float, *, size: int = 1000, is_claimed: bool = False) -> None:
        """A task that ended so long ago and has left so many bytes in each of its two directories."""
        attempt_id = await add_attempt(
            self.store, MovableClock(), task_id, attempt_id=f"{task_id}-a", ttl_s=300.0 if is_claimed else None
        )

        def unit(db: sqlite3.Connection) -> None:
            units.begin_run(db, attempt_id, 1000)
            units.run_ended(
                db,
                attempt_id,
                RunNo(1),
                Outcome(Cause.SUCCEEDED, 0, None, ""),
                AfterRun(TaskEvent.COMPLETE, 0, 0),
                ended_at_ms=round((NOW_S - age_s) * 1000),
                ready_boottime_ns=0,
                boot_id=BOOT,
                usage=None,
                report={"exit_code": 0} if is_claimed else None,
            )

        await self.store.write(unit)
        for directory in self.directories(task_id):
            directory.mkdir(parents=True)
            (directory / "file").write_bytes(os.urandom(size))

    def directories(self, task_id: str) -> tuple[Path, Path]:
        """The run's and the task's."""
        return self.state_dir / "attempts" / f"{task_id}-a.1", self.state_dir / "work" / task_id

    async def remain(self) -> set[str]:
        """The tasks of which rows and both directories are there; asserts that it is all or nothing."""
        rows = await self.store.read(lambda db: {row[0] for row in db.execute("SELECT task_id FROM attempts")})
        attempts = {path.name.removesuffix("-a.1") for path in (self.state_dir / "attempts").glob("[!.]*")}
        work = {path.name for path in (self.state_dir / "work").glob("[!.]*")}
        assert rows == attempts == work
        return rows


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncGenerator[Kept]:
    """Nothing yet."""
    async with open_store(tmp_path) as opened:
        yield Kept(opened.store, tmp_path, set())


async def test_what_is_older_than_the_bound_goes_with_its_directories(kept: Kept) -> None:
    """More than one batch of them; a second round finds nothing to do."""
    for number in range(70):
        await kept.finished(f"old-{number}", (7.1 + number) * DAY_S)
    await kept.finished("young", 6.9 * DAY_S)
    done = await kept.retention().round()
    assert (done.tasks_by_age, done.tasks_by_size) == (70, 0)
    assert await kept.remain() == {"young"}
    assert list((kept.state_dir / "work" / ".trash").iterdir()) == []
    assert await kept.retention().round() == Round()


async def test_what_the_plane_does_not_know_yet_stays(kept: Kept) -> None:
    """A result without its delivery, a dead letter, and a task that is still being let go of, whatever their age."""
    for name in ("undelivered", "dead"):
        await kept.finished(name, 50 * DAY_S, is_claimed=True)
    await kept.finished("live", 50 * DAY_S)
    kept.live.add("live")
    [report] = [
        each
        for each in (await kept.store.read(lambda db: outbox.due_reports(db, 2**62, 10)))[0]
        if each.task_id == "dead"
    ]
    await kept.store.write(lambda db: outbox.report_dead(db, report.id, "refused"))
    assert await kept.retention(size_max_bytes=1).round() == Round()
    assert await kept.remain() == {"undelivered", "dead", "live"}
    kept.live.clear()
    assert (await kept.retention().round()).tasks_by_age == 1


async def test_above_the_size_the_oldest_go(kept: Kept) -> None:
    """The newest are kept as far as the bound goes: three of 2 MiB each within 5 MiB and a bit."""
    for number in range(8):
        await kept.finished(f"t-{number}", 2 * SIZE_SPARES_S + number, size=MIB)
    done = await kept.retention(size_max_bytes=5 * MIB).round()
    assert (done.tasks_by_age, done.tasks_by_size) == (0, 6)
    assert await kept.remain() == {"t-0", "t-1"}


async def test_what_ended_just_now_stays_whatever_its_size(kept: Kept) -> None:
    """Whoever waits for a result must be able to fetch it."""
    await kept.finished("big", SIZE_SPARES_S - 1, size=2 * MIB)
    await kept.finished("small", SIZE_SPARES_S + 1, size=10)
    assert (await kept.retention(size_max_bytes=MIB).round()).tasks_by_size == 1
    assert await kept.remain() == {"big"}


async def test_a_task_that_came_again_meanwhile_keeps_everything(kept: Kept) -> None:
    """Its working directory is kept over its attempts."""
    await kept.finished("t", 50 * DAY_S)
    await add_attempt(kept.store, MovableClock(), "t", attempt_id="t-b", ttl_s=300.0)
    assert await kept.retention(size_max_bytes=1).round() == Round()
    assert all((directory / "file").exists() for directory in kept.directories("t"))


async def test_strays_go_by_age(kept: Kept) -> None:
    """Run directories that the start found to be nobody's, and working directories of no task."""
    await add_attempt(kept.store, MovableClock(), "known")
    for name in ("attempts", "work", "work/known"):
        (kept.state_dir / name).mkdir()
    old_run, young_run = kept.state_dir / "attempts" / "x.1", kept.state_dir / "attempts" / "y.1"
    old_work = kept.state_dir / "work" / "x"
    for path in (old_run, young_run, old_work):
        path.mkdir()
    retention = kept.retention()
    retention.strays = [old_run, young_run]
    (kept.state_dir / "work" / "alive").mkdir()
    retention.spared_tasks = {"alive"}
    kept.now_s = young_run.stat().st_ctime + 1
    assert (await retention.round()).strays == 0
    kept.now_s += 8 * DAY_S
    (young_run / "touched").touch()
    done = await retention.round()
    assert done.strays == 3
    assert not any(path.exists() for path in (old_run, young_run, old_work))
    assert {path.name for path in (kept.state_dir / "work").glob("[!.]*")} == {"known", "alive"}


async def test_while_something_unreadable_may_live_no_working_directory_is_a_stray(kept: Kept) -> None:
    """It may be any task's."""
    (kept.state_dir / "work" / "x").mkdir(parents=True)
    kept.now_s = (kept.state_dir / "work" / "x").stat().st_ctime + 8 * DAY_S
    assert (await kept.retention().round()).strays == 0
    assert (kept.state_dir / "work" / "x").exists()


async def test_audit_files_go_by_day(kept: Kept) -> None:
    """A day that ended before the bound goes whole; the day of the bound stays; other files are not touched."""
    entry = AuditEntry(who="uid:0", what="x", source="unix", outcome="ok")
    for days_ago in (0, 89, 90, 91, 200):
        AuditLog(kept.state_dir / "audit", now=lambda days_ago=days_ago: NOW_S - days_ago * DAY_S).append(entry)  # type: ignore[misc]
    (kept.state_dir / "audit" / "notes.jsonl").touch()
    assert (await kept.retention().round()).audit_files == 2
    days = sorted(path.name for path in (kept.state_dir / "audit").iterdir())
    assert days == ["1970-01-11.jsonl", "1970-01-12.jsonl", "1970-04-11.jsonl", "notes.jsonl"]
    assert json.loads((kept.state_dir / "audit" / days[0]).read_text())["who"] == "uid:0"


@pytest.mark.parametrize(
    ("max_bytes", "kept_days_ago"),
    [(0, [0, 1, 2, 3]), (4000, [0, 1, 2, 3]), (3999, [0, 1, 2]), (2000, [0, 1]), (1999, [0]), (1, [0])],
)
async def test_above_their_size_the_audit_files_of_the_oldest_days_go(
    kept: Kept, max_bytes: int, kept_days_ago: list[int]
) -> None:
    """As few as bring the rest within the bound; today's stays even alone above it, other files are not touched."""
    audit = kept.state_dir / "audit"
    audit.mkdir()
    days = [f"1970-04-{11 - days_ago:02}.jsonl" for days_ago in range(4)]
    for name in (*days, "notes.jsonl"):
        (audit / name).write_bytes(bytes(1000))
    done = await kept.retention(audit_max_bytes=max_bytes).round()
    assert done.audit_files == 4 - len(kept_days_ago)
    assert {path.name for path in audit.iterdir()} == {"notes.jsonl", *(days[days_ago] for days_ago in kept_days_ago)}
    assert await kept.retention(audit_max_bytes=max_bytes).round() == Round()


async def test_a_clock_that_went_back_saves_no_audit_file_from_its_size(kept: Kept) -> None:
    """Files of days to come are the newest; today's own stays, though it is the oldest then."""
    audit = kept.state_dir / "audit"
    audit.mkdir()
    for name in ("1970-04-11.jsonl", "1970-04-12.jsonl", "1970-04-13.jsonl"):
        (audit / name).write_bytes(bytes(1000))
    assert (await kept.retention(audit_max_bytes=2000).round()).audit_files == 1
    assert {path.name for path in audit.iterdir()} == {"1970-04-11.jsonl", "1970-04-13.jsonl"}


async def test_a_crash_between_the_directories_and_the_row_is_made_good(kept: Kept) -> None:
    """Rows whose directories are gone go in the next round."""
    await kept.finished("t", 50 * DAY_S)
    for directory in kept.directories("t"):
        (directory / "file").unlink()
        directory.rmdir()
    assert (await kept.retention().round()).tasks_by_age == 1
    assert await kept.remain() == set()


async def test_ids_cannot_lead_out_of_the_state_directory(kept: Kept) -> None:
    """A row whose id is no name (a damaged database) hurts nothing outside, nor the others' round."""
    await kept.finished("bad", 50 * DAY_S)
    await kept.finished("t", 49 * DAY_S)
    await kept.store.write(lambda db: db.execute("UPDATE attempts SET task_id = '../attempts' WHERE task_id = 'bad'"))
    assert (await kept.retention().round()).tasks_by_age == 2
    assert (kept.state_dir / "attempts").exists()
    assert not any(path.exists() for path in kept.directories("t"))
