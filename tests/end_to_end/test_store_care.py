"""What a running agent does for its database and its disk: waits for others, forgets what is old."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
from contextlib import closing, suppress
from pathlib import Path

import aiohttp

from tests.end_to_end.agent_process import agent
from tests.end_to_end.fleet import fleet
from tests.waiting import until_so

DAY_MS = 86_400_000
PATIENCE_S = 5.0


async def test_f26_a_locked_database_answers_within_seconds_and_nothing_is_taken(tmp_path: Path) -> None:
    """F26: a submission is told to come again, and what was refused never appears; the agent waits and goes on."""
    async with agent(tmp_path) as host:
        with closing(sqlite3.connect(host.state_dir / "queue.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            asked_at_s = asyncio.get_running_loop().time()
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(host.socket))) as session:
                task = '{"task": {"id": "t", "command": "true"}}'
                async with session.post("http://localhost/api/v1/tasks", data=task) as answer:
                    body = await answer.json()
                    assert (answer.status, body["code"], answer.headers["Retry-After"]) == (503, 30023, "5")
            took_s = asyncio.get_running_loop().time() - asked_at_s
            assert "the database is busy" in body["message"]
            assert PATIENCE_S <= took_s < PATIENCE_S + 5
            assert (await host.get("/queue/status"))["tasks"]["pending"] == 0
            other.execute("COMMIT")
        assert await host.submit(id="t", command="true") == "t"
        assert (await host.wait_for("t"))["state"] == "completed"


async def test_f26_a_start_waits_for_a_backup(tmp_path: Path) -> None:
    """F26: locked at the start, too: what has to be written waits, and the agent is ready once it could be."""
    async with agent(tmp_path) as host:
        running = await host.submit(command="sleep 60")
        pid = (await host.wait_running(running))["process_id"]
        await host.kill()
        with closing(sqlite3.connect(host.state_dir / "queue.db", isolation_level=None)) as other:
            other.execute("UPDATE attempts SET boot_id = 'the one before'")  # so that there is something to write
            other.execute("BEGIN IMMEDIATE")
            await host.start(until_ready=False)
            await until_so(lambda: _has_open(host.pid, host.state_dir / "queue.db-wal"))
            assert host.is_running
            other.execute("COMMIT")
        await host.wait_ready()
        assert (await host.get(f"/tasks/{running}"))["process_id"] == pid
        await host.post(f"/tasks/{running}/cancel")
        await host.wait_for(running)


async def test_finished_tasks_go_with_their_directories(tmp_path: Path) -> None:
    """By `retention.max_age`, at the start and then again and again; what is younger stays whole."""
    async with fleet(tmp_path, {"retention": {"max_age": "7d"}}) as all_of_it:
        host = all_of_it.host
        claimed = await all_of_it.submit(*[{"command": "echo old; echo x >$REMOTEGPU_ARTIFACTS_DIR/file"}] * 3)
        await all_of_it.ended(claimed)
        young = await host.submit(id="young", command="echo young")
        running = await host.submit(id="running", command="sleep 60")
        await host.wait_for(young)
        await host.wait_running(running)
        await until_so(lambda: _is_empty(host.state_dir / "queue.db", "outbox"))
        await host.stop()
        with closing(sqlite3.connect(host.state_dir / "queue.db")) as db:
            db.execute(
                "UPDATE attempts SET ended_at_ms = ended_at_ms - ? WHERE origin = 'control_plane'", (8 * DAY_MS,)
            )
            db.commit()
        await host.start()
        await until_so(lambda: any(event["event"] == "cleaned up" for event in host.events()))
        [done] = [event for event in host.events() if event["event"] == "cleaned up"]
        assert (done["tasks_by_age"], done["tasks_by_size"]) == (3, 0)
        assert {task["id"] for task in (await host.get("/tasks"))["tasks"]} == {"young", "running"}
        work = {path.name for path in (host.state_dir / "work").iterdir()}
        assert work == {"young", "running", ".trash"}
        assert len([path for path in (host.state_dir / "attempts").iterdir() if path.name != ".trash"]) == 2
        assert await host.output("young") == "young\n"
        await host.post("/tasks/running/cancel")
        await host.wait_for("running")


def _has_open(pid: int, path: Path) -> bool:
    """Whether process `pid` has `path` open; the process goes on meanwhile, so a listed descriptor may be gone."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if os.readlink(link) == str(path):
                return True
    return False


def _is_empty(path: Path, table: str) -> bool:
    with closing(sqlite3.connect(path)) as db:
        return bool(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] == 0)


async def test_a_backup_of_a_running_agent_can_be_put_back(tmp_path: Path) -> None:
    """`db backup` while tasks run; the agent that is started on it adopts even the one that was started after it."""
    async with agent(tmp_path, capacity={"max_concurrent": 4}) as host:
        tasks = [await host.submit(id="before", command="sleep 60")]
        await host.wait_running("before")
        copy = tmp_path / "copy.db"
        made = await asyncio.create_subprocess_exec(
            *host.command("db", "backup", str(copy)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        assert await made.wait() == 0
        tasks.append(await host.submit(id="after", command="sleep 60"))
        pids = {task_id: (await host.wait_running(task_id))["process_id"] for task_id in tasks}
        await host.stop()
        copy.rename(host.state_dir / "queue.db")
        await host.start()
        for task_id, pid in pids.items():
            assert (await host.wait_running(task_id))["process_id"] == pid
            await host.post(f"/tasks/{task_id}/cancel")
            assert (await host.wait_for(task_id))["cause"] == "cancelled"
