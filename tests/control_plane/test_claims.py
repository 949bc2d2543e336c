"""Claims: who gets what, once, and long polls."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

import aiohttp
import pytest

from control_plane import Plane, faults
from control_plane.bell import Bell
from control_plane.store.claims import ClaimOrder
from remotegpu_schemas.wire import Claim, parse_claims
from tests.control_plane.support import DEADLINE_S, MACHINE, Agent, Operator

MakeAgent = Callable[[str, str], Awaitable[Agent]]


async def test_claimed_task_reads_as_the_submitted_one(agent: Agent, operator: Operator) -> None:
    """The agent's own reading of the answer gives the task, its attempt and its lease."""
    submitted = {
        "id": "t1",
        "name": "n",
        "command": "echo",
        "args": ["a b"],
        "env": {"A": "1"},
        "timeout": 5,
        "max_retries": 2,
    }
    await operator.submit(submitted)
    [claim] = parse_claims((await agent.claim()).data)
    assert isinstance(claim, Claim)
    assert claim.task.command == "echo"
    assert claim.task.args == ("a b",)
    assert claim.task.env == {"A": "1"}
    assert claim.task.retry.max == 2
    assert claim.machine_id == MACHINE
    assert (claim.lease_ttl_s, claim.renew_interval_s) == (60.0, 20.0)


async def test_task_names_its_own_lease(agent: Agent, operator: Operator) -> None:
    """`lease_ttl_sec` of a task goes before the plane's default."""
    await operator.submit({"command": "true", "lease_ttl_sec": 7})
    assert (await agent.claim_one())["lease_ttl_sec"] == 7


async def test_repeated_request_gets_the_same_tasks(agent: Agent, operator: Operator) -> None:
    """A lost answer costs nothing: the same request id gives the same attempts, and no further task."""
    await operator.submit(*[{"command": "true"}] * 5)
    first = (await agent.claim(limit=2, request_id="r1")).data["tasks"]
    second = (await agent.claim(limit=2, request_id="r1")).data["tasks"]
    assert second == first
    assert len(first) == 2
    assert (await operator.call("GET", "/stats")).data["tasks"]["assigned"] == 2


async def test_repeat_leaves_out_what_has_ended(agent: Agent, operator: Operator) -> None:
    """An attempt that is over is not given again, and its request id is spent."""
    await operator.submit(*[{"command": "true"}] * 3)
    first, second = (await agent.claim(limit=2, request_id="r1")).data["tasks"]
    await agent.complete(first)
    assert (await agent.claim(limit=2, request_id="r1")).data["tasks"] == [second]
    await agent.complete(second)
    assert (await agent.claim(limit=2, request_id="r1")).data["tasks"] == []


async def test_request_ids_belong_to_an_agent(agent: Agent, operator: Operator, make_agent: MakeAgent) -> None:
    """Two agents may choose the same request id."""
    other = await make_agent("agent-2", "machine-2")
    await operator.submit(*[{"command": "true"}] * 2)
    mine = await agent.claim_one(request_id="r1")
    assert (await other.claim_one(request_id="r1"))["id"] != mine["id"]


async def test_lost_answer_is_repeated(agent: Agent, operator: Operator, plane: Plane) -> None:
    """The connection breaks after the claim was made: the repeat gives the task, under the same attempt."""
    [task_id] = await operator.submit()
    plane.faults.order("claim", faults.DropAfter())
    with pytest.raises(aiohttp.ClientConnectionError):
        await agent.claim(request_id="r1")
    task = await agent.claim_one(request_id="r1")
    assert task["id"] == task_id
    assert len((await operator.task(task_id))["attempt_list"]) == 1


async def test_order_is_priority_then_age(agent: Agent, operator: Operator) -> None:
    """The most urgent first, and among equals the oldest, whether pinned to the machine or not."""
    await operator.submit(
        {"id": "old", "command": "true"},
        {"id": "pinned", "command": "true", "machine_id": MACHINE},
        {"id": "late", "command": "true", "priority": 9},
        {"id": "urgent", "command": "true", "priority": 1},
    )
    tasks = (await agent.claim(limit=4)).data["tasks"]
    assert [task["id"] for task in tasks] == ["urgent", "old", "pinned", "late"]


async def test_task_of_another_machine_stays_there(agent: Agent, operator: Operator, make_agent: MakeAgent) -> None:
    """A pinned task goes to its machine only."""
    other = await make_agent("agent-2", "machine-2")
    await operator.submit({"id": "pinned", "command": "true", "machine_id": "machine-2"})
    assert (await agent.claim()).data["tasks"] == []
    assert (await other.claim_one())["id"] == "pinned"


@pytest.mark.parametrize(
    ("more", "count"),
    [({"limit": 3}, 3), ({"limit": 5, "capacity": {"slots": 2}}, 2), ({"limit": 5, "capacity": {"slots": 0}}, 0)],
)
async def test_no_more_than_there_is_room_for(
    agent: Agent, operator: Operator, more: dict[str, object], count: int
) -> None:
    """The limit and the free slots both bound an answer."""
    await operator.submit(*[{"command": "true"}] * 8)
    assert len((await agent.claim(**more)).data["tasks"]) == count


async def test_nothing_is_given_twice(agent: Agent, operator: Operator) -> None:
    """Claims that come at once share the tasks out."""
    ids = await operator.submit(*[{"command": "true"}] * 40)
    answers = await asyncio.gather(*(agent.claim(limit=3) for _ in range(20)))
    given = [task["id"] for answer in answers for task in answer.data["tasks"]]
    assert sorted(given) == sorted(ids)


async def test_long_poll_wakes_for_a_new_task(agent: Agent, operator: Operator, held: asyncio.Event) -> None:
    """A held claim is answered when a task comes."""
    poll = asyncio.create_task(agent.claim(wait_sec=DEADLINE_S))
    await asyncio.wait_for(held.wait(), DEADLINE_S)
    [task_id] = await operator.submit()
    async with asyncio.timeout(DEADLINE_S / 2):
        [task] = (await poll).data["tasks"]
    assert task["id"] == task_id


async def test_long_poll_ends_in_time(agent: Agent) -> None:
    """Without news the answer is empty after `wait_sec`."""
    async with asyncio.timeout(DEADLINE_S):
        assert (await agent.claim(wait_sec=0.05)).data == {"tasks": []}


async def test_long_poll_of_a_dead_agent_takes_nothing(agent: Agent, operator: Operator, held: asyncio.Event) -> None:
    """A task that comes after the caller has gone is there for the next claim."""
    poll = asyncio.create_task(agent.claim(wait_sec=DEADLINE_S))
    await asyncio.wait_for(held.wait(), DEADLINE_S)
    poll.cancel()
    await asyncio.gather(poll, return_exceptions=True)
    await operator.call("GET", "/stats")  # the plane has read the end of the connection by now
    [task_id] = await operator.submit()
    assert (await agent.claim_one())["id"] == task_id
    assert len((await operator.task(task_id))["attempt_list"]) == 1


async def test_stopping_plane_lets_its_polls_go(agent: Agent, plane: Plane) -> None:
    """A stop does not wait for long polls."""
    poll = asyncio.create_task(agent.claim(wait_sec=300))
    await plane.faults.wait_calls("claim", 1, DEADLINE_S)
    async with asyncio.timeout(DEADLINE_S / 2):
        await plane.stop()
        assert (await poll).data == {"tasks": []}


async def test_claim_tells_of_tasks_that_it_let_go(agent: Agent, operator: Operator, plane: Plane) -> None:
    """A claim that had to lock more than it took wakes those who looked meanwhile."""
    await operator.submit({"command": "true"}, {"command": "true", "machine_id": agent.machine_id})
    order = ClaimOrder(machine_id=agent.machine_id, agent_id=agent.agent_id, request_id="r1", limit=1)
    heard: list[Bell] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bell, "ring", lambda bell: heard.append(bell))  # noqa: PLW0108  # a method
        assert len(await plane.service.claim(order, 0, lambda: False)) == 1
        assert len(heard) == 1
        assert len(await plane.service.claim(dataclasses.replace(order, request_id="r2"), 0, lambda: False)) == 1
        assert len(heard) == 1
