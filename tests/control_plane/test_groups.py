"""Groups of tasks over HTTP: who gets which task when, how a group ends, what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import Update, update

from control_plane import Settings, serve
from control_plane.store.tables import tasks
from tests.control_plane.support import DEADLINE_S, MACHINE, Agent, Answer, MovableClock, Operator

FAILURE = {"exit_code": 1, "status": "failed", "cause": "exit_code"}
DAG: list[dict[str, Any]] = [
    {"id": "prepare", "command": "true"},
    {"id": "left", "command": "true", "depends_on": ["prepare"]},
    {"id": "right", "command": "true", "depends_on": ["prepare"]},
    {"id": "report", "command": "true", "depends_on": ["left", "right"]},
]


async def send(operator: Operator, tasks: list[dict[str, Any]] | None = None, **group: Any) -> Answer:
    """A submission of a group called g."""
    tasks = [{"command": "true"}] * 3 if tasks is None else tasks
    return await operator.call("POST", "/groups", json={"id": "g", "tasks": tasks} | group)


async def group(operator: Operator) -> dict[str, Any]:
    """The group called g."""
    data: dict[str, Any] = (await operator.call("GET", "/groups/g")).data
    return data


async def statuses(operator: Operator) -> dict[str, str]:
    """The statuses of its tasks."""
    return {task["id"]: task["status"] for task in (await group(operator))["tasks"]}


async def behind(operator: Operator, statement: Update) -> None:
    """Change the database behind the plane's back."""
    assert await operator.plane.service.work.run(lambda db: db.execute(statement).rowcount) == 1


async def claimed(agent: Agent) -> dict[str, dict[str, Any]]:
    """What can be claimed now, by the name in the group."""
    tasks = (await agent.claim(limit=64)).data["tasks"]
    return {task["id"].removeprefix("g."): task for task in tasks}


async def test_serial(agent: Agent, operator: Operator) -> None:
    """One after the other, in the order of the list."""
    answer = await send(operator, mode="serial")
    assert answer.data["task_ids"] == {"task-1": "g.task-1", "task-2": "g.task-2", "task-3": "g.task-3"}
    for name in ("task-1", "task-2", "task-3"):
        held = await claimed(agent)
        assert list(held) == [name]
        await agent.complete(held[name])
    assert (await group(operator))["state"] == "completed"


async def test_parallel(agent: Agent, operator: Operator) -> None:
    """All at once, or as many as `max_parallel` lets."""
    await send(operator, mode="parallel", max_parallel=2)
    held = await claimed(agent)
    assert list(held) == ["task-1", "task-2"]
    await agent.complete(held["task-2"])
    assert list(await claimed(agent)) == ["task-3"]


async def test_dag(agent: Agent, operator: Operator) -> None:
    """A task is handed out when all that it depends on has succeeded, and says what that was."""
    await send(operator, DAG)
    assert await statuses(operator) == {
        "prepare": "pending",
        "left": "waiting",
        "right": "waiting",
        "report": "waiting",
    }
    await agent.complete((await claimed(agent))["prepare"])
    held = await claimed(agent)
    assert sorted(held) == ["left", "right"]
    await agent.complete(held["left"])
    assert await claimed(agent) == {}
    await agent.complete(held["right"])
    report = (await claimed(agent))["report"]
    assert (report["group_id"], report["depends_on"]) == ("g", ["g.left", "g.right"])
    await agent.complete(report)
    ended = await group(operator)
    assert (ended["state"], ended["counts"]["succeeded"]) == ("completed", 4)
    assert ended["ended_at"] == "2026-02-02T02:40:00.000Z"


async def test_long_poll_gets_the_next_task(agent: Agent, operator: Operator) -> None:
    """Whoever waits is woken when the dependency is met."""
    await send(operator, mode="serial")
    first = (await claimed(agent))["task-1"]
    waiting = asyncio.create_task(agent.claim(wait_sec=DEADLINE_S))
    await operator.plane.faults.wait_calls("claim", 2, DEADLINE_S)
    await agent.complete(first)
    [task] = (await waiting).data["tasks"]
    assert task["id"] == "g.task-2"


async def test_stop(agent: Agent, operator: Operator) -> None:
    """After a failure nothing more is handed out, not even what was ready; what runs may end."""
    await send(operator, mode="parallel", on_failure="stop")
    tasks = (await agent.claim(limit=2)).data["tasks"]
    await agent.complete(tasks[0], **FAILURE)
    assert await claimed(agent) == {}
    assert await statuses(operator) == {"task-1": "failed", "task-2": "assigned", "task-3": "cancelled"}
    assert (await group(operator))["state"] == "running"
    await agent.complete(tasks[1])
    assert (await group(operator))["state"] == "failed"
    assert await operator.events("g.task-3") == ["created", "ready", "skipped"]


@pytest.mark.parametrize("how", ["released", "lapsed"])
async def test_stopped_group_takes_nothing_back_out(
    agent: Agent, operator: Operator, clock: MovableClock, how: str
) -> None:
    """A task that comes back without a result is not handed out again."""
    await send(operator, [{"command": "true"}] * 2, mode="parallel", on_failure="stop")
    failing, other = (await agent.claim(limit=2)).data["tasks"]
    await agent.complete(failing, **FAILURE)
    if how == "released":
        await agent.about("release", other, reason="no room")
    else:
        clock.time_s += 61
        operator.plane.clock_moved()
    await operator.plane.service.wait_ended(["g.task-2"], DEADLINE_S)
    assert await statuses(operator) == {"task-1": "failed", "task-2": "cancelled"}
    assert (await group(operator))["state"] == "failed"


async def test_continue(agent: Agent, operator: Operator) -> None:
    """The next one comes all the same; the group has failed in the end."""
    await send(operator, [{"command": "true"}] * 2, mode="serial", on_failure="continue")
    await agent.complete((await claimed(agent))["task-1"], **FAILURE)
    await agent.complete((await claimed(agent))["task-2"])
    assert (await group(operator))["state"] == "failed"


async def test_skip_dependents(agent: Agent, operator: Operator) -> None:
    """What depends on the failed task is skipped with the reason; the other branch goes on."""
    tasks: list[dict[str, Any]] = [
        {"id": "a", "command": "true"},
        {"id": "b", "command": "true"},
        {"id": "after-a", "command": "true", "depends_on": ["a"]},
        {"id": "after-that", "command": "true", "depends_on": ["after-a"]},
        {"id": "after-b", "command": "true", "depends_on": ["b"]},
    ]
    await send(operator, tasks, on_failure="skip_dependents")
    held = await claimed(agent)
    await agent.complete(held["a"], **FAILURE)
    await agent.complete(held["b"])
    assert list(await claimed(agent)) == ["after-b"]
    skipped = await operator.task("g.after-that")
    assert (skipped["status"], skipped["error"]) == ("cancelled", "dependency_failed: task after-a did not succeed")


async def test_when(agent: Agent, operator: Operator) -> None:
    """`failure` runs after one and is not needed else; `always` runs anyway."""
    tasks: list[dict[str, Any]] = [
        {"id": "work", "command": "true"},
        {"id": "alarm", "command": "true", "depends_on": ["work"], "when": "failure"},
        {"id": "clean", "command": "true", "depends_on": ["work", "alarm"], "when": "always"},
    ]
    await send(operator, tasks)
    await agent.complete((await claimed(agent))["work"])
    await agent.complete((await claimed(agent))["clean"])
    assert (await operator.task("g.alarm"))["error"] == "not needed: nothing failed that it is for"
    assert (await group(operator))["state"] == "completed"


async def test_cancel_of_one_task(agent: Agent, operator: Operator) -> None:
    """It has not succeeded, for those that depend on it."""
    await send(operator, mode="serial", on_failure="skip_dependents")
    await operator.call("POST", "/tasks/g.task-2/cancel")
    await agent.complete((await claimed(agent))["task-1"])
    assert await statuses(operator) == {"task-1": "completed", "task-2": "cancelled", "task-3": "cancelled"}
    assert (await group(operator))["state"] == "failed"


async def test_cancel_of_a_group(agent: Agent, operator: Operator) -> None:
    """What nobody has goes at once, agents are asked to stop the rest; twice is once."""
    await send(operator, mode="serial")
    held = (await claimed(agent))["task-1"]
    assert (await operator.call("POST", "/groups/g/cancel")).data == {"group_id": "g", "state": "running"}
    assert await statuses(operator) == {"task-1": "assigned", "task-2": "cancelled", "task-3": "cancelled"}
    assert (await agent.renew(held)).data["cancel_requested"] is True
    await agent.complete(held, exit_code=143, status="cancelled", cause="cancelled")
    assert (await group(operator))["state"] == "cancelled"
    assert (await operator.call("POST", "/groups/g/cancel")).data["state"] == "cancelled"


async def test_cancel_before_anything_ran(operator: Operator) -> None:
    """The group has ended with the answer."""
    await send(operator, DAG)
    assert (await operator.call("POST", "/groups/g/cancel")).data["state"] == "cancelled"


async def test_cancel_of_what_has_ended(agent: Agent, operator: Operator) -> None:
    """30002; an unknown group is 30004."""
    await send(operator, [{"command": "true"}])
    await agent.complete((await claimed(agent))["task-1"])
    assert (await operator.call("POST", "/groups/g/cancel")).code == 30002
    assert (await operator.call("POST", "/groups/h/cancel")).code == 30004
    assert (await operator.call("GET", "/groups/h")).code == 30004


async def test_lapses_settle_a_group(settings: Settings, operator: Operator, agent: Agent, clock: MovableClock) -> None:
    """A task that fails since its leases lapsed stops the group as any failure does."""
    await send(operator, [{"command": "true"}] * 2, mode="serial")
    for _ in range(settings.attempts_max):
        await agent.claim_one(wait_sec=DEADLINE_S)
        clock.time_s += 61
        operator.plane.clock_moved()
    await operator.plane.service.wait_ended(["g.task-1", "g.task-2"], DEADLINE_S)
    assert await statuses(operator) == {"task-1": "failed", "task-2": "cancelled"}


async def test_plane_that_died_between_end_and_settling(settings: Settings, operator: Operator, agent: Agent) -> None:
    """A group whose task ended unnoticed goes on with the next plane's start."""
    await send(operator, [{"command": "true"}] * 2, mode="serial")
    await operator.plane.service.reaper.stop()  # it would notice
    ended = {"status": "completed", "ended_at_ms": settings.now_ms}
    await behind(operator, update(tasks).where(tasks.c.id == "g.task-1").values(ended))
    await operator.plane.stop()
    async with serve(settings) as plane:
        agent.plane = plane
        assert (await agent.claim_one(wait_sec=DEADLINE_S))["id"] == "g.task-2"


async def test_repeated_completion_settles_too(operator: Operator, agent: Agent) -> None:
    """An agent that got no answer repeats itself, and so does what was left undone."""
    await send(operator, [{"command": "true"}] * 2, mode="serial")
    first = (await claimed(agent))["task-1"]
    await agent.complete(first)
    await operator.plane.service.reaper.stop()  # it would do what the repeat is to do
    await behind(operator, update(tasks).where(tasks.c.id == "g.task-2").values(status="waiting"))
    assert await claimed(agent) == {}
    await agent.complete(first)
    assert list(await claimed(agent)) == ["task-2"]


async def test_defaults(agent: Agent, operator: Operator) -> None:
    """A task's own come first; environments and labels are merged by key."""
    defaults = {"timeout": "2h", "env": {"A": "1", "B": "1"}, "priority": 2}
    tasks: list[dict[str, Any]] = [{"command": "true", "env": {"B": "2"}, "priority": 7}, {"command": "true"}]
    await send(operator, tasks, mode="parallel", defaults=defaults)
    held = await claimed(agent)
    assert (held["task-1"]["env"], held["task-1"]["priority"]) == ({"A": "1", "B": "2"}, 7)
    assert (held["task-2"]["env"], held["task-2"]["timeout"]) == ({"A": "1", "B": "1"}, "2h")


async def test_group_for_machines_with_labels(
    make_agent: Callable[[str, str], Awaitable[Agent]], operator: Operator
) -> None:
    """Its tasks go where `to` says."""
    right, wrong = await make_agent("a1", "m1"), await make_agent("a2", "m2")
    await right.register(labels={"gpu": "a100"})
    await send(operator, mode="serial", to={"labels": {"gpu": "a100"}})
    assert await claimed(wrong) == {}
    assert list(await claimed(right)) == ["task-1"]


async def test_listing(agent: Agent, operator: Operator) -> None:
    """Paged and by state."""
    for name in ("g1", "g2", "g3"):
        await operator.call("POST", "/groups", json={"id": name, "name": f"the {name}", "tasks": [{"command": "true"}]})
    await operator.call("POST", "/groups/g2/cancel")
    page = (await operator.call("GET", "/groups?state=running&limit=1&offset=1")).data
    assert (page["total"], [found["group_id"] for found in page["groups"]]) == (2, ["g3"])
    assert (await operator.call("GET", "/groups?state=gone")).code == 30005
    assert agent.machine_id == MACHINE


@pytest.mark.parametrize(
    ("tasks", "more", "named"),
    [
        ([], {}, "tasks: a group has from 1 to 1000 tasks"),
        ([{"command": "true"}] * 1001, {}, "tasks: a group has from 1 to 1000 tasks"),
        (
            [
                {"id": "eval", "command": "a", "depends_on": ["report"]},
                {"id": "report", "command": "a", "depends_on": ["eval"]},
            ],
            {},
            "tasks depend on each other in a circle: ",
        ),
        ([{"id": "a", "command": "a", "depends_on": ["a"]}], {}, "in a circle: a -> a"),
        (
            [{"id": "prepare", "command": "a"}, {"command": "a", "depends_on": ["prepair"]}],
            {},
            "tasks[1]: depends_on: there is no task prepair in this group; did you mean 'prepare'?",
        ),
        ([{"id": "a", "command": "a"}, {"id": "a", "command": "b"}], {}, "two tasks of the group have the id a"),
        ([{"command": "a", "dependson": ["b"]}], {}, "unknown key 'dependson'; did you mean 'depends_on'?"),
        ([{"command": "a", "depends_on": ["b"]}], {"mode": "serial"}, "tasks[0]: depends_on: is for groups"),
        ([{"command": "a", "when": "failure"}], {}, "tasks[0]: when: "),
        ([{"command": "a", "when": "never"}], {}, "tasks[0]: when: "),
        ([{"command": "a", "timeout": "soon"}], {}, "tasks[0]: "),
        ([{"id": "x" * 127, "command": "a"}], {}, "tasks[0]: id: "),
        ([{"command": "a"}], {"defaults": {"depends_on": ["b"]}}, "defaults: unknown key 'depends_on'"),
        ([{"command": "a"}], {"on_failure": "panic"}, "on_failure: "),
        ([{"command": "a"}], {"max_parallel": 0}, "max_parallel: "),
        ([{"command": "a"}], {"to": {"mode": "broadcast"}}, "to.mode: "),
    ],
)  # fmt: skip
async def test_bad_group(operator: Operator, tasks: list[Any], more: dict[str, Any], named: str) -> None:
    """30005 with the place, and nothing is submitted."""
    answer = await send(operator, tasks, **more)
    assert answer.code == 30005
    assert named in answer.message
    assert (await operator.call("GET", "/tasks")).data["total"] == 0


async def test_circle_is_written_out(operator: Operator) -> None:
    """Each task depends on the next one."""
    tasks = [{"id": name, "command": "a", "depends_on": [other]} for name, other in ("ab", "bc", "ca")]
    answer = await send(operator, [*tasks, {"id": "x", "command": "a"}])
    circle = answer.message.partition("circle: ")[2]
    assert circle in {"a -> b -> c -> a", "b -> c -> a -> b", "c -> a -> b -> c"}


async def test_matrix_is_refused(operator: Operator) -> None:
    """As what it is: not supported, not misspelt."""
    assert (await send(operator, [{"command": "a", "matrix": {"seed": [1]}}])).code == 30025


async def test_taken_group_id(operator: Operator) -> None:
    """409, and the first one stays as it is."""
    await send(operator)
    answer = await send(operator, [{"id": "other", "command": "true"}])
    assert (answer.status, answer.code) == (409, 30024)
    assert len((await group(operator))["tasks"]) == 3
