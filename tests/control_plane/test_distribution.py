"""Where tasks go: labels of machines, any machine with some, a copy to each, spread over them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.control_plane.support import DEADLINE_S, Agent, Answer, Operator

MakeAgent = Callable[[str, str], Awaitable[Agent]]


@pytest.fixture
async def fleet(make_agent: MakeAgent) -> dict[str, Agent]:
    """Three machines: two with A100s, one of them in Frankfurt."""
    agents = {machine_id: await make_agent(f"agent-of-{machine_id}", machine_id) for machine_id in ("m1", "m2", "m3")}
    await agents["m1"].register(labels={"gpu": "a100", "site": "fra"})
    await agents["m2"].register(labels={"gpu": "a100", "site": "ams"})
    await agents["m3"].register(labels={"gpu": "t4", "site": "fra"})
    return agents


async def send(operator: Operator, *tasks: dict[str, Any], **to: Any) -> Answer:
    """A submission with a destination."""
    return await operator.call("POST", "/tasks", json={"tasks": list(tasks) or [{"command": "true"}], "to": to})


async def machine_ids(operator: Operator, answer: Answer) -> list[str]:
    """The machines of the tasks of an answer, in its order."""
    return [(await operator.task(task_id))["machine_id"] for task_id in answer.data["task_ids"]]


async def test_machines_show_their_labels(fleet: dict[str, Agent], operator: Operator) -> None:
    """Those of the last registration; what is no label is left out, and nobody is refused for it."""
    assert (await fleet["m1"].register(labels={"gpu": "h100", "rank": 3, "x" * 300: "y", "nul": "\0"})).code == 0
    assert (await fleet["m2"].register(labels="none")).code == 0
    machines = (await operator.call("GET", "/machines")).data["machines"]
    assert {machine["machine_id"]: machine["labels"] for machine in machines} == {
        "m1": {"gpu": "h100"},
        "m2": {},
        "m3": {"gpu": "t4", "site": "fra"},
    }


async def test_any_machine_with_the_labels(fleet: dict[str, Agent], operator: Operator) -> None:
    """A machine that lacks one of them gets nothing; one that has all of them gets the task, under its own name."""
    [task_id] = (await send(operator, labels={"gpu": "a100", "site": "fra"})).data["task_ids"]
    shown = await operator.task(task_id)
    assert (shown["machine_id"], shown["machine_labels"]) == (None, {"gpu": "a100", "site": "fra"})
    assert (await fleet["m2"].claim()).data["tasks"] == []
    assert (await fleet["m3"].claim()).data["tasks"] == []
    assert (await fleet["m1"].claim_one())["machine_id"] == "m1"


async def test_labelled_tasks_keep_the_order(fleet: dict[str, Agent], operator: Operator) -> None:
    """Priority and age count over all kinds of destinations."""
    await operator.submit({"id": "late", "command": "true", "priority": 5})
    await send(operator, {"id": "urgent", "command": "true", "priority": 1}, labels={"gpu": "a100"})
    await send(operator, {"id": "middle", "command": "true", "priority": 3}, labels={"site": "fra"})
    claimed = (await fleet["m1"].claim(limit=3)).data["tasks"]
    assert [task["id"] for task in claimed] == ["urgent", "middle", "late"]


async def test_labelled_task_is_claimed_by_who_matches_then(fleet: dict[str, Agent], operator: Operator) -> None:
    """A machine that gets the label later is woken and gets the task."""
    await send(operator, labels={"site": "rome"})
    waiting = asyncio.create_task(fleet["m2"].claim(wait_sec=DEADLINE_S))
    await operator.plane.faults.wait_calls("claim", 1, DEADLINE_S)
    await fleet["m2"].register(labels={"site": "rome"})
    assert len((await waiting).data["tasks"]) == 1


async def test_labelled_task_comes_back(fleet: dict[str, Agent], operator: Operator) -> None:
    """Released, it goes to another machine with the labels."""
    [task_id] = (await send(operator, labels={"gpu": "a100"})).data["task_ids"]
    await fleet["m1"].about("release", await fleet["m1"].claim_one(), reason="no room")
    assert (await fleet["m3"].claim()).data["tasks"] == []
    assert (await fleet["m2"].claim_one())["id"] == task_id


async def test_broadcast(fleet: dict[str, Agent], operator: Operator) -> None:
    """One copy to each machine that has the labels, named after it."""
    answer = await send(operator, {"id": "update", "command": "true"}, mode="broadcast", labels={"gpu": "a100"})
    assert answer.data["task_ids"] == ["update.m1", "update.m2"]
    assert await machine_ids(operator, answer) == ["m1", "m2"]
    assert (await fleet["m2"].claim_one())["id"] == "update.m2"
    assert (await fleet["m3"].claim()).data["tasks"] == []


async def test_broadcast_to_named_machines(fleet: dict[str, Agent], operator: Operator) -> None:
    """Of the named ones those with the labels; without both it is every machine."""
    some = await send(operator, mode="broadcast", machine_ids=["m2", "m3"], labels={"gpu": "a100"})
    assert await machine_ids(operator, some) == ["m2"]
    assert await machine_ids(operator, await send(operator, mode="broadcast")) == sorted(fleet)


async def test_broadcast_copies_have_short_ids(operator: Operator) -> None:
    """An id that would be too long is shortened, and differs for each machine."""
    machines = [f"{'m' * 100}{number}" for number in range(2)]
    for machine_id in machines:
        await operator.enrol(machine_id)
    answer = await send(operator, {"id": "t" * 100, "command": "true"}, mode="broadcast")
    assert len(set(answer.data["task_ids"])) == 2
    assert max(len(task_id) for task_id in answer.data["task_ids"]) <= 128
    assert await machine_ids(operator, answer) == machines


@pytest.mark.usefixtures("fleet")
async def test_scatter_is_even(operator: Operator) -> None:
    """Seven tasks over three machines: two or three each, each task once."""
    answer = await send(operator, *[{"command": "true"}] * 7, mode="scatter")
    assert len(answer.data["task_ids"]) == 7
    assert sorted(Counter(await machine_ids(operator, answer)).values()) == [2, 2, 3]


@pytest.mark.usefixtures("fleet")
async def test_scatter_minds_what_is_there(operator: Operator) -> None:
    """Machines with fewer open tasks get more."""
    await operator.submit(*[{"command": "true", "machine_id": "m1"}] * 4)
    answer = await send(operator, *[{"command": "true"}] * 4, mode="scatter", labels={"gpu": "a100"})
    assert await machine_ids(operator, answer) == ["m2"] * 4


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize(
    ("task", "to", "named"),
    [
        ({}, {"mode": "broadcast", "labels": {"gpu": "h100"}}, "no machine matches gpu=h100"),
        ({}, {"mode": "scatter", "machine_ids": ["m9"]}, "there is no machine m9"),
        ({}, {"machine_ids": ["m1", "m2"]}, "to.machine_ids: a task for any of several machines"),
        ({"id": "t", "machine_id": "m1"}, {"labels": {"gpu": "a100"}}, "task t has a machine_id of its own, m1"),
        ({}, {"mode": "everywhere"}, "to.mode: "),
        ({}, {"lables": {"gpu": "a100"}}, "to.lables: "),
        ({}, {"labels": {"gpu": 7}}, "to.labels.gpu: "),
    ],
)
async def test_bad_destination(operator: Operator, task: dict[str, Any], to: dict[str, Any], named: str) -> None:
    """30005 with what is wrong, and nothing is submitted."""
    answer = await send(operator, {"command": "true"} | task, **to)
    assert answer.code == 30005
    assert named in answer.message
    assert (await operator.call("GET", "/tasks")).data["total"] == 0


async def test_too_many_copies(operator: Operator) -> None:
    """The bound of a call counts copies."""
    for number in range(2):
        await operator.enrol(f"m{number}")
    answer = await send(operator, *[{"command": "true"}] * 5001, mode="broadcast")
    assert "at most 10000" in answer.message


async def test_two_copies_of_one_name(operator: Operator) -> None:
    """`a.b` on `c` and `a` on `b.c` would be one id: refused, not failed."""
    for machine_id in ("c", "b.c"):
        await operator.enrol(machine_id)
    answer = await send(operator, {"id": "a", "command": "true"}, {"id": "a.b", "command": "true"}, mode="broadcast")
    assert answer.code == 30005


async def test_one_named_machine(fleet: dict[str, Agent], operator: Operator) -> None:
    """The same as a `machine_id` in the task."""
    await send(operator, machine_ids=["m2"])
    assert (await fleet["m1"].claim()).data["tasks"] == []
    assert (await fleet["m2"].claim_one())["machine_id"] == "m2"
