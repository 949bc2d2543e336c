"""The open store: durability, group commit, order, faults of the disk, and who may open it."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from remotegpu_queue.store import Store, StoreDamaged, StoreUnavailable, connect, run_batch, thread_executor
from remotegpu_schemas import limits
from remotegpu_schemas.errors import Misconfigured

Unit = Callable[[sqlite3.Connection], Any]


def _pragma(name: str) -> Unit:
    return lambda db: db.execute(f"PRAGMA {name}").fetchone()[0]


def _put(key: str, value: str = "") -> Unit:
    return lambda db: db.execute("INSERT INTO meta (key, value) VALUES (?, ?)", (key, value)).rowcount


def _all_keys(db: sqlite3.Connection) -> set[str]:
    return {row[0] for row in db.execute("SELECT key FROM meta")}


class Gate:
    """A unit that holds the writer until it is let go, so that what is written meanwhile waits."""

    def __init__(self) -> None:
        self._go = threading.Event()

    def unit(self, db: sqlite3.Connection) -> None:
        assert self._go.wait(30)

    def open(self) -> None:
        self._go.set()


async def _commits(store: Store, work: Callable[[], Any]) -> int:
    seen: list[str] = []
    await store.write(lambda db: db.set_trace_callback(seen.append))
    seen.clear()
    await work()
    await store.write(lambda db: db.set_trace_callback(None))
    return seen.count("COMMIT")


# --- settings ---


@pytest.mark.parametrize(("name", "value"), [("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)])
async def test_writer_settings(store: Store, name: str, value: object) -> None:
    """The writer logs ahead, waits for the disk at each commit (FULL is 2), and keeps foreign keys."""
    assert await store.write(_pragma(name)) == value


async def test_reader_cannot_write(store: Store) -> None:
    """A query that tries to write is refused, and is not mistaken for a full disk."""
    with pytest.raises((sqlite3.OperationalError, StoreUnavailable), match="readonly"):
        await store.read(_put("a"))


async def test_files_are_private(store: Store, tmp_path: Path) -> None:
    """Database, log and shared memory hold environments of tasks: only their owner reads them, from the first byte."""
    await store.write(_put("a"))
    names = ["queue.db", "queue.db-shm", "queue.db-wal"]
    assert {name: stat.S_IMODE((tmp_path / "state" / name).stat().st_mode) for name in names} == dict.fromkeys(
        names, 0o600
    )


async def test_an_open_file_is_made_private(tmp_path: Path) -> None:
    """A database that others could read (a restored copy) is closed to them before it is used."""
    (tmp_path / "queue.db").touch(0o644)
    opened = await Store.open(tmp_path)
    await opened.close()
    assert stat.S_IMODE((tmp_path / "queue.db").stat().st_mode) == 0o600


# --- writing ---


async def test_write_returns_what_the_unit_returns(store: Store) -> None:
    """The result of a unit comes back, and the reader sees the change."""
    assert await store.write(_put("a")) == 1
    assert await store.read(_all_keys) == {"a"}


async def test_group_commit(store: Store) -> None:
    """Two hundred units that wait while one commit is under way share two further commits."""
    gate = Gate()

    async def work() -> None:
        held = await store.enqueue(gate.unit)
        await asyncio.sleep(0)
        waiting = [await store.enqueue(_put(str(number))) for number in range(200)]
        gate.open()
        await asyncio.gather(held, *waiting)

    assert await _commits(store, work) <= 1 + -(-200 // limits.STORE_BATCH_MAX_UNITS) + 1
    assert len(await store.read(_all_keys)) == 200


async def test_refused_unit_leaves_its_neighbours_alone(store: Store) -> None:
    """One unit of a batch that raises is rolled back whole; those before and after it are committed."""

    def half(db: sqlite3.Connection) -> None:
        _put("half")(db)
        raise KeyError("refused")

    gate = Gate()
    units: list[Unit] = [gate.unit, _put("before"), half, _put("after")]
    futures = [await store.enqueue(unit) for unit in units]
    gate.open()
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), int, KeyError, int]
    assert await store.read(_all_keys) == {"before", "after"}


async def test_units_keep_their_order(store: Store) -> None:
    """Units run in the order in which they were handed over, over many batches."""
    ran: list[int] = []
    futures = [await store.enqueue(lambda db, number=number: ran.append(number)) for number in range(1000)]  # type: ignore[misc]
    await asyncio.gather(*futures)
    assert ran == list(range(1000))


async def test_order_holds_when_the_queue_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers that wait for room are served first come, first served, also against those who come when it opens."""
    monkeypatch.setattr(limits, "STORE_QUEUE_MAX_UNITS", 2)
    monkeypatch.setattr(limits, "STORE_BATCH_MAX_UNITS", 1)
    opened = await Store.open(tmp_path)
    ran: list[int] = []

    def unit(number: int) -> Unit:
        return lambda db: ran.append(number)

    async def write_two(number: int) -> None:
        await opened.write(unit(number))

    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(write_two(number))
            if number % 7 == 0:
                await asyncio.sleep(0)
    await opened.close()
    assert ran == list(range(50))


async def test_writer_survives_any_exception(store: Store) -> None:
    """A unit that raises StopIteration, which a future does not take, harms nobody."""
    with pytest.raises(RuntimeError, match="StopIteration"):
        await store.write(lambda db: next(iter([])))
    assert await store.write(_put("a")) == 1


async def test_cancelled_caller_does_not_stop_the_writer(store: Store) -> None:
    """A caller that goes away while its unit waits leaves the others and the writer as they were."""
    gate = Gate()
    held = await store.enqueue(gate.unit)
    caller = asyncio.create_task(store.write(_put("gone")))
    given_up = await store.enqueue(_put("given up"))
    await asyncio.sleep(0)
    caller.cancel()
    given_up.cancel()
    gate.open()
    await held
    assert await store.write(_put("a")) == 1
    assert "a" in await store.read(_all_keys)


async def test_read_sees_one_moment(store: Store) -> None:
    """Two statements of one query see the same state, although a write lies between them."""
    written, counted = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def query(db: sqlite3.Connection) -> tuple[int, int]:
        first = db.execute("SELECT count(*) FROM meta").fetchone()[0]
        loop.call_soon_threadsafe(written.set)
        assert counted.wait(30)
        return first, db.execute("SELECT count(*) FROM meta").fetchone()[0]

    reading = asyncio.create_task(store.read(query))
    await written.wait()
    await store.write(_put("a"))
    counted.set()
    assert await reading == (0, 0)
    assert await store.read(_all_keys) == {"a"}


async def test_a_query_that_is_wrong_says_so(store: Store) -> None:
    """What a query raises reaches its caller: a programming error is never called an unavailable database."""
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        await store.read(lambda db: db.execute("SELECT * FROM nowhere"))
    with pytest.raises(ValueError, match="mine"):
        await store.read(_raise_value_error)
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        await store.write(lambda db: db.execute("DELETE FROM nowhere"))


def _raise_value_error(db: sqlite3.Connection) -> None:
    raise ValueError("mine")


# --- faults of the disk ---


def _limit_pages(db: sqlite3.Connection, more: int | None) -> None:
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages + more if more is not None else 2**30}")


async def test_f24_disk_full(store: Store) -> None:
    """With no room left a write says so and is retryable, a unit that still fits goes on, and all is well after."""
    await store.write(_put("small"))
    await store.write(lambda db: _limit_pages(db, 2))
    with pytest.raises(StoreUnavailable, match="full"):
        await store.write(_put("big", "x" * 100_000))
    await store.write(lambda db: db.execute("UPDATE meta SET value = 'y' WHERE key = 'small'"))
    await store.write(lambda db: _limit_pages(db, None))
    assert await store.write(_put("big", "x" * 100_000)) == 1
    assert await store.read(_all_keys) == {"small", "big"}


async def test_f24_disk_full_loses_nothing_that_was_reported(store: Store) -> None:
    """Of a batch that meets a full disk, each unit is either committed or told that it is not."""
    await store.write(lambda db: _limit_pages(db, 8))
    futures = {str(number): await store.enqueue(_put(str(number), "x" * 3000)) for number in range(100)}
    results = dict(zip(futures, await asyncio.gather(*futures.values(), return_exceptions=True), strict=True))
    assert {type(result) for result in results.values()} <= {int, StoreUnavailable}
    assert StoreUnavailable in {type(result) for result in results.values()}
    assert await store.read(_all_keys) == {key for key, result in results.items() if result == 1}


async def test_f25_read_only_while_running(store: Store) -> None:
    """A database that turns read-only refuses writes as unavailable and takes them again when it can."""
    await store.write(lambda db: None)
    executor = store._writer  # pyright: ignore[reportPrivateUsage]  # PRAGMA query_only is not allowed in a unit
    await executor.run(lambda db: db.execute("PRAGMA query_only = ON"))
    with pytest.raises(StoreUnavailable, match="readonly"):
        await store.write(_put("a"))
    await executor.run(lambda db: db.execute("PRAGMA query_only = OFF"))
    assert await store.write(_put("a")) == 1


async def test_f26_waits_for_a_backup(store: Store, tmp_path: Path) -> None:
    """A write waits while another process holds the database, and is then committed."""
    other = sqlite3.connect(tmp_path / "state" / "queue.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writing = asyncio.create_task(store.write(_put("a")))
    reached: asyncio.Future[set[str]] = asyncio.ensure_future(store.read(_all_keys))
    assert await reached == set()
    assert not writing.done()
    other.execute("COMMIT")
    other.close()
    assert await writing == 1


def test_run_batch_gives_the_error_of_a_lost_transaction(tmp_path: Path) -> None:
    """When a unit's fault ended the whole transaction nothing is reported as done."""
    db = connect(tmp_path / "a.db")
    db.execute("CREATE TABLE t (x)")

    def fatal(connection: sqlite3.Connection) -> None:
        connection.execute("ROLLBACK")
        raise sqlite3.OperationalError("gone")

    with pytest.raises(sqlite3.OperationalError, match="gone"):
        run_batch(db, [lambda connection: connection.execute("INSERT INTO t VALUES (1)"), fatal])
    assert db.execute("SELECT count(*) FROM t").fetchone()[0] == 0
    assert run_batch(db, [lambda connection: 1]) == [1]
    db.close()


# --- closing ---


async def test_close_commits_what_waits_and_is_idempotent(tmp_path: Path) -> None:
    """Units that wait when the store is closed are on disk after it, and closing again does nothing."""
    opened = await Store.open(tmp_path)
    futures = [await opened.enqueue(_put(str(number))) for number in range(300)]
    await opened.close()
    await opened.close()
    assert all(future.result() == 1 for future in futures)
    db = sqlite3.connect(tmp_path / "queue.db")
    assert len(_all_keys(db)) == 300
    db.close()


async def test_closed_store_refuses(tmp_path: Path) -> None:
    """After closing, reads and writes are unavailable; nobody waits for ever, not even for room in the queue."""
    opened = await Store.open(tmp_path)
    await opened.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await opened.write(_put("a"))
    with pytest.raises(StoreUnavailable, match="closed"):
        await opened.read(_all_keys)


async def test_caller_without_room_is_refused_at_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for room when the store closes is told so."""
    monkeypatch.setattr(limits, "STORE_QUEUE_MAX_UNITS", 1)
    opened = await Store.open(tmp_path)
    gate = Gate()
    held = await opened.enqueue(gate.unit)
    late = [asyncio.create_task(opened.write(_put(str(number)))) for number in range(3)]
    await asyncio.sleep(0)
    closing = asyncio.create_task(opened.close())
    await asyncio.sleep(0)
    gate.open()
    await asyncio.wait_for(closing, 30)
    await held
    results = await asyncio.wait_for(asyncio.gather(*late, return_exceptions=True), 30)
    assert {type(result) for result in results} == {StoreUnavailable}


def test_process_ends_with_a_wedged_disk() -> None:
    """A statement that never returns does not keep the process from ending."""
    script = (
        "import asyncio, threading, pathlib, tempfile\n"
        "from remotegpu_queue.store import Store\n"
        "async def main():\n"
        "    store = await Store.open(pathlib.Path(tempfile.mkdtemp()))\n"
        "    await store.enqueue(lambda db: threading.Event().wait())\n"
        "    await asyncio.sleep(0)\n"
        "    print('wedged', flush=True)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True, check=False)
    assert done.stdout == "wedged\n"
    assert done.returncode == 0


# --- who may open ---


async def test_f36_second_agent_is_refused(store: Store, tmp_path: Path) -> None:
    """A state directory belongs to one agent, in this process and in another; it is free after closing."""
    with pytest.raises(Misconfigured, match="another agent is running on the state directory"):
        await Store.open(tmp_path / "state")
    script = (
        "import asyncio, pathlib, sys\n"
        "from remotegpu_queue.store import Store\n"
        "asyncio.run(Store.open(pathlib.Path(sys.argv[1])))\n"
    )
    other = [sys.executable, "-c", script, str(tmp_path / "state")]
    done = await asyncio.to_thread(subprocess.run, other, timeout=60, capture_output=True, text=True, check=False)
    assert "Misconfigured: another agent is running" in done.stderr
    await store.close()
    again = await Store.open(tmp_path / "state")
    await again.close()


async def test_f25_state_directory_that_cannot_be_made(tmp_path: Path) -> None:
    """A state directory that cannot be written is refused with what to do."""
    (tmp_path / "file").touch()
    with pytest.raises(Misconfigured, match=r"cannot be written.*set agent\.state_dir"):
        await Store.open(tmp_path / "file" / "state")


async def test_f25_database_that_cannot_be_made(tmp_path: Path) -> None:
    """A database that cannot be opened is refused with its path, and the directory is free again."""
    (tmp_path / "queue.db").mkdir()
    with pytest.raises(Misconfigured, match=r"cannot open the database .*queue\.db"):
        await Store.open(tmp_path)
    (tmp_path / "queue.db").rmdir()
    opened = await Store.open(tmp_path)
    await opened.close()


async def test_f26_damaged_page_is_told_apart(tmp_path: Path) -> None:
    """F26: a page that turns out damaged while the agent runs says so, and the next start sets it all aside."""
    opened = await Store.open(tmp_path)
    for number in range(200):
        await opened.write(_put(str(number), "x" * 1000))
    await opened.close()
    size = (tmp_path / "queue.db").stat().st_size
    with (tmp_path / "queue.db").open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    opened = await Store.open(tmp_path)
    assert not opened.damaged.is_set()
    with pytest.raises(StoreDamaged, match="malformed"):
        await opened.read(lambda db: db.execute("SELECT count(value), max(value) FROM meta").fetchone())
    assert opened.damaged.is_set()
    await opened.close()
    opened = await Store.open(tmp_path)
    assert opened.is_new
    await opened.close()


async def test_no_write_ahead_log_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SQLite cannot log ahead (an in-memory database stands for such a file system) the store does not open."""
    monkeypatch.setattr(sqlite3, "connect", lambda *_args, **_options: _memory())
    with pytest.raises(Misconfigured, match="write-ahead"):
        await Store.open(tmp_path)


def _memory(connect_: Any = sqlite3.connect) -> sqlite3.Connection:
    connection: sqlite3.Connection = connect_(":memory:", isolation_level=None, check_same_thread=False)
    return connection


async def test_reader_of_a_missing_file(tmp_path: Path) -> None:
    """An executor that cannot open its file raises what SQLite says, and leaves no thread behind."""
    with pytest.raises(sqlite3.OperationalError, match="unable to open"):
        await thread_executor(tmp_path / "nowhere" / "queue.db", is_reader=True)


# --- power ---

_WRITER = """
import asyncio, pathlib, sys
from remotegpu_queue.store import Store
async def main():
    store = await Store.open(pathlib.Path(sys.argv[1]))
    async def one(number):
        while True:
            await store.write(lambda db: db.execute("INSERT INTO meta VALUES (?, '')", (str(number),)))
            sys.stdout.write(f"{number}\\n")
            sys.stdout.flush()
            number += 8
    await asyncio.gather(*(one(number) for number in range(8)))
asyncio.run(main())
"""


@pytest.mark.parametrize("kill_after", [1, 50, 400])
async def test_killed_process_loses_no_reported_commit(tmp_path: Path, kill_after: int) -> None:
    """After SIGKILL in the middle of writing, every write that was reported as done is in the database."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _WRITER, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    said = b"".join([await child.stdout.readline() for _ in range(kill_after)])
    child.kill()
    said += await child.stdout.read()
    assert await child.wait() == -signal.SIGKILL
    reported = set(said.decode().rpartition("\n")[0].splitlines())
    opened = await Store.open(tmp_path)
    assert reported <= await opened.read(_all_keys)
    assert await opened.read(_pragma("integrity_check")) == "ok"
    await opened.close()
