"""F26: a damaged database is found out, set aside whole, and replaced by a new one that works."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from remotegpu_queue import damage, units
from remotegpu_queue.store import Store, connect
from tests.queue import support

NAMES = ("queue.db", "queue.db-wal", "queue.db-shm")
Harm = Callable[[Path], None]


def overwrite(seed: int) -> Harm:
    """Random bytes over half of all pages, the first one too."""

    def harm(path: Path) -> None:
        chance = random.Random(seed)
        pages = path.stat().st_size // 4096
        with path.open("r+b") as file:
            for page in {0, *chance.sample(range(pages), pages // 2)}:
                file.seek(page * 4096 + chance.randrange(64))
                file.write(chance.randbytes(2048))

    return harm


def truncate(path: Path) -> None:
    """The end is missing."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def zero_header(path: Path) -> None:
    """The first hundred bytes are zero."""
    with path.open("r+b") as file:
        file.write(bytes(100))


def replace(path: Path) -> None:
    """Another program's file."""
    path.write_bytes(b"certainly not a database " * 400)


HARMS = [
    *(pytest.param(overwrite(seed), id=f"overwrite-{seed}") for seed in range(3)),
    *(pytest.param(harm, id=harm.__name__) for harm in (truncate, zero_header, replace)),
]


async def filled(state_dir: Path) -> None:
    """A database of some size, closed cleanly."""
    opened = await Store.open(state_dir)
    await opened.write(lambda db: units.set_meta(db, "agent_id", "gpu-7"))
    await opened.write(lambda db: support.submit(db, *(f"t-{number}" for number in range(300))))
    await opened.close()


def unclean(state_dir: Path) -> None:
    """As if its last owner had been killed: a log is there, of which nothing is in the database yet."""
    path = state_dir / "queue.db"
    db = connect(path)
    db.execute("PRAGMA wal_autocheckpoint = 0")
    support.submit(db, "last")
    copies = {name: (state_dir / name).read_bytes() for name in NAMES}
    db.close()
    for name, content in copies.items():
        (state_dir / name).write_bytes(content)


async def works(opened: Store) -> None:
    """What was opened takes tasks."""
    await opened.write(lambda db: support.submit(db, "new"))
    assert await opened.read(lambda db: db.execute("PRAGMA integrity_check").fetchone()[0]) == "ok"


@pytest.mark.parametrize("harm", HARMS)
async def test_f26_damage_after_an_unclean_stop_is_found_and_set_aside(tmp_path: Path, harm: Harm) -> None:
    """Whatever was done to the file: not a byte of it is lost, and a new database stands in its place."""
    await filled(tmp_path)
    unclean(tmp_path)
    (tmp_path / "queue.db-wal").write_bytes((tmp_path / "queue.db-wal").read_bytes()[:40])  # nothing to heal it with
    harm(tmp_path / "queue.db")
    before = (tmp_path / "queue.db").read_bytes()
    opened = await Store.open(tmp_path)
    assert opened.is_new
    assert opened.set_aside is not None
    kept = opened.set_aside.path
    assert kept.name.startswith("queue.db.damaged-2")
    assert kept.read_bytes() == before
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert kept.with_name(f"{kept.name}-wal").exists()
    await works(opened)
    assert damage.notices(tmp_path / "queue.db")[0].count(kept.name) == 1
    await opened.close()


@pytest.mark.parametrize("harm", [zero_header, replace])
async def test_f26_what_is_no_database_at_all_is_set_aside_after_a_clean_stop_too(tmp_path: Path, harm: Harm) -> None:
    """No look at every page is needed to see that."""
    await filled(tmp_path)
    harm(tmp_path / "queue.db")
    opened = await Store.open(tmp_path)
    assert opened.set_aside is not None
    await works(opened)
    await opened.close()


async def test_f26_garbage_in_the_log_loses_only_what_was_behind_it(tmp_path: Path) -> None:
    """SQLite ends at the first frame whose checksum is wrong; the database itself is whole, and stays."""
    await filled(tmp_path)
    unclean(tmp_path)
    log = tmp_path / "queue.db-wal"
    log.write_bytes(log.read_bytes()[:60] + random.Random(3).randbytes(8192))
    opened = await Store.open(tmp_path)
    assert opened.set_aside is None
    assert not opened.is_new
    await works(opened)
    await opened.close()


@pytest.mark.parametrize("is_there", [True, False])
async def test_f26_a_log_without_its_database_is_set_aside(tmp_path: Path, is_there: bool) -> None:
    """SQLite would drop the log of an empty database without a word."""
    await filled(tmp_path)
    unclean(tmp_path)
    log = (tmp_path / "queue.db-wal").read_bytes()
    (tmp_path / "queue.db").unlink()
    if is_there:
        (tmp_path / "queue.db").touch()
    opened = await Store.open(tmp_path)
    assert opened.set_aside is not None
    kept = opened.set_aside.path
    assert kept.with_name(f"{kept.name}-wal").read_bytes() == log
    await works(opened)
    await opened.close()


async def test_what_can_still_be_read_of_the_agents_own_notes_is_kept(tmp_path: Path) -> None:
    """A damaged index or task does not cost the agent its name, nor the operator an order to drain."""
    await filled(tmp_path)
    with (tmp_path / "queue.db").open("r+b") as file:
        file.truncate((tmp_path / "queue.db").stat().st_size - 8192)
    (tmp_path / "queue.db.suspect").touch()
    opened = await Store.open(tmp_path)
    assert opened.set_aside is not None
    assert opened.set_aside.meta == {"agent_id": "gpu-7"}
    assert not (tmp_path / "queue.db.suspect").exists()
    await opened.close()


async def test_a_suspicion_that_is_unfounded_costs_nothing(tmp_path: Path) -> None:
    """Everything is looked at; what is whole stays, and is trusted again."""
    await filled(tmp_path)
    (tmp_path / "queue.db.suspect").touch()
    opened = await Store.open(tmp_path)
    assert opened.set_aside is None
    assert not (tmp_path / "queue.db.suspect").exists()
    assert await opened.read(lambda db: db.execute("SELECT count(*) FROM attempts").fetchone()[0]) == 300
    await opened.close()


async def test_a_second_damaged_database_does_not_replace_the_first(tmp_path: Path) -> None:
    """Each keeps a name of its own, even within a second."""
    kept = []
    for number in range(3):
        (tmp_path / "queue.db").write_bytes(b"%d is no database " % number * 100)
        opened = await Store.open(tmp_path)
        assert opened.set_aside is not None
        kept.append(opened.set_aside.path.read_bytes()[:1])
        await opened.close()
    assert kept == [b"0", b"1", b"2"]
    assert len(damage.notices(tmp_path / "queue.db")) == 3


# --- waiting for others ---


async def test_f26_a_caller_in_a_hurry_is_told_to_come_again_and_nothing_is_stored(tmp_path: Path) -> None:
    """A unit whose caller has given up is never run, also when the lock is free again."""
    opened = await Store.open(tmp_path)
    other = sqlite3.connect(tmp_path / "queue.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    refused = [
        asyncio.create_task(opened.write(lambda db: units.set_meta(db, "hurried", "1"), patience_s=0.05))
        for _ in range(3)
    ]
    results = await asyncio.gather(*refused, return_exceptions=True)
    assert [str(result) for result in results] == ["the database is busy; a backup may hold its lock"] * 3
    patient = asyncio.create_task(opened.write(lambda db: units.set_meta(db, "patient", "1")))
    other.execute("COMMIT")
    other.close()
    await patient
    assert await opened.read(lambda db: units.find_meta(db, "hurried")) is None
    assert await opened.read(lambda db: units.find_meta(db, "patient")) == "1"
    await opened.close()


async def test_patience_ends_before_there_is_room_in_the_queue_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind thousands of units a caller waits no longer than it said."""
    monkeypatch.setattr("remotegpu_schemas.limits.STORE_QUEUE_MAX_UNITS", 1)
    opened = await Store.open(tmp_path)
    other = sqlite3.connect(tmp_path / "queue.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    held = asyncio.create_task(opened.write(lambda db: units.set_meta(db, "first", "1")))
    await asyncio.sleep(0)
    with pytest.raises(Exception, match="the database is busy"):
        await opened.write(lambda db: units.set_meta(db, "second", "1"), patience_s=0.05)
    other.execute("COMMIT")
    other.close()
    await held
    assert await opened.write(lambda db: 7, patience_s=60.0) == 7
    assert await opened.read(lambda db: units.find_meta(db, "second")) is None
    await opened.close()


async def test_insisting_waits_until_the_lock_is_free(tmp_path: Path) -> None:
    """F26: at the start nothing goes on without it: a disk that is full, or locked, for a while is waited for."""
    opened = await Store.open(tmp_path)
    await opened.write(lambda db: db.execute("PRAGMA max_page_count = 1"))
    insisting = asyncio.create_task(opened.insist(lambda db: units.set_meta(db, "big", "x" * 100_000), "a test"))
    with pytest.raises(Exception, match="full"):
        await opened.write(lambda db: units.set_meta(db, "other", "x" * 100_000))
    assert not insisting.done()
    await opened.write(lambda db: db.execute("PRAGMA max_page_count = 1000000"))
    await insisting
    assert await opened.read(lambda db: units.find_meta(db, "big")) == "x" * 100_000
    await opened.close()
