"""What supervising costs: a launch, a running task's memory, the way of its output to the disk, adoption."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.agent import client_of, until
from benchmarks.peers import NO_OP
from local_fleet import agent
from remotegpu_schemas.attempt import AttemptId, PlacementKind, RunNo, RunRecord, RunSpec
from remotegpu_schemas.task import TaskId
from remotegpu_sidecar.launcher import Launcher, Run
from remotegpu_sidecar.placement import choose

SLEEPERS: Final = 20
ADOPTED: Final = 100
_MIB: Final = 1 << 20
_PATH: Final = "/usr/bin:/bin"


def launches_per_s(directory: Path, tasks: int, at_once: int) -> float:
    """No-op tasks a second of launcher, spawner and shims alone, from spec to end on record; no agent, no database."""
    return asyncio.run(_launches_per_s(directory, tasks, at_once))


async def _launches_per_s(directory: Path, tasks: int, at_once: int) -> float:
    async with _launcher(directory) as launcher:
        places = asyncio.Semaphore(at_once)

        async def one(number: int) -> None:
            async with places:
                await _end_of(await launcher.launch(_spec(number, NO_OP)))

        started = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(1, tasks + 1)))
        return tasks / (time.perf_counter() - started)


def shim_memory_mb(directory: Path) -> float:
    """Memory (MiB) of the shim of a running task that is nobody else's (USS), the mean of some."""
    return asyncio.run(_shim_memory_mb(directory))


async def _shim_memory_mb(directory: Path) -> float:
    async with _launcher(directory) as launcher:
        runs = [await launcher.launch(_spec(number, "/bin/sleep", "1000")) for number in range(1, SLEEPERS + 1)]
        for run in runs:
            await run.wait_started()
        try:
            return sum(_uss_mb(run.shim.pid) for run in runs) / len(runs)
        finally:
            for run in runs:
                run.kill()
                await _end_of(run)


def output_mb_per_s(directory: Path, size_mb: int, limit_mb: int) -> tuple[float, float]:
    """MiB a second of a task that writes so much without a newline, and by how many MiB its shim has grown."""
    return asyncio.run(_output_mb_per_s(directory, size_mb, limit_mb))


async def _output_mb_per_s(directory: Path, size_mb: int, limit_mb: int) -> tuple[float, float]:
    async with _launcher(directory) as launcher:
        first_gate, last_gate = directory / "first", directory / "last"
        for gate in (first_gate, last_gate):
            os.mkfifo(gate)
        script = f"echo; read go <{first_gate}; head -c {size_mb}M /dev/zero; read go <{last_gate}"
        spec = _spec(1, "/bin/bash", "-c", script).model_copy(update={"output_limit_bytes": limit_mb * _MIB})
        run = await launcher.launch(spec)
        await run.wait_started()
        first = run.directory / f"stdout.{0:016d}"
        await asyncio.to_thread(until, first.exists)
        before_mb = _uss_mb(run.shim.pid)
        started = time.perf_counter()
        first_gate.write_text("go\n")
        # Whoever opens it for writing waits for its reader: until the task has written all.
        fd = await asyncio.to_thread(os.open, last_gate, os.O_WRONLY)
        seconds = time.perf_counter() - started
        grown_mb = max(_uss_mb(run.shim.pid) - before_mb, 0.0)
        os.close(fd)
        record = await _end_of(run)
        if record.ended is None or record.ended.stdout_bytes != size_mb * _MIB + 1:
            raise ValueError(f"output was lost: {record.ended}")
        return size_mb / seconds, grown_mb


def cat_mb_per_s(directory: Path, size_mb: int, *, has_own_session: bool) -> float:
    """MiB a second of `cat >file` behind the same writer.

    With a session of its own, as a shim has one, the kernel shares processors between it and the writer as between a
    shim and its task (decision 0007); without, both are one pipeline of a shell.
    """
    started = time.perf_counter()
    with (
        (directory / "file").open("wb") as file,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file, start_new_session=has_own_session) as cat,
    ):
        subprocess.run(["head", "-c", f"{size_mb}M", "/dev/zero"], stdout=cat.stdin, check=True)
        cat.communicate()
    if cat.returncode != 0:
        raise ValueError(f"cat ended with {cat.returncode}")
    return size_mb / (time.perf_counter() - started)


def start_s(directory: Path) -> float:
    """Seconds from the start of an agent process until it serves, with nothing to adopt."""
    started = time.perf_counter()
    with agent(directory, {"log": {"level": "warning"}}):
        return time.perf_counter() - started


def adoption_s(directory: Path) -> float:
    """Seconds from the start of an agent process until it serves, having adopted the running tasks of a killed one.

    Raises ValueError unless each of them then ends with its own exit code, after one run.
    """
    gate = directory / "gate"
    os.mkfifo(gate)
    sections: dict[str, dict[str, Any]] = {
        "capacity": {"max_concurrent": ADOPTED, "cpus": ADOPTED},
        "log": {"level": "warning"},
    }
    with agent(directory, sections) as first:
        client = client_of(first)
        script = f"read go <{gate}; exit "
        documents = [{"task": {"id": f"t-{n}", "command": f"{script}{n}"}} for n in range(ADOPTED)]
        client.post("/tasks", "\n---\n".join(map(json.dumps, documents)).encode(), "application/yaml")
        until(lambda: client.get("/queue/status")["tasks"]["running"] == ADOPTED)
        until(lambda: all(task["process_id"] for task in client.get("/tasks", (("limit", ADOPTED),))["tasks"]))
        os.kill(first.pid, signal.SIGKILL)
        (first.state_dir / "endpoints.json").unlink()
        started = time.perf_counter()
        with agent(directory, sections) as second:
            seconds = time.perf_counter() - started
            client = client_of(second)
            found = client.get("/queue/status")["tasks"]["running"]
            gate.write_text("go\n")
            for number in range(ADOPTED):
                task = client.get(f"/tasks/t-{number}", (("wait", 60),), wait_s=60)
                if (found, task["exit_code"], len(task["runs"])) != (ADOPTED, number, 1):
                    raise ValueError(f"not adopted as it was: {found} of {ADOPTED}, {task}")
            return seconds


@asynccontextmanager
async def _launcher(directory: Path) -> AsyncGenerator[Launcher]:
    launcher = Launcher(directory / "attempts", await choose(PlacementKind.PROCESS_GROUP))
    await launcher.start()
    try:
        yield launcher
    finally:
        await launcher.stop()


async def _end_of(run: Run) -> RunRecord:
    record = await run.wait()
    run.close()
    return record


def _spec(number: int, *argv: str) -> RunSpec:
    attempt_id = AttemptId(f"benchmark-{os.getpid()}-{number}")
    env = {"PATH": _PATH, "REMOTEGPU_ATTEMPT_ID": attempt_id, "REMOTEGPU_RUN_NUMBER": "1"}
    return RunSpec(task_id=TaskId("benchmark"), attempt_id=attempt_id, run_no=RunNo(1), argv=argv, env=env, cwd="/")


def _uss_mb(pid: int) -> float:
    return float(psutil.Process(pid).memory_full_info().uss) / _MIB
