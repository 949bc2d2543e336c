"""The faults that tests order do what their names say, and only to the call that they name."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from control_plane import Plane, faults
from tests.control_plane.support import DEADLINE_S, Agent, Operator


@pytest.mark.parametrize(("fault", "starts"), [(faults.DropBefore(), 0), (faults.DropAfter(), 1)])
async def test_dropped_connection(
    agent: Agent, operator: Operator, plane: Plane, fault: faults.Fault, starts: int
) -> None:
    """The caller gets no answer; whether the call was obeyed is what the two differ in."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    plane.faults.order("start", fault)
    with pytest.raises(aiohttp.ClientConnectionError):
        await agent.start(task)
    assert (await operator.events(task_id)).count("started") == starts
    assert (await agent.start(task)).code == 0
    assert plane.faults.calls["start"] == 2


async def test_answer_instead(agent: Agent, plane: Plane) -> None:
    """Status, headers and body are the fault's; the row is met in order, then it is over."""
    plane.faults.order(
        "heartbeat", faults.Respond(503, b"busy", {"Retry-After": "7"}), faults.Respond(200, b"\x00garbage")
    )
    first, second, third = [await agent.heartbeat() for _ in range(3)]
    assert (first.status, first.text, first.headers["Retry-After"]) == (503, "busy", "7")
    assert second.text == "\x00garbage"
    assert third.code == 0


async def test_lasting_fault(agent: Agent, plane: Plane) -> None:
    """Every call meets it until it is cleared; other calls do not."""
    plane.faults.order_always("heartbeat", faults.Respond(500))
    assert [(await agent.heartbeat()).status for _ in range(3)] == [500, 500, 500]
    assert (await agent.register()).code == 0
    plane.faults.clear("heartbeat")
    assert (await agent.heartbeat()).code == 0


@pytest.mark.parametrize("how", ["release", "clear", "stop"])
async def test_held_call(agent: Agent, plane: Plane, how: str) -> None:
    """It waits until it is let go, by itself, with all others, or because the plane stops."""
    hold = faults.Hold()
    plane.faults.order("register", hold)
    call = asyncio.create_task(agent.register())
    async with asyncio.timeout(DEADLINE_S):
        await hold.reached.wait()
        assert not call.done()
        match how:
            case "release":
                hold.release.set()
            case "clear":
                plane.faults.clear()
            case _:
                await plane.stop()
        assert (await call).code == 0


async def test_delayed_call(agent: Agent, plane: Plane) -> None:
    """It is handled after the delay."""
    plane.faults.order("register", faults.Delay(0.05))
    began = asyncio.get_running_loop().time()
    assert (await agent.register()).code == 0
    assert asyncio.get_running_loop().time() - began >= 0.05


async def test_dropped_connections_are_quiet(agent: Agent, plane: Plane, caplog: pytest.LogCaptureFixture) -> None:
    """They are no errors of the plane's."""
    plane.faults.order("register", faults.DropBefore(), faults.DropAfter())
    for _ in range(2):
        with pytest.raises(aiohttp.ClientConnectionError):
            await agent.register()
    assert [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}] == []
