"""The reaper: what happens to tasks whose lease ends, and over restarts of the plane."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import aiohttp
import pytest

from control_plane import Plane, Settings, serve
from tests.control_plane.support import DEADLINE_S, Agent, MovableClock, Operator


async def test_expired_lease_makes_a_new_attempt(
    agent: Agent, operator: Operator, plane: Plane, clock: MovableClock
) -> None:
    """A started task whose agent falls silent goes to the next claim, under another attempt."""
    [task_id] = await operator.submit()
    first = await agent.claim_one()
    await agent.start(first)
    clock.time_s += 60
    plane.clock_moved()
    second = await agent.claim_one(wait_sec=DEADLINE_S)
    assert second["attempt_id"] != first["attempt_id"]
    found = await operator.task(task_id)
    assert [attempt["state"] for attempt in found["attempt_list"]] == ["lapsed", "claimed"]
    assert [event["kind"] for event in found["events"]] == ["created", "claimed", "started", "lapsed", "claimed"]


async def test_lease_ends_by_itself(settings: Settings, session: aiohttp.ClientSession) -> None:
    """On the real clock the reaper acts at the lease's end without anything else happening."""
    real = dataclasses.replace(settings, lease_ttl_s=0.2, now=time.time)
    async with serve(real) as plane:
        operator = Operator(plane, session)
        agent = Agent(plane, session, await operator.enrol())
        [task_id] = await operator.submit()
        first = await agent.claim_one()
        second = await agent.claim_one(wait_sec=DEADLINE_S)
        assert (first["id"], second["id"]) == (task_id, task_id)


async def test_shorter_lease_is_seen_in_time(settings: Settings, session: aiohttp.ClientSession) -> None:
    """A lease that ends before those that the reaper waits for is not late."""
    async with serve(dataclasses.replace(settings, now=time.time)) as plane:
        operator = Operator(plane, session)
        agent = Agent(plane, session, await operator.enrol())
        await operator.submit({"id": "long", "command": "true"})
        await agent.claim_one()
        await operator.submit({"id": "short", "command": "true", "lease_ttl_sec": 0.1})
        await agent.claim_one()
        assert (await agent.claim_one(wait_sec=DEADLINE_S))["id"] == "short"


async def test_attempts_are_bounded(agent: Agent, operator: Operator, plane: Plane, clock: MovableClock) -> None:
    """After ten lapses the task has failed, and says why."""
    [task_id] = await operator.submit()
    for _ in range(10):
        await agent.claim_one(wait_sec=DEADLINE_S)
        clock.time_s += 60
        plane.clock_moved()
    await plane.service.wait_ended([task_id], DEADLINE_S)
    found = await operator.task(task_id)
    assert (found["status"], found["lapses"]) == ("failed", 10)
    assert found["error"] == "lease_lost: 10 attempts ended without a result"


async def test_everything_is_there_after_a_restart(settings: Settings, session: aiohttp.ClientSession) -> None:
    """Tasks, tokens, attempts and request ids outlive the plane, on the same port."""
    plane = Plane(settings)
    await plane.start()
    operator, url = Operator(plane, session), plane.url
    agent = Agent(plane, session, await operator.enrol())
    await operator.submit({"id": "running", "command": "true"}, {"id": "waiting", "command": "true"})
    task = await agent.claim_one(request_id="r1")
    await agent.start(task)
    await plane.stop()
    await plane.start()
    assert plane.url == url
    assert (await agent.claim_one(request_id="r1"))["attempt_id"] == task["attempt_id"]
    assert (await agent.complete(task)).code == 0
    assert (await agent.claim_one())["id"] == "waiting"
    assert (await operator.call("GET", "/stats")).data["tasks"]["completed"] == 1
    await plane.stop()


@pytest.mark.parametrize(("restart_grace_s", "code"), [(None, 0), (0, 30003)])
async def test_leases_hold_over_a_downtime(
    settings: Settings,
    session: aiohttp.ClientSession,
    clock: MovableClock,
    restart_grace_s: float | None,
    code: int,
) -> None:
    """Nobody could renew while the plane was down: agents have a whole lease from its start, unless set otherwise."""
    plane = Plane(dataclasses.replace(settings, restart_grace_s=restart_grace_s))
    await plane.start()
    operator = Operator(plane, session)
    agent = Agent(plane, session, await operator.enrol())
    await operator.submit()
    task = await agent.claim_one()
    await plane.stop()
    clock.time_s += 3600
    await plane.start()
    clock.time_s += 59
    assert (await agent.renew(task)).code == code
    await plane.stop()


async def test_planes_do_not_disturb_each_other(
    settings: Settings,
    session: aiohttp.ClientSession,
    other_database: Path | str,
    agent: Agent,
    operator: Operator,
) -> None:
    """Several run in one process, each with its own database."""
    other_settings = dataclasses.replace(settings, database=other_database)
    async with serve(other_settings) as other:
        await operator.submit()
        stranger = Agent(other, session, agent.token)
        assert (await stranger.claim()).status == 401
        assert (await Operator(other, session).call("GET", "/stats")).data["tasks"]["pending"] == 0
