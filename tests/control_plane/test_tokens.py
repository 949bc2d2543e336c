"""Tokens of agents: issued, expired, rotated, revoked."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, update

from control_plane.settings import DEAD_TOKENS_KEPT_MS, TOKEN_KNOWN_MS, TOKENS_PER_MACHINE_MAX
from control_plane.store.tokens import agent_tokens
from tests.control_plane.support import MACHINE, Agent, MovableClock, Operator


async def issue(operator: Operator, machine_id: str = MACHINE, **body: Any) -> dict[str, Any]:
    """A new token of the machine."""
    data: dict[str, Any] = (await operator.call("POST", f"/machines/{machine_id}/tokens", json=body)).data
    return data


async def status_with(agent: Agent, token: str) -> int:
    """How a heartbeat with this token is answered."""
    body = {"agent_id": agent.agent_id, "machine_id": agent.machine_id, "metrics": {}}
    return (await agent.call("/heartbeat", body, {"X-Agent-Token": token})).status


async def test_issued_token(agent: Agent, operator: Operator) -> None:
    """It is good beside the one of the enrolment, and is listed without its secret."""
    issued = await issue(operator, name="rack 4")
    assert await status_with(agent, issued["token"]) == 200
    assert await status_with(agent, agent.token) == 200
    answer = await operator.call("GET", f"/machines/{MACHINE}/tokens")
    [listed] = answer.data["tokens"]
    assert (listed["token_id"], listed["name"], listed["is_good"]) == (issued["token_id"], "rack 4", True)
    assert issued["token"].partition(".")[2] not in answer.text
    assert "sha256" not in answer.text


async def test_only_the_digest_is_stored(operator: Operator) -> None:
    """No row holds the secret."""
    await operator.enrol()
    issued = await issue(operator)
    rows = await operator.plane.service.work.run(lambda db: str(db.execute(select(agent_tokens)).all()))
    assert issued["token_id"] in rows
    assert issued["token"].partition(".")[2] not in rows


@pytest.mark.parametrize("change", ["secret", "id", "no secret", "odd id"])
async def test_wrong_token(agent: Agent, operator: Operator, change: str) -> None:
    """401: id and secret belong together."""
    token_id, _, secret = (await issue(operator))["token"].partition(".")
    other_id = (await issue(operator))["token_id"]
    wrong = {
        "secret": f"{token_id}.{secret[:-1]}_",
        "id": f"{other_id}.{secret}",
        "no secret": f"{token_id}.",
        "odd id": f"%.{secret}",
    }
    assert await status_with(agent, wrong[change]) == 401


async def test_token_of_one_agent(agent: Agent, operator: Operator) -> None:
    """403 for every other agent, of the same machine too."""
    token = (await issue(operator, agent_id="agent-1"))["token"]
    assert await status_with(agent, token) == 200
    agent.agent_id = "agent-2"
    assert await status_with(agent, token) == 403


@pytest.mark.parametrize("body", [{"ttl_sec": 60}, {"expires_at": "2026-02-02T02:41:00Z"}])
async def test_token_expires(agent: Agent, operator: Operator, clock: MovableClock, body: dict[str, Any]) -> None:
    """Good until its time, and not a moment longer, though it was good a second ago."""
    issued = await issue(operator, **body)
    assert issued["expires_at"] == "2026-02-02T02:41:00.000Z"
    clock.time_s += 59
    assert await status_with(agent, issued["token"]) == 200
    clock.time_s += 1
    assert await status_with(agent, issued["token"]) == 401
    [listed] = (await operator.call("GET", f"/machines/{MACHINE}/tokens")).data["tokens"]
    assert listed["is_good"] is False


async def test_rotation_overlaps(agent: Agent, operator: Operator, clock: MovableClock) -> None:
    """Both are good for the overlap, then the new one only."""
    old = await issue(operator, agent_id="agent-1")
    new = (await operator.call("POST", f"/tokens/{old['token_id']}/rotate", json={"overlap_sec": 600})).data
    assert (new["machine_id"], new["agent_id"], new["expires_at"]) == (MACHINE, "agent-1", None)
    clock.time_s += 599
    assert [await status_with(agent, each["token"]) for each in (old, new)] == [200, 200]
    clock.time_s += 1
    assert [await status_with(agent, each["token"]) for each in (old, new)] == [401, 200]


async def test_rotation_makes_no_token_longer(agent: Agent, operator: Operator, clock: MovableClock) -> None:
    """An old token that would end within the overlap ends when it would have."""
    old = await issue(operator, ttl_sec=60)
    await operator.call("POST", f"/tokens/{old['token_id']}/rotate", json={"overlap_sec": 600})
    clock.time_s += 60
    assert await status_with(agent, old["token"]) == 401


async def test_rotation_only_once(operator: Operator, agent: Agent) -> None:
    """The second names the successor: whoever asked first has it."""
    old = await issue(operator)
    new = (await operator.call("POST", f"/tokens/{old['token_id']}/rotate", json={})).data
    answer = await operator.call("POST", f"/tokens/{old['token_id']}/rotate", json={})
    assert (answer.status, answer.code) == (409, 30020)
    assert new["token_id"] in answer.message
    assert await status_with(agent, new["token"]) == 200


async def test_revoked_token(agent: Agent, operator: Operator) -> None:
    """It is refused at once, although it was just accepted; a second time is the same; it is not rotated."""
    issued = await issue(operator)
    assert await status_with(agent, issued["token"]) == 200
    path = f"/tokens/{issued['token_id']}"
    revoked = (await operator.call("POST", f"{path}/revoke")).data
    assert await status_with(agent, issued["token"]) == 401
    assert (await operator.call("POST", f"{path}/revoke")).data == revoked
    assert (await operator.call("POST", f"{path}/rotate", json={})).code == 30020


async def test_another_instance_hears_of_a_revocation(agent: Agent, operator: Operator, clock: MovableClock) -> None:
    """What was revoked behind the plane's back is believed for seconds only."""
    issued = await issue(operator)
    assert await status_with(agent, issued["token"]) == 200
    await operator.plane.service.work.run(lambda db: db.execute(update(agent_tokens).values(revoked_at_ms=1)).rowcount)
    clock.time_s += TOKEN_KNOWN_MS / 1000
    assert await status_with(agent, issued["token"]) == 401


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"ttl_sec": 0}, "ttl_sec"),
        ({"expires_at": "soon"}, "expires_at"),
        ({"expires_at": "2020-01-01T00:00:00Z"}, "expires_at"),
        ({"expires_at": "2027-01-01T00:00:00Z", "ttl_sec": 5}, "expires_at, ttl_sec"),
        ({"agent_id": "a/b"}, "agent_id"),
        ({"ttl": 5}, "ttl"),
    ],
)
async def test_bad_issue(operator: Operator, body: dict[str, Any], named: str) -> None:
    """30005 with the field."""
    await operator.enrol()
    answer = await operator.call("POST", f"/machines/{MACHINE}/tokens", json=body)
    assert answer.code == 30005
    assert answer.message.startswith(named)


async def test_unknown_machine_and_token(operator: Operator) -> None:
    """30005 that names it."""
    answers = [
        await operator.call("POST", "/machines/nobody/tokens", json={}),
        await operator.call("POST", "/tokens/nothing/rotate", json={}),
        await operator.call("POST", "/tokens/nothing/revoke"),
    ]
    assert [answer.code for answer in answers] == [30005] * 3
    assert ["nobody" in answers[0].message, *("nothing" in answer.message for answer in answers[1:])] == [True] * 3


async def test_tokens_of_a_machine_are_bounded(agent: Agent, operator: Operator, clock: MovableClock) -> None:
    """At the bound none is issued; dead ones make room after some days."""
    for _ in range(TOKENS_PER_MACHINE_MAX):
        await issue(operator, ttl_sec=1)
    assert (await operator.call("POST", f"/machines/{MACHINE}/tokens", json={})).code == 30020
    clock.time_s += 1 + DEAD_TOKENS_KEPT_MS / 1000
    assert await status_with(agent, (await issue(operator))["token"]) == 200


async def test_token_operations_are_audited(operator: Operator) -> None:
    """Issue, rotation and revocation, without a secret."""
    await operator.enrol()
    old = await issue(operator)
    new = (await operator.call("POST", f"/tokens/{old['token_id']}/rotate", json={})).data
    await operator.call("POST", f"/tokens/{new['token_id']}/revoke")
    answer = await operator.call("GET", "/audit?limit=3")
    assert [(entry["action"], entry["subject"]) for entry in answer.data["entries"]] == [
        ("token.revoke", new["token_id"]),
        ("token.rotate", old["token_id"]),
        ("token.issue", old["token_id"]),
    ]
    assert old["token"].partition(".")[2] not in answer.text
