"""The agent is killed at one named point between the claim's answer and the report's (F01-F03, F05, F06).

A point is reached by making the agent wait at it: the plane holds an answer, the spawner is frozen, the database is
locked. Then the agent is killed there, and nobody has to hit a moment.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from control_plane.faults import Hold
from tests.end_to_end.agent_process import AgentProcess
from tests.end_to_end.fleet import Fleet, fleet
from tests.end_to_end.gates import Gate
from tests.waiting import until, until_so


def rows(host: AgentProcess, query: str) -> list[tuple[Any, ...]]:
    """What an agent that is dead or stands still has on disk."""
    with contextlib.closing(sqlite3.connect(host.state_dir / "queue.db")) as db:
        return db.execute(query).fetchall()


@contextlib.contextmanager
def locked(host: AgentProcess) -> Generator[None]:
    """The agent can read its database and not write to it."""
    with contextlib.closing(sqlite3.connect(host.state_dir / "queue.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


async def at_plane(both: Fleet, task_id: str, status: str) -> dict[str, Any]:
    """The task once the plane has it in this status."""

    async def look() -> dict[str, Any] | None:
        task = await both.operator.task(task_id)
        return task if task["status"] == status else None

    return await until(look) or {}


def check_once(task: dict[str, Any], trace: Path, states: list[str]) -> None:
    """One process has run, one result is recorded; the attempts ended so.

    One that was given back unstarted may lie between: the wait of a long poll counts against so short a lease.
    """
    assert trace.read_text() == "x\n"
    assert (task["status"], task["completions"]["accepted"]) == ("completed", 1), task
    found = [attempt["state"] for attempt in task["attempt_list"]]
    assert [state for state in found if state != "given_up"] == states, task


async def test_f01_killed_after_the_claims_answer_before_it_is_stored(tmp_path: Path) -> None:
    """F01: the answer lies in the socket of a frozen agent, which is killed; the task comes back after its lease."""
    trace = tmp_path / "trace"
    async with fleet(tmp_path, is_started=False, lease_ttl_s=2.0) as both:
        hold = Hold()
        both.plane.faults.order("claim", hold)
        [task_id] = await both.submit({"command": f"echo x >>{trace}"})
        await both.host.start()
        await hold.reached.wait()
        both.host.freeze()
        hold.release.set()
        await at_plane(both, task_id, "assigned")
        await both.host.kill()
        assert rows(both.host, "SELECT * FROM attempts") == []
        await both.host.start()
        [task] = await both.ended([task_id])
        check_once(task, trace, ["lapsed", "completed"])


@pytest.mark.parametrize("is_over", [False, True])
async def test_f02_killed_after_storing_before_launch(tmp_path: Path, is_over: bool) -> None:
    """F02: stored, waiting for a slot: launched after the restart if its lease holds, else claimed again; once."""
    trace, gate = tmp_path / "trace", Gate(tmp_path / "gate")
    settings = {"capacity": {"max_concurrent": 1}, "lease": {"margin": 0.2}}
    async with fleet(tmp_path, settings, is_started=False, lease_ttl_s=2.0 if is_over else 60.0) as both:
        hold = Hold()
        both.plane.faults.order("claim", hold)
        [task_id] = await both.submit({"command": f"echo x >>{trace}"})
        await both.host.start()
        await hold.reached.wait()
        local = await both.host.submit(command=gate.wait)  # takes the slot for which the claim asks
        await both.host.wait_running(local)
        hold.release.set()
        await both.host.until_shown(f"/tasks/{task_id}", lambda task: task["state"] == "assigned")
        await both.host.kill()
        gate.open()
        assert rows(both.host, f"SELECT * FROM runs JOIN attempts USING (attempt_id) WHERE task_id = '{task_id}'") == []
        if is_over:
            await at_plane(both, task_id, "pending")
        await both.host.start()
        [task] = await both.ended([task_id])
        first = task["attempt_list"][0]["state"]
        if is_over:
            assert first in {"lapsed", "given_up"}  # the agent may have said so, or not
        check_once(task, trace, [first, "completed"] if is_over else ["completed"])


async def test_f03_killed_between_launch_and_storing_the_identity(tmp_path: Path) -> None:
    """F03: the task has started, and its pid could not be stored: adopted from the attempt directory; once."""
    trace, gate = tmp_path / "trace", Gate(tmp_path / "gate")
    async with fleet(tmp_path) as both:
        await both.task({"command": "true"})  # now there is a spawner
        spawner = await both.host.spawner()
        spawner.suspend()
        [task_id] = await both.submit({"command": f"echo $$ >{trace}.pid; echo x >>{trace}; {gate.wait}; echo whole"})
        await both.host.until_shown(f"/tasks/{task_id}", lambda task: task["state"] == "running")
        with locked(both.host):
            spawner.resume()
            await until_so(trace.exists)
            await both.host.kill()
        assert rows(both.host, "SELECT pid FROM runs WHERE state = 'starting'") == [(None,)]
        await both.host.start()
        detail = await both.host.wait_running(task_id)
        assert detail["process_id"] == int(Path(f"{trace}.pid").read_text())
        gate.open()
        [task] = await both.ended([task_id])
        assert (task["result"]["stdout"], task["result"]["runs"]) == ("whole\n", 1)
        check_once(task, trace, ["completed"])


async def test_f03_killed_before_the_shim_was_told_to_go(tmp_path: Path) -> None:
    """F03: written down and asked for, never started: the shim that comes too late starts nothing; once."""
    trace = tmp_path / "trace"
    async with fleet(tmp_path) as both:
        await both.task({"command": "true"})
        spawner = await both.host.spawner()
        spawner.suspend()
        [task_id] = await both.submit({"command": f"echo x >>{trace}"})
        await both.host.until_shown(f"/tasks/{task_id}", lambda task: task["state"] == "running")
        await both.host.kill()
        spawner.resume()
        await until_so(lambda: not spawner.is_running())
        assert not trace.exists()
        await both.host.start()
        [task] = await both.ended([task_id])
        check_once(task, trace, ["completed"])


async def test_f05_killed_after_exit_before_the_result_is_stored(tmp_path: Path) -> None:
    """F05: the task ended under an agent that could store nothing and was killed: stored and reported afterwards."""
    trace, gate = tmp_path / "trace", Gate(tmp_path / "gate")
    async with fleet(tmp_path) as both:
        [task_id] = await both.submit({"command": f"echo x >>{trace}; {gate.wait}; echo precious; exit 0"})
        await both.host.wait_running(task_id)
        await at_plane(both, task_id, "running")
        with locked(both.host):
            gate.open()
            record = next((both.host.state_dir / "attempts").iterdir()) / "record"
            await until_so(lambda: b'"kind":"ended"' in record.read_bytes())
            await both.host.kill()
        assert rows(both.host, "SELECT state, ended_at_ms FROM runs") == [("running", None)]
        await both.host.start()
        [task] = await both.ended([task_id])
        assert task["result"]["stdout"] == "precious\n"
        check_once(task, trace, ["completed"])


async def test_f06_killed_after_the_report_was_sent_before_the_answer(tmp_path: Path) -> None:
    """F06: the plane has the result, the agent has not heard so: it is sent again, and counted once."""
    trace = tmp_path / "trace"
    async with fleet(tmp_path) as both:
        hold = Hold()
        both.plane.faults.order("complete", hold)
        [task_id] = await both.submit({"command": f"echo x >>{trace}"})
        await hold.reached.wait()
        both.host.freeze()
        hold.release.set()
        await at_plane(both, task_id, "completed")
        await both.host.kill()
        await both.host.start()
        await both.host.until_shown("/queue/status", lambda status: status["reports_waiting"] == 0)
        task = await both.operator.task(task_id)
        check_once(task, trace, ["completed"])
        assert task["completions"] == {"accepted": 1, "repeated": 1, "rejected": 0}
