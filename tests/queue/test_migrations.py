"""Migrations: each step in a transaction, a backup before the first, a newer database refused."""

from __future__ import annotations

import contextlib
import sqlite3
import stat
from pathlib import Path

import pytest

from remotegpu_queue import store as store_module
from remotegpu_queue.store import Store, connect, migrate, migrations, split_statements
from remotegpu_schemas.errors import Misconfigured, Permanent
from tests.queue import support

_SECOND = "CREATE TABLE extra (x INTEGER) STRICT;\nINSERT INTO extra VALUES (2);\n"
_BROKEN = "CREATE TABLE more (x INTEGER) STRICT;\nINSERT INTO nowhere VALUES (1);\n"


def _version(db: sqlite3.Connection) -> int:
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    return version


def _tables(db: sqlite3.Connection) -> set[str]:
    return {row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}


def _scripts(monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    scripts = [*migrations(), *more]
    monkeypatch.setattr(store_module, "migrations", lambda: scripts)


def test_new_database(db: sqlite3.Connection) -> None:
    """A new database has this program's version; migrating again changes nothing."""
    assert _version(db) == len(migrations())
    before = support.dump(db)
    migrate(db, Path("unused"))
    assert support.dump(db) == before


def test_every_table_is_strict(db: sqlite3.Connection) -> None:
    """No table takes a text where a number belongs."""
    loose = [row["name"] for row in db.execute("PRAGMA table_list") if not row["strict"]]
    assert [name for name in loose if not name.startswith("sqlite_")] == []


async def test_f38_old_database_is_migrated_with_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older database is copied as it was, for its owner only, then brought to this version with its rows."""
    opened = await Store.open(tmp_path)
    await opened.write(lambda db: support.submit(db, "t1"))
    await opened.close()
    _scripts(monkeypatch, _SECOND)
    opened = await Store.open(tmp_path)
    assert await opened.read(_version) == 2
    assert "extra" in await opened.read(_tables)
    await opened.close()
    backup = tmp_path / "queue.db.before-v2"
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    with contextlib.closing(sqlite3.connect(backup)) as copy:
        assert _version(copy) == 1
        assert copy.execute("SELECT task_id FROM attempts").fetchall() == [("t1",)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agent.lock", "queue.db", "queue.db.before-v2"]


def test_failed_step_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails leaves the version and the tables of the step before it; the first backup is kept."""
    path = tmp_path / "queue.db"
    with contextlib.closing(support.open_inline(path)) as db:
        support.submit(db, "t1")
        _scripts(monkeypatch, _SECOND, _BROKEN)
        for _ in range(2):
            with pytest.raises(sqlite3.OperationalError, match="nowhere"):
                migrate(db, path)
        assert _version(db) == 2
        assert "extra" in _tables(db)
        assert "more" not in _tables(db)
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db.before-v2")) as copy:
        assert _version(copy) == 1
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db.before-v3")) as copy:
        assert _version(copy) == 2


def test_interrupted_backup_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-written backup of an earlier try never passes for one."""
    path = tmp_path / "queue.db"
    (tmp_path / "queue.db.before-v2.part").write_bytes(b"half")
    with contextlib.closing(support.open_inline(path)) as db:
        _scripts(monkeypatch, _SECOND)
        migrate(db, path)
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db.before-v2")) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert not (tmp_path / "queue.db.before-v2.part").exists()


async def test_f26_newer_database_is_refused(tmp_path: Path) -> None:
    """A database of a newer program is refused with a sentence that says what to do, and is left as it was."""
    path = tmp_path / "queue.db"
    with contextlib.closing(support.open_inline(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(Misconfigured, match=r"has version 99, this program knows up to 1; start the newer"):
        await Store.open(tmp_path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert _version(db) == 99


def test_new_database_is_never_half_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the first step fails the file holds nothing, and the next start makes it whole."""
    path = tmp_path / "queue.db"
    with monkeypatch.context() as patch, contextlib.closing(connect(path)) as db:
        patch.setattr(store_module, "migrations", lambda: [_BROKEN])
        with pytest.raises(sqlite3.OperationalError, match="nowhere"):
            migrate(db, path)
        assert _tables(db) == set()
    with contextlib.closing(support.open_inline(path)) as db:
        assert _version(db) == 1


def test_statements_are_split_by_sqlite(tmp_path: Path) -> None:
    """A semicolon in a text, a comment or a trigger does not end a statement; an unfinished one is refused."""
    script = (
        "-- a; comment\nINSERT INTO t VALUES ('a;b');\n"
        "CREATE TRIGGER x AFTER INSERT ON t BEGIN\n  DELETE FROM u;\n  DELETE FROM v;\nEND;\n-- the end;\n"
    )
    assert [text.splitlines()[-1] for text in split_statements(script)] == ["INSERT INTO t VALUES ('a;b');", "END;"]
    with pytest.raises(Permanent, match="incomplete"):
        split_statements("SELECT 1;\nSELECT 2\n")
