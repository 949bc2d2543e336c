"""Compatibility mode, line by line of "Deployed peers" (protocol.md), and that the agent's reading copes with it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Literal

import aiohttp
import pytest

from control_plane import Plane, Settings, faults, serve
from remotegpu_schemas.wire import Claim, Verdict, parse_answer, parse_claims, parse_renewal, parse_time
from tests.control_plane.support import DEADLINE_S, Agent, Answer, MovableClock, Operator
from tests.waiting import until

ZERO_TIME = "0001-01-01T00:00:00Z"
FULL_TASK = {
    "id": "t1",
    "command": "echo",
    "args": ["a b"],
    "env": {"A": "1"},
    "depends_on": ["t0"],
    "resources": {"gpus": 1},
    "lease_ttl_sec": 33,
}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """A deployed plane that does not repeat held tasks."""
    return dataclasses.replace(settings, compat=True, compat_repeats_held=False)


def verdict(answer: Answer) -> Verdict:
    """What the agent makes of it."""
    return parse_answer(answer.status, answer.headers, answer.text.encode()).verdict


async def test_message_is_called_msg(agent: Agent) -> None:
    """On success and on error."""
    good, bad = await agent.heartbeat(), await agent.about("start", {"id": "t", "attempt_id": "a"})
    for answer in (good, bad):
        assert answer.body is not None
        assert "msg" in answer.body
        assert "message" not in answer.body


async def test_data_is_null_or_missing(agent: Agent) -> None:
    """Null where there is nothing to say, missing on errors."""
    assert (await agent.heartbeat()).body == {"code": 0, "msg": "success", "data": None}
    assert set((await agent.call("/register", {})).body or {}) == {"code", "msg"}


@pytest.mark.parametrize(("mode", "statuses"), [("status", [401, 404, 400]), ("body", [200, 200, 200])])
async def test_errors_by_status_or_in_the_body(
    settings: Settings, session: aiohttp.ClientSession, mode: Literal["status", "body"], statuses: list[int]
) -> None:
    """The agent understands both alike."""
    async with serve(dataclasses.replace(settings, compat_errors=mode)) as plane:
        agent = Agent(plane, session, await Operator(plane, session).enrol())
        answers = [
            await agent.call("/heartbeat", {}, {}),
            await agent.start({"id": "t", "attempt_id": "a"}),
            await agent.call("/heartbeat", {}),
        ]
    assert [answer.status for answer in answers] == statuses
    assert [verdict(answer) for answer in answers] == [Verdict.UNAUTHORIZED, Verdict.SUPERSEDED, Verdict.INVALID]


async def test_claimed_task(agent: Agent, operator: Operator) -> None:
    """`env_vars` and `error_msg`; JSON in strings; nanoseconds; the year 1; no additions."""
    await operator.submit(FULL_TASK)
    task = await agent.claim_one()
    assert "env" not in task
    assert json.loads(task["env_vars"]) == {"A": "1"}
    assert json.loads(task["args"]) == ["a b"]
    assert json.loads(task["depends_on"]) == ["t0"]
    assert task["error_msg"] == ""
    assert (task["started_at"], task["ended_at"], task["timeout"]) == (ZERO_TIME, ZERO_TIME, 0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", task["lease_expires_at"])
    assert not {"resources", "lease_ttl_sec", "renew_interval_sec", "grace_period_sec"} & set(task)
    [claim] = parse_claims({"tasks": [task]})
    assert isinstance(claim, Claim)
    assert (claim.task.args, claim.task.env, claim.task.timeout_s) == (("a b",), {"A": "1"}, 0)
    assert claim.lease_expires_at == parse_time("2026-02-02T02:40:33Z")


async def test_what_is_not_there_is_null(agent: Agent, operator: Operator) -> None:
    """`args`, `env_vars` and `depends_on` of a task without them; the agent runs a shell string."""
    await operator.submit({"command": "echo hello"})
    task = await agent.claim_one()
    assert [task[name] for name in ("args", "env_vars", "depends_on")] == [None, None, None]
    [claim] = parse_claims({"tasks": [task]})
    assert isinstance(claim, Claim)
    assert (claim.task.args, claim.task.command) == (None, "echo hello")


async def test_lease_may_be_missing(settings: Settings, session: aiohttp.ClientSession) -> None:
    """A claimed task without its expiry, if the plane is set so."""
    async with serve(dataclasses.replace(settings, compat_hides_lease=True)) as plane:
        operator = Operator(plane, session)
        agent = Agent(plane, session, await operator.enrol())
        await operator.submit()
        assert "lease_expires_at" not in await agent.claim_one()


async def test_renewal_needs_an_accepted_start(agent: Agent, operator: Operator, clock: MovableClock) -> None:
    """Before it a bare 409; after it an answer without the new end, which holds nevertheless."""
    await operator.submit()
    task = await agent.claim_one()
    early = await agent.renew(task)
    assert (early.status, verdict(early)) == (409, Verdict.AMBIGUOUS)
    await agent.start(task)
    clock.time_s += 50
    answer = await agent.renew(task)
    assert answer.data == {"task_id": task["id"], "renewed": True}
    assert parse_renewal(answer.data).lease_expires_at is None
    clock.time_s += 50
    assert (await agent.renew(task)).code == 0


async def test_claims_are_not_idempotent(agent: Agent, operator: Operator, plane: Plane, clock: MovableClock) -> None:
    """A lost answer loses its tasks until their lease lapses."""
    [task_id] = await operator.submit()
    plane.faults.order("claim", faults.DropAfter())
    with pytest.raises(aiohttp.ClientConnectionError):
        await agent.claim(request_id="r1")
    assert (await agent.claim(request_id="r1")).data["tasks"] == []
    clock.time_s += 60
    plane.clock_moved()

    async def has_lapsed() -> bool:
        return str((await operator.task(task_id))["status"]) == "pending"

    await until(has_lapsed)
    assert (await agent.claim_one(request_id="r1"))["id"] == task_id


async def test_held_tasks_are_repeated(settings: Settings, session: aiohttp.ClientSession) -> None:
    """An agent that asks again gets what it holds, under the same attempt, before what is new."""
    async with serve(dataclasses.replace(settings, compat_repeats_held=True)) as plane:
        operator = Operator(plane, session)
        agent = Agent(plane, session, await operator.enrol())
        await operator.submit({"id": "t1", "command": "true"}, {"id": "t2", "command": "true"})
        held = await agent.claim_one()
        tasks = (await agent.claim()).data["tasks"]
        assert [task["id"] for task in tasks] == ["t1", "t2"]
        assert tasks[0]["attempt_id"] == held["attempt_id"]
        await agent.complete(held)
        assert [task["id"] for task in (await agent.claim()).data["tasks"]] == ["t2"]


async def test_claims_are_answered_at_once(agent: Agent) -> None:
    """No long poll, whatever it asks for."""
    async with asyncio.timeout(DEADLINE_S):
        assert (await agent.claim(wait_sec=300)).data == {"tasks": []}


async def test_limit_0_is_10(agent: Agent, operator: Operator) -> None:
    """And `capacity` is not read."""
    await operator.submit(*[{"command": "true"}] * 12)
    assert len((await agent.claim(limit=0, capacity={"slots": 1})).data["tasks"]) == 10


async def test_no_features_and_no_release(agent: Agent, operator: Operator) -> None:
    """The route is a plain 404, which the agent reads as "not there"."""
    assert "features" not in (await agent.register()).data
    await operator.submit()
    answer = await agent.about("release", await agent.claim_one(), reason="no room")
    assert (answer.status, answer.body, verdict(answer)) == (404, None, Verdict.ROUTE_MISSING)


async def test_additions_of_the_plane_are_not_seen(
    settings: Settings, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """No uploads although it has a directory for them, and labels of agents are not read."""
    uploads = dataclasses.replace(settings, uploads_dir=tmp_path / "uploads")
    async with serve(uploads) as plane:
        operator = Operator(plane, session)
        agent = Agent(plane, session, await operator.enrol())
        assert "features" not in (await agent.register(labels={"gpu": "a100"})).data
        task = {"id": "t", "attempt_id": "a"}
        answer = await agent.about("result/upload-url", task, name="n", size_bytes=1, sha256="0" * 64)
        assert (answer.status, answer.body) == (404, None)
        [machine] = (await operator.call("GET", "/machines")).data["machines"]
        assert machine["labels"] == {}


async def test_made_up_machine_claims_nothing(agent: Agent, operator: Operator) -> None:
    """It is greeted all the same."""
    await operator.submit()
    made_up = dataclasses.replace(agent, machine_id="made-up")
    assert (await made_up.register()).code == 0
    assert (await made_up.heartbeat()).code == 0
    assert (await made_up.claim()).data["tasks"] == []
    assert (await agent.claim()).data["tasks"] != []


@pytest.mark.parametrize(
    ("metrics", "is_accepted"),
    [
        ({"cpu_usage_percent": 12.5, "memory_used_gb": 7}, True),
        ({"memory_used_gb": 7.5}, False),
        ({"disk_used_gb": 7.0}, False),
        ({"gpu_metrics": [{"index": 0, "temperature_c": 41, "power_usage_w": 70.5, "util_percent": 1.5}]}, True),
        ({"gpu_metrics": [{"index": 0, "temperature_c": 41.0}]}, False),
        ({"gpu_metrics": [{"index": 0}, {"index": 1.0}]}, False),
        ({"gpu_metrics": [{"memory_total_mb": 81920.5}]}, False),
    ],
)
async def test_float_for_an_integer_refuses_the_heartbeat(
    agent: Agent, metrics: dict[str, Any], is_accepted: bool
) -> None:
    """The whole of it, with 400."""
    answer = await agent.heartbeat(metrics=metrics)
    assert answer.status == (200 if is_accepted else 400)


@pytest.mark.parametrize(("exit_code", "status"), [(0, "completed"), (143, "failed")])
async def test_exit_code_alone_decides(agent: Agent, operator: Operator, exit_code: int, status: str) -> None:
    """`status`, `cause` and all other additions are not read, not even to refuse them."""
    [task_id] = await operator.submit({"command": "true", "max_retries": 5})
    task = await agent.claim_one()
    answer = await agent.complete(task, exit_code=exit_code, status="cancelled", cause="moon", runs="many")
    assert answer.data["status"] == status
    assert "cause" not in (await operator.task(task_id))["result"]
    assert (await agent.claim()).data["tasks"] == []  # no retry either


@pytest.mark.parametrize("in_body", [False, True])
@pytest.mark.parametrize("status", [404, 409, 410])
async def test_database_hiccup(
    agent: Agent, operator: Operator, plane: Plane, status: Literal[404, 409, 410], in_body: bool
) -> None:
    """On demand a call answers a bare status and changes nothing; the next one works."""
    await operator.submit()
    task = await agent.claim_one()
    plane.faults.order("start", faults.hiccup(status, in_body=in_body), times=2)
    for _ in range(2):
        assert verdict(await agent.start(task)) is Verdict.AMBIGUOUS
    assert (await agent.start(task)).code == 0
