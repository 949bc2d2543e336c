"""F27: no descriptors, processes, memory: launches fail with their errno and are repeated; the agent lives."""

from __future__ import annotations

import os
import resource
import sqlite3
import sys
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from tests.end_to_end.agent_process import AgentFailed, AgentProcess, agent
from tests.end_to_end.gates import Gate
from tests.waiting import until_so

LARGE: Final = ["x" * 100_000] * 9
"""Arguments that take some memory to hand on."""


@contextmanager
def scarce(pid: int, what: int, amount: int) -> Generator[None]:
    """Only so much of it for a process, and for those that it forks meanwhile."""
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (amount, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, what, before)


def causes(host: AgentProcess) -> list[str | None]:
    """Of all runs, read from the disk: an agent without descriptors cannot answer."""
    with closing(sqlite3.connect(host.state_dir / "queue.db")) as db:
        return [cause for (cause,) in db.execute("SELECT cause FROM runs ORDER BY attempt_id, run_no")]


async def settled(count: Callable[[], int]) -> int:
    """A number that has not changed for a while: the last answer's connection has been closed."""
    looks: list[int] = []

    def is_settled() -> bool:
        looks.append(count())
        return len(looks) >= 5 and len(set(looks[-5:])) == 1

    await until_so(is_settled)
    return looks[-1]


async def fails_then_succeeds(host: AgentProcess, lift: Callable[[], object], error: str, **task: Any) -> None:
    """The task's launches fail for this reason, at the cost of its retries, until `lift`; then it succeeds."""
    task_id = await host.submit(**task, retry={"max": 1000, "delay": 0.1})
    failed = await host.until_shown(f"/tasks/{task_id}", lambda shown: shown["retries_used"] >= 3)
    for run in failed["runs"][:3]:
        assert run["cause"] == "launch_failed"
        assert error in run["error"].lower(), run["error"]
    lift()
    detail = await host.wait_for(task_id)
    *failures, last = [run["cause"] for run in detail["runs"]]
    assert (set(failures), last, detail["retries_used"]) == ({"launch_failed"}, "succeeded", len(failures))


@pytest.mark.parametrize(("what", "error"), [("descriptors", "too many open files"), ("memory", "memory")])
async def test_f27_a_spawner_without(tmp_path: Path, what: str, error: str) -> None:
    """F27: EMFILE, ENOMEM where shims are forked: each launch is `launch_failed`, and repeated until it succeeds."""
    async with agent(tmp_path) as host:
        await host.wait_for(await host.submit(command="true"))
        spawner = await host.spawner()
        if what == "memory":
            limit = scarce(spawner.pid, resource.RLIMIT_AS, spawner.memory_info().vms)
        else:
            limit = scarce(spawner.pid, resource.RLIMIT_NOFILE, spawner.num_fds() + 3)
        with limit:
            await fails_then_succeeds(host, lambda: limit.__exit__(None, None, None), error, command="true", args=LARGE)
            assert (await host.spawner()) == spawner


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a spawner as another user")
async def test_f27_a_spawner_that_may_fork_nothing(tmp_path: Path, open_dir: Path) -> None:
    """F27: EAGAIN: the user may have no more processes: `launch_failed`, and repeated until there may be more."""
    # The limit does not bind root (setrlimit(2)): this spawner is another user's, which may have itself only.
    python, scarcity = open_dir / "python", open_dir / "scarcity"
    limits = "prlimit --nproc=1 setpriv --reuid=65533 --regid=65533 --clear-groups"
    python.write_text(
        f'#!/bin/sh\n[ -e {scarcity} ] && exec {limits} /usr/bin/python3 "$@"\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    scarcity.touch()
    code = (
        f"import runpy, sys; sys.executable = {str(python)!r}; del sys.argv[:3]; runpy.run_module(sys.argv[0], None, "
    )
    host = AgentProcess(tmp_path, {})
    host.launched_by = [sys.executable, "-c", f"{code}'__main__', alter_sys=True)"]
    async with host:
        spawner = await host.spawner()

        def lift() -> None:
            scarcity.unlink()
            spawner.kill()

        await fails_then_succeeds(host, lift, "temporarily unavailable", command="true")


async def test_f27_an_agent_without_descriptors(tmp_path: Path) -> None:
    """F27: EMFILE in the agent itself: what it would start is `launch_failed` and repeated; it lives and serves on."""
    gate, trace = Gate(tmp_path / "gate"), tmp_path / "trace"
    async with agent(tmp_path, capacity={"max_concurrent": 1}) as host:
        first = await host.submit(command=f"{gate.wait}; exit 3")
        await host.wait_running(first)
        second = await host.submit(command=f"echo x >>{trace}", retry={"max": 1000, "delay": 0.1})
        # One to spare is enough to read how the first task has ended, and too few for a launch.
        with scarce(host.pid, resource.RLIMIT_NOFILE, await settled(psutil.Process(host.pid).num_fds) + 1):
            gate.open()
            await until_so(lambda: causes(host).count("launch_failed") >= 3)
            assert host.is_running
        assert (await host.wait_for(first))["exit_code"] == 3
        detail = await host.wait_for(second)
        assert (detail["state"], trace.read_text()) == ("completed", "x\n")
        assert "open files" in detail["runs"][0]["error"].lower()


async def test_f27_an_agent_without_memory(tmp_path: Path) -> None:
    """F27: ENOMEM in the agent itself ends it at worst; with it or its successor all is right, and nothing ran twice.

    At worst, because a library ends the process when an allocation fails; systemd starts it again.
    """
    gate, trace = Gate(tmp_path / "gate"), tmp_path / "trace"
    async with agent(tmp_path, capacity={"max_concurrent": 2}) as host:
        running = [await host.submit(command=f"{gate.wait}; exit 3") for _ in range(2)]
        for task_id in running:
            await host.wait_running(task_id)
        waiting = [
            await host.submit(script=f"echo x >>{trace}", args=LARGE, retry={"max": 1000, "delay": 0.1})
            for _ in range(4)
        ]
        await host.stop()
        await host.start()  # what it had for the requests it has not any more
        said = len(host.log.read_text())
        with scarce(host.pid, resource.RLIMIT_AS, psutil.Process(host.pid).memory_info().vms):
            gate.open()
            await until_so(lambda: "memory" in host.log.read_text()[said:].lower())
            await until_so(lambda: not host.is_running or causes(host).count("exit_code") == 2)
        try:
            await host.wait_ready()
        except AgentFailed:
            await host.start()
        for task_id in running:
            assert (await host.wait_for(task_id))["exit_code"] == 3
        for task_id in waiting:
            assert (await host.wait_for(task_id))["state"] == "completed"
        assert trace.read_text() == "x\n" * 4
