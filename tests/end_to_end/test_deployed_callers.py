"""What deployed control planes call on a host: `/system/info` and `/process/stop`, over TCP and without a token."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil
import pytest

from remotegpu_schemas.errors import Code
from tests.end_to_end.agent_process import AgentProcess, agent
from tests.end_to_end.gates import Gate
from tests.waiting import until_so

CALLERS: Final = [{"network": "127.0.0.0/8", "allow": ["system_info", "process_stop"]}]
CALLER_PATIENCE_S: Final = 10.0
"""After so long a deployed plane gives a call up."""


@pytest.fixture
async def host(tmp_path: Path) -> AsyncGenerator[AgentProcess]:
    """An agent that serves deployed planes."""
    async with agent(tmp_path, api={"listen": "127.0.0.1:0", "legacy_callers": CALLERS}) as running:
        yield running


@pytest.fixture
def stranger() -> Generator[subprocess.Popen[bytes]]:
    """A live process that is no task."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def call_now(host: AgentProcess, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """One call as a deployed plane makes it: no token, no content type; status and body."""
    url = json.loads((host.state_dir / "endpoints.json").read_bytes())["url"]
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=CALLER_PATIENCE_S)
    with contextlib.closing(connection):
        connection.request(method, f"/api/v1{path}", None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


async def call(host: AgentProcess, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """As `call_now`, beside the test."""
    return await asyncio.to_thread(call_now, host, method, path, body)


async def stop(host: AgentProcess, process_id: object, **more: Any) -> tuple[int, Any]:
    """POST /process/stop with the host id that deployed planes send along."""
    return await call(host, "POST", "/process/stop", {"process_id": process_id, "host_id": 7, **more})


async def running_tree(host: AgentProcess, directory: Path, *, prepare: str = "", **task: Any) -> tuple[str, list[int]]:
    """A task that runs, with a child and a grandchild in a session of its own; its pids, the main one first."""
    pids = directory / "pids"
    script = (
        f"{prepare}\n(setsid sh -c 'echo $$ >>{pids}; exec sleep 600' &) ; echo $$ >>{pids}; sleep 600 & wait; wait"
    )
    task_id = await host.submit(script=script, **task)
    main = (await host.wait_running(task_id))["process_id"]
    await until_so(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    children = [child.pid for child in psutil.Process(main).children(recursive=True)]
    return task_id, [main, *{*children, *map(int, pids.read_text().split())} - {main}]


def are_gone(pids: list[int]) -> bool:
    """Whether none of them is left, not even as a zombie that somebody still has to wait for."""
    return not any(psutil.pid_exists(pid) for pid in pids)


async def test_system_info_is_flat_and_has_no_zero(host: AgentProcess) -> None:
    """The figures stand at the top level; a zero of CPU, memory or disk would count as "not collected" there."""
    status, info = await call(host, "GET", "/system/info")
    assert status == 200
    assert not {"code", "data", "success"} & info.keys()
    for name in ("cpu_cores", "memory_total", "memory_free", "disk_total", "disk_free"):
        assert isinstance(info[name], int)
        assert info[name] > 0, name
    assert info["hostname"]
    assert info["gpu_count"] == len(info["gpu_info"])


async def test_stopping_a_process_ends_its_whole_tree(host: AgentProcess, tmp_path: Path) -> None:
    """The answer says `stopped` once the tree is gone, a grandchild in another session too; the task is cancelled."""
    task_id, pids = await running_tree(host, tmp_path)
    assert len(pids) >= 3
    started = time.monotonic()
    status, body = await stop(host, pids[0])
    assert time.monotonic() - started < 8
    assert (status, body["code"], body["data"]["state"]) == (200, 0, "stopped")
    assert (body["data"]["task_id"], body["data"]["cause"], body["data"]["exit_code"]) == (task_id, "stopped", 143)
    assert are_gone(pids)
    detail = await host.wait_for(task_id)
    assert (detail["state"], detail["cause"], detail["exit_code"]) == ("cancelled", "stopped", 143)


async def test_the_pid_of_a_child_stops_its_run(host: AgentProcess, tmp_path: Path) -> None:
    """Any living member of the tree stands for the run."""
    task_id, pids = await running_tree(host, tmp_path)
    status, body = await stop(host, pids[-1], signal="SIGTERM")
    assert (status, body["data"]["state"], body["data"]["task_id"]) == (200, "stopped", task_id)
    assert are_gone(pids)


async def test_a_task_that_takes_its_time_is_answered_in_time_and_sigkill_ends_it(
    host: AgentProcess, tmp_path: Path
) -> None:
    """A long grace period: `stopping` after 8 s, before the caller gives up; SIGKILL then ends the tree at once."""
    task_id, pids = await running_tree(host, tmp_path, prepare="trap '' TERM", grace_period="600s")
    started = time.monotonic()
    status, body = await stop(host, pids[0])
    assert 7.5 < time.monotonic() - started < 9.5
    assert (status, body["data"]["state"], body["data"]["cause"]) == (200, "stopping", None)
    assert (await host.get(f"/tasks/{task_id}"))["is_stopping"] is True
    assert psutil.pid_exists(pids[0])
    status, body = await stop(host, pids[0], signal="SIGKILL")
    assert (status, body["data"]["state"]) == (200, "stopped")
    assert time.monotonic() - started < 12
    assert are_gone(pids)
    assert (await host.wait_for(task_id))["cause"] == "stopped"


async def test_f32_what_is_no_run_of_this_agent_is_never_signalled(
    host: AgentProcess, tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    """F32: unknown, foreign, finished, pid 1, the agent itself, the shim, and what is no pid: a code each."""
    finished = await host.submit(command="true")
    finished_pid = (await host.wait_for(finished))["runs"][0]["process_id"]
    gate = Gate(tmp_path / "gate")
    running = await host.submit(command=gate.wait)
    main = (await host.wait_running(running))["process_id"]
    shim = psutil.Process(main).ppid()
    unknown = int(Path("/proc/sys/kernel/pid_max").read_text()) - 1
    assert not psutil.pid_exists(unknown)
    expected = {
        unknown: (404, Code.PROCESS_NOT_MANAGED),
        stranger.pid: (404, Code.PROCESS_NOT_MANAGED),
        os.getpid(): (404, Code.PROCESS_NOT_MANAGED),
        shim: (404, Code.PROCESS_NOT_MANAGED),
        finished_pid: (410, Code.PROCESS_GONE),
        1: (404, Code.PROCESS_NOT_MANAGED),
        host.pid: (404, Code.PROCESS_NOT_MANAGED),
    }
    unfit: list[object] = [0, -1, -main, "1", str(main), main + 0.5, float(main), 2**31, 2**63, 10**30, True, None, []]
    for signal in ("SIGTERM", "SIGKILL"):
        for pid, (status, code) in expected.items():
            answer = await stop(host, pid, signal=signal)
            assert (answer[0], answer[1]["code"]) == (status, code), (pid, answer)
            assert answer[1]["success"] is False
        for value in unfit:
            answer = await stop(host, value, signal=signal)
            assert (answer[0], answer[1]["code"]) == (400, Code.INVALID_PARAMETERS), (value, answer)
    answer = await stop(host, main, signal="SIGSTOP")
    assert (answer[0], answer[1]["code"]) == (400, Code.INVALID_PARAMETERS)
    assert stranger.poll() is None
    assert host.is_running
    assert psutil.Process(main).is_running()
    assert (await host.get(f"/tasks/{running}"))["is_stopping"] is False
    gate.open()
    assert (await host.wait_for(running))["cause"] == "succeeded"


async def test_a_deployed_caller_may_do_nothing_else(host: AgentProcess) -> None:
    """The list names two calls; every other one still needs a token."""
    for method, path in (("GET", "/tasks"), ("POST", "/tasks"), ("GET", "/queue/status")):
        status, body = await call(host, method, path, {} if method == "POST" else None)
        assert (status, body["code"]) == (401, Code.UNAUTHORIZED), path


async def test_nobody_without_a_token_unless_they_are_listed(tmp_path: Path, stranger: subprocess.Popen[bytes]) -> None:
    """`legacy_callers` is empty by default: both calls are refused with 401 and 30016, and nothing is signalled."""
    async with agent(tmp_path, api={"listen": "127.0.0.1:0"}) as host:
        gate = Gate(tmp_path / "gate")
        task_id = await host.submit(command=gate.wait)
        main = (await host.wait_running(task_id))["process_id"]
        for pid in (main, stranger.pid, host.pid, 1, -1):
            status, body = await stop(host, pid)
            assert (status, body["code"], body["data"]) == (401, 30016, None)
        status, body = await call(host, "GET", "/system/info")
        assert (status, body["code"], body["data"]) == (401, 30016, None)
        gate.open()
        assert (await host.wait_for(task_id))["cause"] == "succeeded"
        assert stranger.poll() is None


async def test_a_network_that_is_not_the_callers_lets_nobody_in(tmp_path: Path) -> None:
    """The list is of networks: another one than the caller's own changes nothing."""
    others = [{"network": "10.0.0.0/8", "allow": ["system_info", "process_stop"]}]
    async with agent(tmp_path, api={"listen": "127.0.0.1:0", "legacy_callers": others}) as host:
        status, body = await call(host, "GET", "/system/info")
        assert (status, body["code"]) == (401, Code.UNAUTHORIZED)


async def test_every_use_is_audited(host: AgentProcess) -> None:
    """A call without a token leaves a line with the network that let it in, and what came of it."""
    await call(host, "GET", "/system/info")
    await stop(host, 1)
    lines = "".join(file.read_text() for file in (host.state_dir / "audit").iterdir()).splitlines()
    entries = [json.loads(line) for line in lines]
    assert [(entry["who"], entry["from"]) for entry in entries] == [("legacy:127.0.0.0/8", "127.0.0.1")] * 2
    assert entries[1]["detail"]["process_id"] == 1
