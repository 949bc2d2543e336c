"""Who did what when: what is written down, how it is found again, and what goes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from control_plane import Settings
from control_plane.settings import AUDIT_PRUNE_EVERY, AUDIT_REFUSALS_PER_MINUTE
from tests.control_plane.support import ADMIN_TOKEN, MACHINE, Agent, MovableClock, Operator


@pytest.fixture
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    """With the bounds that a test asks for."""
    bounds: dict[str, Any] = getattr(request, "param", {})
    return dataclasses.replace(settings, **bounds)


async def entries(operator: Operator, query: str = "") -> list[dict[str, Any]]:
    """A page of the log."""
    found: list[dict[str, Any]] = (await operator.call("GET", f"/audit{query}")).data["entries"]
    return found


async def test_what_operators_do(operator: Operator) -> None:
    """Enrolments, submissions and cancels, with who, from where and when; newest first."""
    await operator.enrol()
    [task_id] = await operator.submit()
    await operator.call("POST", f"/tasks/{task_id}/cancel", headers={"X-Operator": "alice"})
    found = await entries(operator)
    assert [(entry["actor"], entry["action"], entry["subject"]) for entry in found] == [
        ("operator:alice", "task.cancel", task_id),
        ("operator", "task.submit", task_id),
        ("operator", "machine.enrol", MACHINE),
    ]
    assert {entry["address"] for entry in found} == {"127.0.0.1"}
    assert found[0]["at"] == "2026-02-02T02:40:00.000Z"


async def test_what_was_refused_is_not_written_as_done(operator: Operator) -> None:
    """A cancel of nothing and a bad submission leave no entry."""
    assert (await operator.call("POST", "/tasks/nobody/cancel")).code == 30004
    assert (await operator.call("POST", "/tasks", json=[{"command": ""}])).code == 30005
    assert await entries(operator) == []


async def test_said_name_is_checked(operator: Operator) -> None:
    """What is no name is left out."""
    await operator.call("POST", "/tasks", json={"command": "true"}, headers={"X-Operator": "a b"})
    assert [entry["actor"] for entry in await entries(operator)] == ["operator"]


async def test_rejected_claims(agent: Agent, operator: Operator) -> None:
    """With the agent, its machine and the reason; without any token."""
    other = await operator.enrol("machine-2")
    headers = {"X-Agent-Token": other}
    body = {"agent_id": "agent-1", "machine_id": MACHINE, "limit": 1, "request_id": "r"}
    await agent.call("/tasks/claim", body, headers)
    await agent.call("/tasks/claim", body, {"X-Agent-Token": "a-wrong-one"})
    found = await entries(operator, "?action=claim.refused")
    assert [(entry["actor"], entry["detail"].split(" ")[0]) for entry in found] == [
        ("unknown", "401"),
        ("agent:agent-1@machine-2", "403"),
    ]
    assert other not in str(found)
    assert "a-wrong-one" not in str(found)


async def test_rejected_reports(agent: Agent, operator: Operator) -> None:
    """A fenced call is an entry about its task."""
    await operator.submit()
    task = await agent.claim_one()
    await agent.complete(task)
    assert (await agent.renew(task)).code == 30002
    [entry] = await entries(operator, f"?subject={task['id']}&action=renew.refused")
    assert entry["detail"].startswith("30002 ")


async def test_filters(operator: Operator, clock: MovableClock) -> None:
    """By actor, action, subject and time; `since` is included, `until` is not."""
    [first] = await operator.submit()
    clock.time_s += 60
    await operator.call("POST", "/tasks", json={"command": "true"}, headers={"X-Operator": "bob"})
    assert [entry["subject"] for entry in await entries(operator, f"?subject={first}")] == [first]
    assert len(await entries(operator, "?actor=operator:bob")) == 1
    assert await entries(operator, "?action=task.cancel") == []
    assert [entry["subject"] for entry in await entries(operator, "?until=2026-02-02T02:41:00Z")] == [first]
    assert len(await entries(operator, "?since=2026-02-02T02:41:00Z")) == 1


async def test_pages_do_not_shift(operator: Operator) -> None:
    """What comes meanwhile neither repeats nor hides an entry."""
    ids = [(await operator.submit())[0] for _ in range(5)]
    first = (await operator.call("GET", "/audit?limit=2")).data
    await operator.submit()
    second = (await operator.call("GET", f"/audit?limit=2&before={first['next_before']}")).data
    third = (await operator.call("GET", f"/audit?limit=2&before={second['next_before']}")).data
    seen = [entry["subject"] for page in (first, second, third) for entry in page["entries"]]
    assert seen == ids[::-1]
    assert third["next_before"] is None


@pytest.mark.parametrize("query", ["since=yesterday", "before=x", "limit=-1"])
async def test_bad_query(operator: Operator, query: str) -> None:
    """30005 with the name."""
    answer = await operator.call("GET", f"/audit?{query}")
    assert answer.code == 30005
    assert answer.message.startswith(query.partition("=")[0])


async def test_refusals_are_bounded(agent: Agent, operator: Operator, clock: MovableClock) -> None:
    """So many a minute; the next minute's first entry tells how many were left out."""
    for _ in range(AUDIT_REFUSALS_PER_MINUTE + 3):
        assert (await agent.call("/heartbeat", {}, {"X-Agent-Token": "wrong"})).status == 401
    assert len(await entries(operator, "?action=heartbeat.refused&limit=1000")) == AUDIT_REFUSALS_PER_MINUTE
    clock.time_s += 60
    await agent.call("/heartbeat", {}, {"X-Agent-Token": "wrong"})
    [newest] = await entries(operator, "?limit=1")
    assert newest["detail"].endswith("; 3 refusals before it were left out")


@pytest.mark.parametrize(
    ("settings", "left"),
    [({"audit_rows_max": 10}, 10), ({"audit_retention_s": 3600.0}, AUDIT_PRUNE_EVERY)],
    indirect=["settings"],
    ids=["number", "age"],
)
async def test_old_entries_go(operator: Operator, clock: MovableClock, left: int) -> None:
    """By number and by age, at the latest after AUDIT_PRUNE_EVERY changes."""
    [first] = await operator.submit()
    clock.time_s += 7200
    for _ in range(AUDIT_PRUNE_EVERY):
        await operator.submit()
    found = await entries(operator, "?limit=1000")
    assert first not in {entry["subject"] for entry in found}
    assert len(found) == left


async def test_only_operators_read_it(agent: Agent, operator: Operator) -> None:
    """401 for an agent's token."""
    answer = await operator.call("GET", "/audit", headers={"Authorization": f"Bearer {agent.token}"})
    assert answer.status == 401
    assert ADMIN_TOKEN not in answer.text
