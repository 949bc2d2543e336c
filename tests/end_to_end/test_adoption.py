"""A new agent on what a killed one left: fast, complete, and once, wherever the old one stood when it was killed."""

from __future__ import annotations

import fcntl
import sqlite3
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from remotegpu_sidecar import record
from tests.end_to_end.agent_process import AgentProcess, agent
from tests.end_to_end.fleet import fleet
from tests.waiting import DEADLINE_S, until_so

RUNS: Final = 100
ADOPTED_WITHIN_S: Final = 1.5
"""What is promised of 100 runs on a machine that does nothing else; more work than that it is nowhere."""
SHARED_MACHINE: Final = 10
"""So many times longer it may take beside others."""


class Barrier:
    """A lock that tasks wait for without using the processor, however many they are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    @property
    def wait(self) -> str:
        """A shell command that returns once the barrier is open."""
        return f"flock --shared '{self._path}' true"

    def open(self) -> None:
        """Let everybody through, from now on."""
        self._file.close()


@contextmanager
def locked(database: Path) -> Generator[None]:
    """Nothing can be committed to it meanwhile, by anybody."""
    with closing(sqlite3.connect(database, timeout=DEADLINE_S, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")


def has_line(path: Path, kind: str) -> bool:
    """Whether a run's record has come that far."""
    try:
        return kind in record.read(path)[0]
    except OSError:
        return False


def record_of_only_run(host: AgentProcess) -> Path:
    """The record of the one run there is; it need not be there yet."""
    attempts = host.state_dir / "attempts"
    return next((each for each in attempts.iterdir() if each.suffix == ".1"), attempts / "none.1") / "record"


async def test_f04_a_hundred_running_tasks_are_adopted_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F04: 100 running tasks, the agent killed and started again: all are adopted within seconds, each end is right."""
    barrier = Barrier(tmp_path / "barrier")
    async with agent(tmp_path, capacity={"max_concurrent": RUNS}) as host:
        tasks = [
            f'{{"task": {{"id": "t-{n}", "command": "echo before-{n}; {barrier.wait}; echo after-{n}; exit {n}"}}}}'
            for n in range(RUNS)
        ]
        await host.post("/tasks", "\n---\n".join(tasks))
        before = [(await host.wait_running(f"t-{n}"))["process_id"] for n in range(RUNS)]
        await host.kill()
        begun = time.monotonic()
        await host.start()
        listed = (await host.get(f"/tasks?state=running&limit={RUNS}"))["tasks"]
        took_s, worked = time.monotonic() - begun, psutil.Process(host.pid).cpu_times()
        worked_s = worked.user + worked.system
        [stock] = [event for event in host.events() if event["event"] == "took stock" and event["adopted"]]
        with capsys.disabled():
            print(
                f"\n{stock['adopted']} runs adopted in {took_s:.2f} s from the agent's start, {worked_s:.2f} s of work"
            )
        assert stock["adopted"] == RUNS
        assert {task["id"]: task["process_id"] for task in listed} == {f"t-{n}": before[n] for n in range(RUNS)}
        assert worked_s < ADOPTED_WITHIN_S
        assert took_s < ADOPTED_WITHIN_S * SHARED_MACHINE
        barrier.open()
        for n in range(RUNS):
            detail = await host.wait_for(f"t-{n}")
            assert (detail["exit_code"], len(detail["runs"])) == (n, 1), detail
            assert await host.output(f"t-{n}") == f"before-{n}\nafter-{n}\n"


async def test_f03_killed_after_the_launch_before_the_identity_is_stored(tmp_path: Path) -> None:
    """F03: the database is locked while a launched task starts, then the agent is killed: adopted, by its directory."""
    barrier, trace = Barrier(tmp_path / "barrier"), tmp_path / "trace"
    async with agent(tmp_path) as host:
        spawner = await host.spawner()
        spawner.suspend()
        task_id = await host.submit(command=f"echo $$ >>{trace}; {barrier.wait}; echo whole; exit 5")
        await until_so(lambda: has_line(record_of_only_run(host), "spec"))
        with locked(host.state_dir / "queue.db"):
            spawner.resume()
            await until_so(lambda: has_line(record_of_only_run(host), "started"))
            await host.kill()
        with closing(sqlite3.connect(host.state_dir / "queue.db")) as db:
            assert db.execute("SELECT state, pid FROM runs").fetchall() == [("starting", None)]
        await host.start()
        detail = await host.wait_running(task_id)
        assert [detail["process_id"]] == [int(pid) for pid in trace.read_text().split()]
        barrier.open()
        detail = await host.wait_for(task_id)
        assert (detail["exit_code"], detail["retries_used"], len(detail["runs"])) == (5, 0, 1)
        assert detail["started_at"] is not None
        assert await host.output(task_id) == "whole\n"
        assert len(trace.read_text().split()) == 1


async def test_f03_a_launch_that_a_dead_agent_asked_for_starts_nothing(tmp_path: Path) -> None:
    """F03: the spawner gets to the launch only when the next agent has started the task: it runs once, at no cost."""
    trace = tmp_path / "trace"
    async with agent(tmp_path) as host:
        spawner = await host.spawner()
        spawner.suspend()
        task_id = await host.submit(command=f"echo $REMOTEGPU_RUN_NUMBER >>{trace}")
        await until_so(lambda: has_line(record_of_only_run(host), "spec"))
        await host.kill()
        await host.start()
        detail = await host.wait_for(task_id)
        spawner.resume()
        await until_so(lambda: not spawner.is_running() or spawner.status() == psutil.STATUS_ZOMBIE)
        await until_so(lambda: has_line(record_of_only_run(host), "ended"))
        assert [run["cause"] for run in detail["runs"]] == ["agent_lost", "succeeded"]
        assert (detail["state"], detail["retries_used"]) == ("completed", 0)
        assert record.read(record_of_only_run(host))[0]["ended"]["ended_by"] == "abandoned"
        assert trace.read_text() == "2\n"


@asynccontextmanager
async def ended_but_not_stored(tmp_path: Path) -> AsyncGenerator[tuple[Any, str]]:
    """A claimed task whose end is on record and nowhere else; its agent is dead."""
    barrier, trace = Barrier(tmp_path / "barrier"), tmp_path / "trace"
    async with fleet(tmp_path) as all_of_it:
        host = all_of_it.host
        [task_id] = await all_of_it.submit({"command": f"echo x >>{trace}; {barrier.wait}; echo whole; exit 4"})
        await host.wait_running(task_id)
        await all_of_it.plane.faults.wait_calls("start", 1, DEADLINE_S)
        with locked(host.state_dir / "queue.db"):
            barrier.open()
            await until_so(lambda: has_line(record_of_only_run(host), "ended"))
            # It has seen the end by now, or is just about to: either way nothing can be stored.
            await host.kill()
        assert all_of_it.plane.faults.calls["complete"] == 0
        yield all_of_it, task_id
        assert trace.read_text() == "x\n"


async def test_f05_an_end_that_could_not_be_stored_is_reported_after_the_restart(tmp_path: Path) -> None:
    """F05: the agent is killed after the exit, before it has stored the result: the plane gets it, whole and once."""
    async with ended_but_not_stored(tmp_path) as (all_of_it, task_id):
        await all_of_it.host.start()
        [task] = await all_of_it.ended([task_id])
        result = task["result"]
        assert (task["status"], result["exit_code"], result["stdout"]) == ("failed", 4, "whole\n")
        assert task["completions"] == {"accepted": 1, "repeated": 0, "rejected": 0}
        assert [event["kind"] for event in task["events"]].count("claimed") == 1


async def test_f05_killed_again_and_again_before_the_result_is_stored(tmp_path: Path) -> None:
    """F05: also when several agents in a row are killed while they take stock."""
    async with ended_but_not_stored(tmp_path) as (all_of_it, task_id):
        host = all_of_it.host
        for _ in range(3):
            said = len(host.events())
            await host.start(until_ready=False)
            await until_so(partial(_has_said_more, host, said))
            await host.kill()
        await host.start()
        [task] = await all_of_it.ended([task_id])
        assert (task["result"]["exit_code"], task["completions"]["accepted"]) == (4, 1)


def _has_said_more(host: AgentProcess, events: int) -> bool:
    return len(host.events()) > events
