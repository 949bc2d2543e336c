"""Suspending and resuming through a real agent: what stands still, what survives, what is refused."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from remotegpu_sidecar import identity, record
from tests.end_to_end.agent_process import AgentProcess, agent
from tests.end_to_end.fleet import fleet
from tests.end_to_end.gates import Gate
from tests.waiting import until_so

SUSPENDED, CONFLICT = "suspended", 30020


@pytest.fixture
async def host(tmp_path: Path) -> AsyncGenerator[AgentProcess]:
    """A stand-alone agent with one slot."""
    async with agent(tmp_path, capacity={"max_concurrent": 1}) as running:
        yield running


def stands_still(host: AgentProcess) -> bool:
    """Whether the shim of the only run has proven that nothing of its tree moves, and has not let it go on since."""
    lines = record.read(next((host.state_dir / "attempts").iterdir()) / "record")[0]
    return "suspended" in lines and list(lines)[-1] != "resumed"


async def suspend(host: AgentProcess, task_id: str) -> dict[str, Any]:
    """Suspend a task, and wait until its processes stand still."""
    await host.wait_running(task_id)
    view: dict[str, Any] = await host.post(f"/tasks/{task_id}/suspend")
    assert view["state"] == SUSPENDED
    await until_so(lambda: stands_still(host))
    return view


async def test_a_suspended_task_stands_still_and_goes_on(host: AgentProcess, tmp_path: Path) -> None:
    """All its processes; it keeps its slot; when it goes on it ends as it would have."""
    gate = Gate(tmp_path / "gate")
    task_id = await host.submit(script=f"sleep 60 & {gate.wait}; kill $!; echo done; exit 3")
    await suspend(host, task_id)
    behind = await host.submit(command="true")
    gate.open()
    assert (await host.get(f"/tasks/{behind}"))["state"] == "pending"
    assert (await host.get(f"/tasks/{task_id}"))["runs"][0]["state"] == SUSPENDED
    assert (await host.post(f"/tasks/{task_id}/resume"))["state"] == "running"
    detail = await host.wait_for(task_id)
    assert (detail["cause"], detail["exit_code"]) == ("exit_code", 3)
    assert await host.output(task_id) == "done\n"
    assert (await host.wait_for(behind))["state"] == "completed"


async def test_a_suspended_task_survives_a_killed_agent(host: AgentProcess, tmp_path: Path) -> None:
    """It is adopted suspended, and can be resumed."""
    gate = Gate(tmp_path / "gate")
    task_id = await host.submit(script=f"{gate.wait}; exit 4")
    pid = (await suspend(host, task_id))["process_id"]
    await host.kill()
    gate.open()
    await host.start()
    after = await host.get(f"/tasks/{task_id}")
    assert (after["state"], after["process_id"], stands_still(host)) == (SUSPENDED, pid, True)
    await host.post(f"/tasks/{task_id}/resume")
    assert (await host.wait_for(task_id))["exit_code"] == 4


@pytest.mark.parametrize("is_stored", [True, False])
async def test_what_was_stored_counts_after_a_crash_in_between(
    host: AgentProcess, tmp_path: Path, is_stored: bool
) -> None:
    """Killed between the commit and the shim's being told (either way): the next agent brings both together."""
    gate = Gate(tmp_path / "gate")
    task_id = await host.submit(script=f"{gate.wait}; exit 4")
    await host.wait_running(task_id)
    if is_stored:
        await suspend(host, task_id)
    await host.kill()
    flag = next((host.state_dir / "attempts").iterdir()) / "suspend"
    if is_stored:
        flag.unlink()
    else:
        flag.touch()
    await host.start()
    assert (await host.get(f"/tasks/{task_id}"))["state"] == (SUSPENDED if is_stored else "running")
    assert flag.exists() == is_stored
    if is_stored:
        await until_so(lambda: stands_still(host))
        await host.post(f"/tasks/{task_id}/resume")
    gate.open()
    assert (await host.wait_for(task_id))["exit_code"] == 4


async def test_cancelling_a_suspended_task(host: AgentProcess) -> None:
    """It hears its stop signal, and tidies up."""
    script = "trap 'echo saved; exit 0' TERM; while :; do sleep 0.02; done"
    task_id = await host.submit(script=script, grace_period=50)
    await suspend(host, task_id)
    await host.post(f"/tasks/{task_id}/cancel")
    detail = await host.wait_for(task_id)
    assert (detail["state"], detail["cause"]) == ("cancelled", "cancelled")
    assert await host.output(task_id) == "saved\n"


async def test_wrong_states_are_conflicts(host: AgentProcess) -> None:
    """Waiting, running, suspended, ended: each call in the wrong one is 409 with 30020 and changes nothing."""

    async def is_refused(task_id: str, call: str) -> str:
        status, body = await host.call("POST", f"/tasks/{task_id}/{call}")
        assert (status, body["code"]) == (409, CONFLICT), body
        return str(body["message"])

    running = await host.submit(command="sleep 60")
    await host.wait_running(running)
    waiting = await host.submit(command="true")
    for call in ("suspend", "resume"):
        assert f"task {waiting} is pending" in await is_refused(waiting, call)
    assert "is running" in await is_refused(running, "resume")
    await suspend(host, running)
    assert "is suspended" in await is_refused(running, "suspend")
    await host.post(f"/tasks/{running}/cancel")
    await host.wait_for(running)
    for call in ("suspend", "resume"):
        assert "is cancelled" in await is_refused(running, call)
    status, body = await host.call("POST", "/tasks/none/suspend")
    assert (status, body["code"]) == (404, 30004)
    await host.wait_for(waiting)


async def test_the_command_line_suspends_and_resumes(host: AgentProcess) -> None:
    """`suspend`, `list`, `resume`, `cancel`, as a person types them."""

    async def said(*words: str) -> str:
        done = await asyncio.to_thread(
            subprocess.run, host.command(*words), capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    task_id = await host.submit(command="sleep 60")
    await host.wait_running(task_id)
    assert await said("suspend", task_id) == f"task {task_id} suspended\n"
    assert json.loads(await said("list", "--json", "--state", SUSPENDED))["total"] == 1
    assert SUSPENDED in await said("show", task_id)
    assert await said("resume", task_id) == f"task {task_id} running\n"
    await said("cancel", task_id)
    await host.wait_for(task_id)


async def test_the_lease_of_a_suspended_task_is_renewed(tmp_path: Path) -> None:
    """It outlives its first term under a real control plane, and its result arrives."""
    gate = Gate(tmp_path / "gate")
    async with fleet(tmp_path, lease_ttl_s=6.0) as both:
        task = {"command": f"{gate.wait}; exit 4", "max_retries": 0, "renew_interval_sec": 0.3}
        [task_id] = await both.submit(task)
        shown = await both.host.until_shown("/tasks", lambda page: bool(page["tasks"]))
        detail = await both.host.wait_running(shown["tasks"][0]["id"])
        directory = next((both.host.state_dir / "attempts").iterdir())
        first = (directory / "deadline").read_bytes()
        await suspend(both.host, detail["id"])
        await until_so(lambda: identity.boottime_ns() > int.from_bytes(first, "little"))
        assert (directory / "deadline").read_bytes() != first
        assert stands_still(both.host)
        gate.open()
        await both.host.post(f"/tasks/{detail['id']}/resume")
        [ended] = await both.ended([task_id])
        assert (ended["status"], ended["result"]["exit_code"]) == ("failed", 4)
