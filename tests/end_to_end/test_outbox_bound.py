"""The outbox at its bound: the agent claims nothing more, and no result is dropped."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

import pytest

from control_plane.faults import DropBefore, Respond
from tests.end_to_end.fleet import Fleet, fleet
from tests.end_to_end.gates import Gate
from tests.waiting import DEADLINE_S

BOUND: Final = 5
_PROGRAM: Final = f"""
import runpy, sys
from remotegpu_schemas import limits

limits.OUTBOX_MAX_ROWS = {BOUND}
del sys.argv[:3]
runpy.run_module(sys.argv[0], None, "__main__", alter_sys=True)
"""
"""The agent with a small outbox; it must be set before anything else is imported."""


@pytest.fixture
async def small(tmp_path: Path) -> AsyncGenerator[Fleet]:
    """A plane, and a host with four slots and room for five reports."""
    polls = {"heartbeat_interval": 0.2, "long_poll": 0, "poll_interval": 0.1}
    async with fleet(tmp_path, {"control_plane": polls, "breaker": {"failures": 0}}, is_started=False) as all_of_it:
        all_of_it.host.launched_by = [sys.executable, "-c", _PROGRAM]
        await all_of_it.host.start()
        yield all_of_it


async def run_four(all_of_it: Fleet, gate: Gate) -> list[str]:
    """Four tasks that run side by side until the gate opens; then their ends are stored."""
    task_ids = await all_of_it.submit(*[{"command": f"{gate.wait}; echo out"}] * 4)
    for task_id in task_ids:
        await all_of_it.host.wait_running(task_id)
    gate.open()
    for task_id in task_ids:
        assert (await all_of_it.host.wait_for(task_id))["state"] == "completed"
    return task_ids


async def stands_still(all_of_it: Fleet) -> str:
    """A task that the plane still has after some heartbeats: not one claim was made meanwhile."""
    faults = all_of_it.plane.faults
    await faults.wait_calls("heartbeat", faults.calls["heartbeat"] + 2, DEADLINE_S)  # no claim is on its way now
    claims = faults.calls["claim"]
    [task_id] = await all_of_it.submit({"command": "true"})
    await faults.wait_calls("heartbeat", faults.calls["heartbeat"] + 3, DEADLINE_S)
    assert faults.calls["claim"] == claims
    assert (await all_of_it.operator.task(task_id))["status"] == "pending"
    return task_id


async def block_kinds(all_of_it: Fleet) -> list[str]:
    """Why nothing is claimed."""
    return [block["kind"] for block in (await all_of_it.host.get("/queue/status"))["blocks"]]


async def test_f16_a_full_outbox_stops_claims_and_drops_no_result(small: Fleet, tmp_path: Path) -> None:
    """F16: what runs is stored beyond the bound; claims stand still until results get through, and all have arrived."""
    faults = small.plane.faults
    faults.order_always("complete", DropBefore())
    task_ids = await run_four(small, Gate(tmp_path / "first"))
    task_ids += await run_four(small, Gate(tmp_path / "second"))
    status = await small.host.until_shown("/queue/status", lambda status: status["reports_waiting"] == 8)
    assert status["state"] == "degraded"
    assert [block["kind"] for block in status["blocks"]] == ["outbox_full"]
    assert status["reasons"][0] == "5 reports wait for the control plane: no more tasks are claimed"
    later = await stands_still(small)
    assert status["reasons"][0] in (await small.heartbeat())["reasons"]
    faults.clear()
    tasks = await small.ended([*task_ids, later])
    assert [(task["status"], task["completions"]["accepted"]) for task in tasks] == [("completed", 1)] * 9
    assert await block_kinds(small) == []


async def test_f16_an_outbox_full_of_dead_letters_has_room_once_they_are_dropped(small: Fleet, tmp_path: Path) -> None:
    """F16: an operator who drops what was refused for good need do nothing else for claims to go on."""
    refused = {"code": 30005, "message": "exit_code is missing", "data": None}
    answer = Respond(400, json.dumps(refused).encode(), {"Content-Type": "application/json"})
    small.plane.faults.order_always("complete", answer)
    await run_four(small, Gate(tmp_path / "first"))
    await run_four(small, Gate(tmp_path / "second"))
    await small.host.until_shown("/queue/status", lambda status: status["dead_letters"] == 8)
    assert await block_kinds(small) == ["outbox_full"]
    later = await stands_still(small)
    small.plane.faults.clear()
    for letter in (await small.host.get("/dead-letters"))["dead_letters"]:
        assert (await small.host.call("DELETE", f"/dead-letters/{letter['id']}"))[0] == 200
    assert (await small.ended([later]))[0]["status"] == "completed"


async def test_f16_an_agent_that_starts_with_a_full_outbox_claims_nothing(small: Fleet, tmp_path: Path) -> None:
    """F16: not one claim is made between the start and the first look at the outbox."""
    faults = small.plane.faults
    faults.order_always("complete", DropBefore())
    task_ids = await run_four(small, Gate(tmp_path / "first"))
    task_ids += await run_four(small, Gate(tmp_path / "second"))
    task_ids.append(await stands_still(small))
    claims = faults.calls["claim"]
    await small.host.kill()
    await small.host.start()
    await small.host.until_shown(
        "/queue/status", lambda status: [each["kind"] for each in status["blocks"]] == ["outbox_full"]
    )
    await faults.wait_calls("heartbeat", faults.calls["heartbeat"] + 3, DEADLINE_S)
    assert faults.calls["claim"] == claims
    faults.clear()
    assert [task["completions"]["accepted"] for task in await small.ended(task_ids)] == [1] * 9
