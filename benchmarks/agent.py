"""The agent's own figures: no-op tasks a second, locally and through a control plane, and from submission to start."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.peers import NO_OP
from local_fleet import Agent, Plane, agent, control_plane
from remotegpu_agent.cli.client import Client
from remotegpu_agent.cli.endpoints import Endpoint
from remotegpu_sidecar import record

_TIMEOUT_S: Final = 300.0
_LOOK_AGAIN_S: Final = 0.01
_TASK: Final[dict[str, Any]] = {"command": NO_OP, "args": []}


def local_per_s(directory: Path, tasks: int, at_once: int) -> float:
    """Tasks a second of a stand-alone agent, from one submission of all to the last end on disk."""
    with agent(directory, _sections(at_once)) as host:
        client = client_of(host)
        body = "\n---\n".join(json.dumps({"task": _TASK}) for _ in range(tasks)).encode()
        started = time.perf_counter()
        client.post("/tasks", body, "application/yaml")
        until(lambda: client.get("/queue/status")["tasks"]["completed"] == tasks)
        return tasks / (time.perf_counter() - started)


def through_plane_per_s(directory: Path, tasks: int, at_once: int) -> float:
    """Tasks a second with claim, start and completion over HTTP, from the submission to the plane's last result."""
    with control_plane(directory) as plane, agent(directory, {**plane.enrol(directory), **_sections(at_once)}):
        body = json.dumps([_TASK] * tasks).encode()
        started = time.perf_counter()
        plane.call("POST", "/tasks", body)
        until(lambda: plane.call("GET", "/stats")["tasks"].get("completed") == tasks)
        return tasks / (time.perf_counter() - started)


def local_starts_s(directory: Path, tasks: int) -> list[float]:
    """Seconds from before the request to the start of the process, for single tasks on an idle stand-alone agent."""
    with agent(directory, _sections(1)) as host:
        client = client_of(host)
        found = []
        for _ in range(tasks):
            before_ns = time.time_ns()
            [task_id] = client.post("/tasks", json.dumps({"task": _TASK}).encode())["task_ids"]
            ended = client.get(f"/tasks/{task_id}", (("wait", 60),), wait_s=60)
            found.append((_started_wall_ns(host, ended["attempt_id"]) - before_ns) / 1e9)
        return found


def through_plane_starts_s(directory: Path, tasks: int) -> list[float]:
    """As `local_starts_s`, from before the request to the plane, whose long poll the agent waits in."""
    with control_plane(directory) as plane, agent(directory, {**plane.enrol(directory), **_sections(1)}) as host:
        client = client_of(host)
        until(lambda: client.get("/queue/status")["control_plane"]["is_registered"])
        found = []
        for _ in range(tasks):
            before_ns = time.time_ns()
            [task_id] = plane.call("POST", "/tasks", json.dumps(_TASK).encode())["task_ids"]
            attempt_id = _ended_attempt(plane, task_id)
            found.append((_started_wall_ns(host, attempt_id) - before_ns) / 1e9)
        return found


def idle_memory_mb(directory: Path) -> float:
    """Resident memory (MiB) of an idle stand-alone agent with its spawner: what of it is nobody else's (USS)."""
    with agent(directory, _sections(1)) as host:
        process = psutil.Process(host.pid)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_full_info().uss for member in family) / (1 << 20)


def _sections(at_once: int) -> dict[str, Any]:
    return {"capacity": {"max_concurrent": at_once}, "log": {"level": "warning"}}


def client_of(host: Agent) -> Client:
    """A client of the agent's API."""
    return Client([Endpoint("benchmark", socket=str(host.socket))])


def _ended_attempt(plane: Plane, task_id: str) -> str:
    found: dict[str, Any] = {}

    def has_ended() -> bool:
        found.update(plane.call("GET", f"/tasks/{task_id}"))
        return bool(found["status"] == "completed")

    until(has_ended)
    return str(found["attempt_id"])


def _started_wall_ns(host: Agent, attempt_id: str) -> int:
    lines, complaints = record.read(host.state_dir / "attempts" / f"{attempt_id}.1" / record.FILE_NAME)
    started = lines["started"]["started_wall_ns"]
    if complaints or not isinstance(started, int):
        raise ValueError(f"the record of {attempt_id} cannot be read: {complaints}")
    return started


def until(condition: Callable[[], bool]) -> None:
    """Return as soon as it is so. Raises TimeoutError."""
    give_up_at = time.monotonic() + _TIMEOUT_S
    while not condition():
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"not done within {_TIMEOUT_S:g} s")
        time.sleep(_LOOK_AGAIN_S)
