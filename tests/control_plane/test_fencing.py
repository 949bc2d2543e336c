"""Who may speak for a task: by attempt, by agent, by lease; and what the others hear."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from control_plane import Plane, Settings
from tests.control_plane.support import DEADLINE_S, Agent, MovableClock, Operator

MakeAgent = Callable[[str, str], Awaitable[Agent]]
CALLS = ["start", "lease/renew", "progress", "complete", "release"]
BODIES: dict[str, dict[str, Any]] = {
    "lease/renew": {"extend_sec": 60},
    "progress": {"percent": 10, "message": ""},
    "complete": {"exit_code": 0},
    "release": {"reason": "no room"},
}


async def call(agent: Agent, kind: str, task: dict[str, Any]) -> tuple[int, int]:
    """HTTP status and code of a call about a task."""
    answer = await agent.about(kind, task, **BODIES.get(kind, {}))
    return answer.status, answer.code


async def lapse(agent: Agent, plane: Plane, clock: MovableClock) -> dict[str, Any]:
    """The next attempt of the one task there is, after the present one has lapsed."""
    clock.time_s += 61
    plane.clock_moved()
    return await agent.claim_one(wait_sec=DEADLINE_S)


@pytest.mark.parametrize("kind", CALLS)
async def test_unknown_task(agent: Agent, kind: str) -> None:
    """30004."""
    assert await call(agent, kind, {"id": "nobody", "attempt_id": "a"}) == (404, 30004)


@pytest.mark.parametrize("kind", CALLS)
async def test_unknown_attempt(agent: Agent, operator: Operator, kind: str) -> None:
    """30001 for an attempt that this task never had."""
    await operator.submit()
    task = await agent.claim_one()
    assert await call(agent, kind, task | {"attempt_id": "made-up"}) == (409, 30001)


@pytest.mark.parametrize("kind", CALLS)
async def test_attempt_of_another_agent(agent: Agent, operator: Operator, make_agent: MakeAgent, kind: str) -> None:
    """30001 for another machine that knows the attempt's id, and for another agent on the same machine."""
    await operator.submit()
    task = await agent.claim_one()
    other = await make_agent("agent-2", "machine-2")
    assert await call(other, kind, task) == (409, 30001)
    assert await call(dataclasses.replace(agent, agent_id="agent-3"), kind, task) == (409, 30001)
    # the other machine's token does not speak for this agent, whatever it calls itself
    assert await call(dataclasses.replace(other, agent_id=agent.agent_id), kind, task) == (409, 30001)


@pytest.mark.parametrize("kind", CALLS)
async def test_superseded_attempt(
    agent: Agent, operator: Operator, plane: Plane, clock: MovableClock, kind: str
) -> None:
    """30001 once the task has a newer attempt, which goes on untouched."""
    await operator.submit()
    old = await agent.claim_one()
    new = await lapse(agent, plane, clock)
    assert new["id"] == old["id"]
    assert new["attempt_id"] != old["attempt_id"]
    assert await call(agent, kind, old) == (409, 30001)
    assert (await agent.complete(new)).code == 0


@pytest.mark.parametrize("kind", CALLS)
async def test_superseded_attempt_of_a_finished_task(
    agent: Agent, operator: Operator, plane: Plane, clock: MovableClock, kind: str
) -> None:
    """30002 once a newer attempt has finished the task; the result stays that one's."""
    [task_id] = await operator.submit()
    old = await agent.claim_one()
    await agent.complete(await lapse(agent, plane, clock), stdout="the newer one's")
    assert await call(agent, kind, old) == (409, 30002)
    assert (await operator.task(task_id))["result"]["stdout"] == "the newer one's"


@pytest.mark.parametrize("kind", ["start", "lease/renew", "progress", "release"])
async def test_finished_task(agent: Agent, operator: Operator, kind: str) -> None:
    """30002 for whatever comes after the completion."""
    await operator.submit()
    task = await agent.claim_one()
    await agent.complete(task)
    assert await call(agent, kind, task) == (409, 30002)


@pytest.mark.parametrize("is_reaped", [False, True])
@pytest.mark.parametrize("kind", ["start", "lease/renew", "progress", "release"])
async def test_expired_lease(
    agent: Agent, operator: Operator, plane: Plane, clock: MovableClock, kind: str, is_reaped: bool
) -> None:
    """30003 from the moment that the lease ends, whether the reaper has seen it or not."""
    await operator.submit()
    task = await agent.claim_one()
    clock.time_s += 60
    if is_reaped:
        plane.clock_moved()
    assert await call(agent, kind, task) == (410, 30003)


async def test_renewed_lease_holds(agent: Agent, operator: Operator, plane: Plane, clock: MovableClock) -> None:
    """A renewal counts from its own moment, before and after the start."""
    await operator.submit()
    task = await agent.claim_one()
    clock.time_s += 59
    assert (await agent.renew(task)).data["lease_expires_at"] == "2026-02-02T02:41:59.000Z"
    clock.time_s += 59
    assert (await agent.start(task)).code == 0
    assert (await agent.renew(task)).code == 0
    clock.time_s += 59
    plane.clock_moved()
    assert (await agent.complete(task)).code == 0


async def test_renewal_never_shortens(agent: Agent, operator: Operator, clock: MovableClock) -> None:
    """A short extension leaves a longer lease as it is."""
    await operator.submit()
    task = await agent.claim_one()
    assert (await agent.renew(task, 1)).data["lease_expires_at"] == task["lease_expires_at"]


async def test_rejected_calls_are_on_record(agent: Agent, operator: Operator) -> None:
    """Each is counted and told in the task's history; so are rejected completions."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    await agent.complete(task)
    await agent.renew(task)
    await agent.complete(task | {"attempt_id": "made-up"})
    found = await operator.task(task_id)
    assert (found["rejections"], found["completions"]["rejected"]) == (2, 1)
    assert [event["detail"][:15] for event in found["events"] if event["kind"] == "rejected"] == [
        "renew: 30002 ta",
        "complete: 30002",
    ]


async def test_late_result_counts_while_nobody_else_has_the_task(
    agent: Agent, operator: Operator, plane: Plane, clock: MovableClock
) -> None:
    """F11: what finished in time is delivered after the lease, and the task is not given out again."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    clock.time_s += 3600
    plane.clock_moved()
    assert (await agent.complete(task)).data["status"] == "completed"
    assert (await agent.claim()).data["tasks"] == []
    assert (await operator.task(task_id))["completions"] == {"accepted": 1, "repeated": 0, "rejected": 0}


@pytest.fixture
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    """As always, but for the tests that are marked."""
    marker = request.node.get_closest_marker("usefixtures")
    return dataclasses.replace(settings, accepts_late_results="no_late_results" not in (marker.args if marker else ()))


@pytest.fixture
def no_late_results() -> None:
    """Marks tests whose plane takes no late result."""


@pytest.mark.usefixtures("no_late_results")
async def test_late_result_can_be_refused(agent: Agent, operator: Operator, clock: MovableClock) -> None:
    """30003, if the plane is set so."""
    await operator.submit()
    task = await agent.claim_one()
    clock.time_s += 60
    answer = await agent.complete(task)
    assert (answer.status, answer.code) == (410, 30003)


@pytest.mark.parametrize("is_late", [False, True])
async def test_lost_lease_is_no_result(
    agent: Agent, operator: Operator, plane: Plane, clock: MovableClock, is_late: bool
) -> None:
    """A completion that says `lease_lost` ends the attempt; the task goes to the next one."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    if is_late:
        clock.time_s += 61
        plane.clock_moved()
    lost = {"exit_code": 125, "status": "failed", "cause": "lease_lost", "error": "the lease ended"}
    for _ in range(2):
        assert (await agent.complete(task, **lost)).data["status"] == "pending"
    assert (await agent.claim_one(wait_sec=DEADLINE_S))["id"] == task_id
    found = await operator.task(task_id)
    assert found["completions"]["accepted"] == 0
    assert [event["kind"] for event in found["events"]].count("given_up") == 1
