"""Refusals at the edge: tokens, bodies, routes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest

from control_plane import Plane
from control_plane.settings import BODY_MAX_BYTES
from tests.control_plane.support import ADMIN_TOKEN, MACHINE, RESULT, Agent, Operator, request

ATTEMPT = {"agent_id": "agent-1", "attempt_id": "a1"}
HOST = {"agent_id": "agent-1", "machine_id": MACHINE}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Agent-Token": "wrong"},
        {"X-Agent-Token": ADMIN_TOKEN},
        {"Authorization": "Basic abc"},
        {"Authorization": "Bearer"},
        {"X-Agent-Token": "schlüssel"},
    ],
)
async def test_agent_without_a_valid_token(agent: Agent, headers: dict[str, str]) -> None:
    """401 in an envelope, whatever is wrong with it; the operator's token is none either."""
    answer = await agent.call("/heartbeat", HOST | {"metrics": {}}, headers)
    assert (answer.status, answer.code) == (401, 401)


@pytest.mark.parametrize("header", ["X-Agent-Token", "Authorization"])
async def test_either_header_will_do(agent: Agent, header: str) -> None:
    """A token counts in both of its places."""
    value = agent.token if header == "X-Agent-Token" else f"Bearer {agent.token}"
    assert (await agent.call("/register", HOST, {header: value})).code == 0


@pytest.mark.parametrize("path", ["/register", "/heartbeat", "/tasks/claim"])
async def test_token_of_another_machine(agent: Agent, operator: Operator, path: str) -> None:
    """403: a machine's token speaks for that machine only."""
    token = await operator.enrol("machine-2")
    body = HOST | {"metrics": {}, "limit": 1, "request_id": "r"}
    answer = await agent.call(path, body, {"X-Agent-Token": token})
    assert (answer.status, answer.code) == (403, 403)


async def test_new_token_replaces_the_old_one(agent: Agent, operator: Operator) -> None:
    """A second enrolment is a rotation."""
    new = await operator.enrol()
    assert (await agent.heartbeat()).status == 401
    assert (await agent.call("/register", HOST, {"X-Agent-Token": new})).code == 0


async def test_unregistered_agent_is_asked_for_its_hardware(agent: Agent) -> None:
    """A heartbeat of an agent that the plane does not know asks for a register."""
    agent.agent_id = "agent-9"
    assert (await agent.heartbeat()).data["needs_collect"] is True
    await agent.register()
    assert "needs_collect" not in (await agent.heartbeat()).data


async def test_register_names_the_optional_calls(agent: Agent) -> None:
    """Release there is, uploads there are none."""
    assert (await agent.register()).data["features"] == ["release"]
    answer = await agent.call("/tasks/t/result/upload-url", {})
    assert (answer.status, answer.body) == (404, None)


@pytest.mark.parametrize("token", ["", "wrong"])
async def test_operator_without_a_valid_token(plane: Plane, operator: Operator, token: str) -> None:
    """401, for a machine's token as well."""
    for sent in (token, await operator.enrol()):
        answer = await request(
            operator.session, "GET", f"{plane.url}/api/v1/admin/stats", {"Authorization": f"Bearer {sent}"}
        )
        assert (answer.status, answer.code) == (401, 401)


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/register", {"machine_id": MACHINE}, "agent_id: Field required"),
        ("/register", HOST | {"agent_id": "a/../b"}, "agent_id: "),
        ("/heartbeat", HOST | {"machine_id": 7}, "machine_id: "),
        ("/tasks/claim", HOST | {"limit": 0, "request_id": "r"}, "limit: "),
        ("/tasks/claim", HOST | {"limit": 1}, "request_id: Field required"),
        ("/tasks/claim", HOST | {"limit": 1, "request_id": "r", "wait_sec": -1}, "wait_sec: "),
        ("/tasks/t/start", {"agent_id": "a"}, "attempt_id: Field required"),
        ("/tasks/t/start", ATTEMPT | {"run_no": 0}, "run_no: "),
        ("/tasks/t/start", ATTEMPT | {"process_id": 2**63}, "process_id: "),
        ("/tasks/t/lease/renew", ATTEMPT | {"extend_sec": 0}, "extend_sec: "),
        ("/tasks/t/lease/renew", ATTEMPT | {"extend_sec": "60"}, "extend_sec: "),
        ("/tasks/t/progress", ATTEMPT | {"percent": 101, "message": ""}, "percent: "),
        ("/tasks/t/progress", ATTEMPT | {"percent": 1, "message": "x" * 501}, "message: "),
        ("/tasks/t/complete", ATTEMPT, "exit_code: Field required"),
        ("/tasks/t/complete", ATTEMPT | RESULT | {"stdout": "x" * 65537}, "stdout: is 65537 bytes long"),
        ("/tasks/t/complete", ATTEMPT | RESULT | {"stderr": "a\0b"}, "stderr: must not contain a NUL"),
        ("/tasks/t/complete", ATTEMPT | RESULT | {"stdout": "\ud800"}, "stdout: "),
        ("/tasks/t/complete", ATTEMPT | RESULT | {"status": "done"}, "status: "),
        ("/tasks/t/complete", ATTEMPT | RESULT | {"status": "failed"}, "exit_code: 0 contradicts status failed"),
        ("/tasks/t/complete", ATTEMPT | RESULT | {"cause": "moon"}, "cause: "),
        ("/tasks/t/complete", ATTEMPT | RESULT | {"ended_at": "yesterday"}, "ended_at: must be a time"),
        ("/tasks/t/release", ATTEMPT, "reason: Field required"),
        ("/tasks/t/start", [1], "the body must be a JSON object, not list"),
    ],
)
async def test_bad_body_is_named(agent: Agent, path: str, body: Any, named: str) -> None:
    """30005 with the field."""
    answer = await agent.call(path, body)
    assert (answer.status, answer.code) == (400, 30005)
    assert named in answer.message


async def test_unknown_fields_are_ignored(agent: Agent, operator: Operator) -> None:
    """Agents may be newer than the plane."""
    await operator.submit()
    task = await agent.claim_one(colour="blue")
    assert (await agent.complete(task, colour="blue")).code == 0


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
async def test_no_json(agent: Agent, raw: bytes) -> None:
    """30005, and the plane goes on."""
    url = f"{agent.plane.url}/api/v1/agent/heartbeat"
    answer = await request(agent.session, "POST", url, {"X-Agent-Token": agent.token}, data=raw)
    assert (answer.status, answer.code) == (400, 30005)
    assert (await agent.heartbeat()).code == 0


async def test_body_is_bounded(agent: Agent) -> None:
    """More than the bound is refused, and the plane goes on."""
    url = f"{agent.plane.url}/api/v1/agent/heartbeat"
    body = io.BytesIO(b" " * (BODY_MAX_BYTES + 1))
    answer = await request(agent.session, "POST", url, {"X-Agent-Token": agent.token}, data=body)
    assert (answer.status, answer.code) == (413, 413)
    assert (await agent.heartbeat()).code == 0


async def test_unknown_route_is_no_envelope(agent: Agent) -> None:
    """So an agent can tell that a call does not exist there."""
    answer = await agent.call("/nothing", {})
    assert (answer.status, answer.body) == (404, None)


async def test_internal_error(agent: Agent, run_sql: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> None:
    """30099 for what is the plane's own fault; it goes on, and the log has the traceback under the id that is told."""
    run_sql("ALTER TABLE agents RENAME TO lost")
    broken = await agent.register()
    run_sql("ALTER TABLE lost RENAME TO agents")
    assert (broken.status, broken.code) == (500, 30099)
    assert re.findall(r"[0-9a-f]{24}", broken.message)[0] in caplog.text
    assert (await agent.register()).code == 0


async def test_nul_in_an_address(agent: Agent, operator: Operator) -> None:
    """No database is asked for what it could not hold."""
    task = {"id": "a%00b", "attempt_id": "a1"}
    assert (await agent.start(task)).code == 30005
    assert (await operator.call("GET", "/tasks/a%00b")).code == 30005
    assert (await operator.call("GET", "/tasks?status=a%00b")).code == 30005
