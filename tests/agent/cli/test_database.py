"""`db check` and `db backup` on a real database, with and without an agent that has it open."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from remotegpu_agent.cli.app import main
from remotegpu_queue.store import Store
from tests.queue import support


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config whose state directory has a database with two tasks."""

    async def fill() -> None:
        opened = await Store.open(tmp_path / "state")
        await opened.write(lambda db: support.submit(db, "t-1", "t-2"))
        await opened.close()

    asyncio.run(fill())
    path = tmp_path / "agent.yaml"
    path.write_text(json.dumps({"agent": {"state_dir": str(tmp_path / "state")}}))
    return path


def run(config: Path, *arguments: str) -> int:
    """The program's exit code."""
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(config), *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_sound_database(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line says so, with what there is; `--json` gives one document."""
    assert run(config, "db", "check") == 0
    assert "sound, version 1, 2 attempts, 0 runs, 0 outbox" in capsys.readouterr().out
    assert run(config, "--json", "db", "check") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["is_sound"], found["problems"], found["rows"]["attempts"]) == (True, [], 2)


def test_a_damaged_database(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, what is wrong, and what to do: the next start looks as closely, and sets it aside."""
    path = tmp_path / "state" / "queue.db"
    content = bytearray(path.read_bytes())
    content[8192:12288] = b"\xff" * 4096
    path.write_bytes(content)
    assert run(config, "db", "check") == 1
    said = capsys.readouterr()
    assert "restart the agent" in said.err
    assert said.out

    async def start() -> bool:
        opened = await Store.open(tmp_path / "state")
        await opened.close()
        return opened.is_new

    assert asyncio.run(start())
    path.write_bytes(b"no database at all " * 500)
    assert run(config, "db", "check") == 1
    assert "cannot be read as a database: file is not a database" in capsys.readouterr().err


def test_a_backup(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole copy of its own; a second one to the same place is refused and changes nothing."""
    copy = tmp_path / "copy.db"
    assert run(config, "db", "backup", str(copy)) == 0
    assert capsys.readouterr().out == f"{copy}: {copy.stat().st_size} bytes\n"
    with closing(sqlite3.connect(copy)) as db:
        assert db.execute("SELECT count(*) FROM attempts").fetchone()[0] == 2
    before = copy.read_bytes()
    assert run(config, "db", "backup", str(copy)) == 2
    assert "exists already; a backup never replaces a file" in capsys.readouterr().err
    assert copy.read_bytes() == before


def test_nothing_to_back_up_and_nowhere_to_put_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with its own exit code, and without a traceback."""
    assert run(config, "db", "backup", str(tmp_path / "nowhere" / "copy.db")) == 4
    assert "No such file or directory" in capsys.readouterr().err
    for path in (tmp_path / "state").glob("queue.db*"):
        path.unlink()
    assert run(config, "db", "backup", str(tmp_path / "copy.db")) == 4
    assert run(config, "db", "check") == 4
    assert "there is no database" in capsys.readouterr().err
    assert not (tmp_path / "copy.db").exists()


async def test_f26_a_running_agent_is_not_held_up_by_a_check_or_a_backup(config: Path, tmp_path: Path) -> None:
    """F26: it writes while both are under way, and has nothing to wait for."""
    opened = await Store.open(tmp_path / "state")
    work = [
        asyncio.create_task(asyncio.to_thread(run, config, "db", "check")),
        asyncio.create_task(asyncio.to_thread(run, config, "db", "backup", str(tmp_path / "copy.db"))),
    ]
    for number in range(50):
        await opened.write(lambda db, number=number: support.submit(db, f"m-{number}"), patience_s=5.0)  # type: ignore[misc]
    assert await asyncio.gather(*work) == [0, 0]
    await opened.close()
