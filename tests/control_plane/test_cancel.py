"""Cancellation: at once where nobody has the task, else by asking its agent."""

from __future__ import annotations

from control_plane import Plane
from tests.control_plane.support import DEADLINE_S, Agent, MovableClock, Operator


async def test_waiting_task_is_cancelled_at_once(agent: Agent, operator: Operator) -> None:
    """Nobody claims it any more; a second time is the same."""
    [task_id] = await operator.submit()
    for _ in range(2):
        answer = await operator.call("POST", f"/tasks/{task_id}/cancel")
        assert answer.data == {"task_id": task_id, "status": "cancelled"}
    assert (await agent.claim()).data["tasks"] == []
    assert await operator.events(task_id) == ["created", "cancelled"]


async def test_agent_hears_of_it_in_both_places(agent: Agent, operator: Operator) -> None:
    """In the answers to renewals and to heartbeats, until the attempt is completed."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    await agent.start(task)
    assert (await agent.renew(task)).data["cancel_requested"] is False
    assert (await agent.heartbeat()).data == {"status": "ok", "cancelled": []}
    assert (await operator.call("POST", f"/tasks/{task_id}/cancel")).data["status"] == "running"
    assert (await agent.renew(task)).data["cancel_requested"] is True
    pair = {"task_id": task_id, "attempt_id": task["attempt_id"]}
    assert (await agent.heartbeat()).data["cancelled"] == [pair]
    ended = await agent.complete(task, exit_code=143, status="cancelled", cause="cancelled")
    assert ended.data["status"] == "cancelled"
    assert (await agent.heartbeat()).data["cancelled"] == []


async def test_silent_agents_task_is_cancelled_by_its_lease(
    agent: Agent, operator: Operator, plane: Plane, clock: MovableClock
) -> None:
    """It is not given to another attempt."""
    [task_id] = await operator.submit()
    await agent.claim_one()
    await operator.call("POST", f"/tasks/{task_id}/cancel")
    clock.time_s += 61
    plane.clock_moved()
    await plane.service.wait_ended([task_id], DEADLINE_S)
    assert (await operator.task(task_id))["status"] == "cancelled"
    assert (await agent.claim()).data["tasks"] == []


async def test_finished_task_stays_as_it_is(agent: Agent, operator: Operator) -> None:
    """30002."""
    [task_id] = await operator.submit()
    await agent.complete(await agent.claim_one())
    answer = await operator.call("POST", f"/tasks/{task_id}/cancel")
    assert (answer.status, answer.code) == (409, 30002)


async def test_unknown_task(operator: Operator) -> None:
    """30004."""
    assert (await operator.call("POST", "/tasks/nobody/cancel")).code == 30004
