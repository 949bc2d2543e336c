"""F26: whatever happens to the database, every running task is adopted and its result reported; nothing runs twice."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.end_to_end.agent_process import AgentProcess, agent
from tests.end_to_end.fleet import Fleet, fleet
from tests.end_to_end.gates import Gate
from tests.waiting import until, until_so

Harm = Callable[[Path], None]


def overwrite(path: Path) -> None:
    """Random bytes in all of its pages, at random places."""
    chance = random.Random(7)
    with path.open("r+b") as file:
        for page in range(path.stat().st_size // 4096):
            file.seek(page * 4096 + chance.randrange(2048))
            file.write(chance.randbytes(2048))


def truncate(path: Path) -> None:
    """Only its first page and a half are left."""
    os.truncate(path, 6000)


def empty(path: Path) -> None:
    """Nothing is left."""
    os.truncate(path, 0)


def zero_header(path: Path) -> None:
    """Its first bytes are gone."""
    with path.open("r+b") as file:
        file.write(bytes(100))


def remove(path: Path) -> None:
    """Somebody has cleaned up."""
    path.unlink()


def checkpointed(harm: Harm) -> Harm:
    """The log has been brought in before, so that nothing heals the file."""

    def harm_all(path: Path) -> None:
        with closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            db.execute("PRAGMA journal_mode = WAL")
        Path(f"{path}-wal").touch(0o600)  # it was not closed: its owner was killed
        harm(path)

    return harm_all


def garble_log(path: Path) -> None:
    """The log is damaged from its start on: the database is as it was long ago."""
    log = Path(f"{path}-wal")
    log.write_bytes(random.Random(8).randbytes(log.stat().st_size))


def drop_log(path: Path) -> None:
    """The log is lost."""
    Path(f"{path}-wal").unlink()


HARMS = [
    *(pytest.param(checkpointed(harm), id=harm.__name__) for harm in (overwrite, truncate, empty, zero_header)),
    *(pytest.param(harm, id=harm.__name__) for harm in (remove, garble_log, drop_log)),
]


async def _started(all_of_it: Fleet, gate: Gate, trace: Path) -> tuple[list[str], list[str]]:
    """Two claimed and two local tasks that run, one of these suspended."""
    host = all_of_it.host

    def script(name: str) -> str:
        return f"echo x >>{trace}/{name}; {gate.wait}; echo precious"

    claimed = await all_of_it.submit({"command": script("c1")}, {"command": script("c2"), "timeout_sec": 600})
    local = [await host.submit(id=f"local-{number}", script=script(f"l{number}")) for number in (1, 2)]
    for task_id in (*claimed, *local):
        await host.wait_running(task_id)
    await host.post(f"/tasks/{local[1]}/suspend")
    await until_so(lambda: len(list(trace.iterdir())) == 4)
    return claimed, local


@pytest.mark.parametrize("harm", HARMS)
async def test_f26_every_running_task_is_adopted_and_reported(tmp_path: Path, harm: Harm) -> None:
    """F26: claimed, local and suspended ones; the agent keeps its name, and nothing ran twice."""
    gate, trace = Gate(tmp_path / "gate"), tmp_path / "trace"
    trace.mkdir()
    async with fleet(tmp_path, {"capacity": {"max_concurrent": 8}}) as all_of_it:
        host = all_of_it.host
        claimed, local = await _started(all_of_it, gate, trace)
        before = {task_id: await host.get(f"/tasks/{task_id}") for task_id in (*claimed, *local)}
        agent_id = (await host.get("/ping"))["agent_id"]
        await host.kill()
        harm(host.state_dir / "queue.db")
        await host.start()
        for task_id, was in before.items():
            now = await host.wait_running(task_id)
            assert (now["state"], now["process_id"], now["run_no"]) == (was["state"], was["process_id"], 1)
        assert (await host.get("/ping"))["agent_id"] == agent_id
        gate.open()
        await host.post(f"/tasks/{local[1]}/resume")
        for task in await all_of_it.ended(claimed):
            assert (task["status"], task["result"]["stdout"]) == ("completed", "precious\n")
        for task_id in local:
            assert (await host.wait_for(task_id))["state"] == "completed"
            assert await host.output(task_id) == "precious\n"
        assert {path.read_text() for path in trace.iterdir()} == {"x\n"}


def scatter(state_dir: Path, chance: random.Random) -> None:
    """Random bytes at random places of the database, its log and the log's index, each with some luck."""
    for name in ("queue.db", "queue.db-wal", "queue.db-shm"):
        path = state_dir / name
        if not path.exists() or path.stat().st_size == 0 or chance.random() < 0.3:
            continue
        size = path.stat().st_size
        with path.open("r+b") as file:
            for _ in range(chance.choice([1, 3, 10, 40])):
                file.seek(chance.randrange(size))
                file.write(chance.randbytes(chance.choice([1, 16, 300, 4096])))
            file.truncate(size)


@pytest.mark.parametrize("seed", range(4))
async def test_f26_random_damage(tmp_path: Path, seed: int) -> None:
    """F26: after a clean stop or a kill, whatever is hit, seen at the start or later: each ran once, each arrives."""
    chance, gate, trace = random.Random(seed), Gate(tmp_path / "gate"), tmp_path / "trace"
    trace.mkdir()
    async with fleet(tmp_path, {"capacity": {"max_concurrent": 8}}) as all_of_it:
        host = all_of_it.host
        claimed, local = await _started(all_of_it, gate, trace)
        documents = [
            f'{{"task": {{"id": "w-{n}", "command": "true", "resources": {{"gpus": 1}}}}}}' for n in range(100)
        ]
        await host.post("/tasks", "\n---\n".join(documents))
        pids = {task_id: (await host.get(f"/tasks/{task_id}"))["process_id"] for task_id in (*claimed, *local)}
        await (host.stop() if chance.random() < 0.4 else host.kill())
        scatter(host.state_dir, chance)
        await host.start(until_ready=False)

        async def are_adopted() -> bool:
            with contextlib.suppress(OSError, aiohttp.ClientError):  # it may start a second time
                answers = [await host.call("GET", f"/tasks/{task_id}") for task_id in pids]
                return all(status == 200 for status, _ in answers) and [
                    body["data"]["process_id"] for _, body in answers
                ] == list(pids.values())
            return False

        await until(are_adopted)
        gate.open()
        await host.post(f"/tasks/{local[1]}/resume")
        for task in await all_of_it.ended(claimed):
            assert (task["status"], task["result"]["stdout"]) == ("completed", "precious\n")
        for task_id in local:
            assert (await host.wait_for(task_id))["state"] == "completed"
        assert {path.read_text() for path in trace.iterdir()} == {"x\n"}


async def test_f26_what_ended_meanwhile_is_reported_and_what_is_lost_is_stated(tmp_path: Path) -> None:
    """F26: ends that nobody saw arrive; nothing that had been stored runs again; log, audit and status say what was."""
    gate, trace = Gate(tmp_path / "gate"), tmp_path / "trace"
    async with fleet(tmp_path) as all_of_it:
        host = all_of_it.host
        done = await host.submit(id="done", command=f"echo x >>{trace}; exit 3", retry={"max": 1})
        await host.wait_for(done)
        [ended] = await all_of_it.submit({"command": f"{gate.wait}; exit 4"})
        pid = (await host.wait_running(ended))["process_id"]
        await host.submit(id="lost", command="true", resources={"gpus": 1})
        await host.kill()
        gate.open()
        await until_so(lambda: not Path(f"/proc/{pid}").exists())
        (host.state_dir / "queue.db").write_bytes(b"certainly not a database " * 400)
        Path(f"{host.state_dir}/queue.db-wal").unlink()
        await host.start()
        [task] = await all_of_it.ended([ended])
        assert (task["status"], task["result"]["exit_code"]) == ("failed", 4)
        await _until_rebuilt(host)
        known = await host.get("/tasks/done")
        assert (known["state"], known["exit_code"], len(known["runs"])) == ("failed", 3, 2)
        assert trace.read_text() == "x\nx\n"
        assert (await host.call("GET", "/tasks/lost"))[0] == 404
        [aside] = [path for path in host.state_dir.glob("queue.db.damaged-*") if not path.name.endswith("-shm")]
        assert any(aside.name in reason for reason in (await host.get("/queue/status"))["reasons"])
        [said] = [event for event in host.events() if event["event"].startswith("the database was rebuilt")]
        assert (said["set_aside"], said["alive"], said["left"]) == (str(aside), 0, 0)
        audit = "".join(path.read_text() for path in (host.state_dir / "audit").iterdir())
        assert '"database_rebuilt"' in audit


async def _until_rebuilt(host: AgentProcess) -> None:
    async def look() -> bool:
        return any(event["event"].startswith("the database was rebuilt") for event in host.events())

    await until(look)
    await until_so(lambda: [event["event"] for event in host.events()].count("ready") == 2)


async def test_f26_damage_under_a_running_agent_is_mended_by_itself(tmp_path: Path) -> None:
    """F26: the agent notices, claims nothing, starts again in the same process and adopts what runs."""
    gate = Gate(tmp_path / "gate")
    async with agent(tmp_path) as host:
        running = await host.submit(id="running", script=f"{gate.wait}; echo precious")
        pid = (await host.wait_running(running))["process_id"]
        documents = [f'{{"task": {{"id": "w-{n}", "command": "true", "name": "{"n" * 200}"}}}}' for n in range(300)]
        await host.post("/tasks", "\n---\n".join(documents))
        checkpointed(overwrite)(host.state_dir / "queue.db")

        async def is_noticed() -> bool:
            status, _ = await host.call("GET", "/tasks?limit=500")
            return status != 200 or any("damaged" in event["event"] for event in host.events())

        await until(is_noticed)
        await _until_rebuilt(host)
        assert (await host.wait_running(running))["process_id"] == pid
        gate.open()
        assert (await host.wait_for(running))["state"] == "completed"
        assert await host.output(running) == "precious\n"


async def test_one_unreadable_task_is_set_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    """A row that this program cannot read ends as failed, and says why; it keeps neither the agent nor others."""
    gate = Gate(tmp_path / "gate")
    async with fleet(tmp_path, {"capacity": {"max_concurrent": 1}}) as all_of_it:
        host = all_of_it.host
        running = await host.submit(id="running", script=gate.wait)
        await host.wait_running(running)
        waiting = [await host.submit(id=f"w-{number}", command="true") for number in (1, 2)]
        await host.kill()
        with closing(sqlite3.connect(host.state_dir / "queue.db")) as db:
            task = '{"id": "w-1", "command": "true", "colour": "red"}'
            db.execute("UPDATE attempts SET task = ? WHERE task_id IN ('w-1', 'running')", (task,))
            db.commit()
        await host.start()
        shown: list[dict[str, Any]] = (await host.get("/tasks"))["tasks"]
        assert {each["id"] for each in shown} == {running, *waiting}
        gate.open()
        assert (await host.wait_for(running))["state"] == "completed"
        assert (await host.wait_for("w-2"))["state"] == "completed"
        refused = await host.wait_for("w-1")
        assert (refused["state"], refused["cause"]) == ("failed", "policy_refused")
        assert "the task as it is stored cannot be read: colour" in refused["error"]
