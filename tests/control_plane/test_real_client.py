"""The agent's own client against the plane, strict and in compatibility mode."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from pathlib import Path

import aiohttp
import pytest

from control_plane import Plane as Server
from control_plane import Settings, faults, serve
from remotegpu_agent.clock import SystemClock
from remotegpu_agent.control_plane import ControlPlane
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.states import Cause, TaskState
from remotegpu_schemas.wire import (
    Answer,
    Claim,
    ClaimRequest,
    CompleteReport,
    HeartbeatRequest,
    RegisterRequest,
    RenewRequest,
    StartReport,
    Verdict,
    parse_claims,
    parse_features,
    parse_heartbeat,
)
from tests.control_plane.support import DEADLINE_S, MACHINE, Operator

REGISTER = RegisterRequest(
    agent_id="agent-1",
    machine_id=MACHINE,
    version="0.1.0",
    hostname="gpu-7",
    ip_address="192.0.2.7",
    agent_port=8090,
    max_workers=2,
    hardware={"cpu_cores": 8},
)
BEAT = HeartbeatRequest(agent_id="agent-1", machine_id=MACHINE, metrics={"memory_used_gb": 3}, state="ready")
CLAIM = ClaimRequest(agent_id="agent-1", machine_id=MACHINE, limit=1, request_id="r1", wait_sec=1)


@pytest.fixture(params=[False, True], ids=["strict", "compat"])
async def server(request: pytest.FixtureRequest, settings: Settings) -> AsyncGenerator[Server]:
    """A plane of either kind."""
    async with serve(dataclasses.replace(settings, compat=request.param)) as server:
        yield server


@pytest.fixture
async def client(server: Server, session: aiohttp.ClientSession, tmp_path: Path) -> AsyncGenerator[ControlPlane]:
    """The agent's client, with the token of an enrolled machine in a file."""
    token_file = tmp_path / "token"
    token_file.write_text(await Operator(server, session).enrol())
    async with ControlPlane(server.url, token_file=token_file, timeout_s=DEADLINE_S, clock=SystemClock()) as client:
        yield client


async def test_task_from_claim_to_result(server: Server, client: ControlPlane, session: aiohttp.ClientSession) -> None:
    """Register, claim, start, renew, progress, complete, and the completion once more."""
    operator = Operator(server, session)
    registered = await client.register(REGISTER)
    assert parse_features(registered.answer.data) == (set() if server.settings.compat else {"release"})
    assert not parse_heartbeat((await client.heartbeat(BEAT)).answer.data).needs_collect
    [task_id] = await operator.submit({"command": "echo", "args": ["hello"], "env": {"A": "1"}})
    [claim] = parse_claims((await client.claim(CLAIM)).answer.data)
    assert isinstance(claim, Claim)
    assert (claim.task.args, claim.task.env) == (("hello",), {"A": "1"})
    attempt_id: AttemptId = claim.attempt_id
    names = {"agent_id": "agent-1", "attempt_id": attempt_id}
    start = StartReport(agent_id="agent-1", attempt_id=attempt_id, process_id=42, run_no=1)
    renew = RenewRequest(agent_id="agent-1", attempt_id=attempt_id, extend_sec=60)
    complete = CompleteReport(
        agent_id="agent-1",
        attempt_id=attempt_id,
        exit_code=0,
        stdout="hello\n",
        stderr="",
        error="",
        status=TaskState.COMPLETED,
        cause=Cause.SUCCEEDED,
        ended_at="2026-02-05T12:00:00.000Z",
        runs=1,
    )
    replies = [
        await client.report("start", claim.task.task_id, start.body()),
        await client.renew(claim.task.task_id, renew, timeout_s=DEADLINE_S),
        await client.report("progress", claim.task.task_id, {**names, "percent": 50.0, "message": "half"}),
        await client.report("complete", claim.task.task_id, complete.body()),
        await client.report("complete", claim.task.task_id, complete.body()),
    ]
    assert [reply.verdict for reply in replies] == [Verdict.OK] * 5
    found = await operator.task(task_id)
    assert (found["status"], found["completions"]["accepted"]) == ("completed", 1)
    late = await client.renew(claim.task.task_id, renew, timeout_s=DEADLINE_S)
    assert late.verdict is Verdict.FINISHED


async def test_client_reads_every_fault(server: Server, client: ControlPlane) -> None:
    """Lost connections, stray answers and hiccups are answers of the right kind."""
    server.faults.order(
        "register",
        faults.DropBefore(),
        faults.DropAfter(),
        faults.Respond(503, b"busy", {"Retry-After": "7"}),
        faults.Respond(200, b"{"),
        faults.hiccup(404),
        faults.hiccup(410, in_body=True),
    )
    replies = [await client.register(REGISTER) for _ in range(7)]
    assert [reply.verdict for reply in replies] == [
        Verdict.RETRY,
        Verdict.RETRY,
        Verdict.RETRY,
        Verdict.RETRY,
        Verdict.AMBIGUOUS,
        Verdict.AMBIGUOUS,
        Verdict.OK,
    ]
    assert replies[2].answer.retry_after_s == 7


async def test_rotated_token_is_read_again(
    server: Server, client: ControlPlane, session: aiohttp.ClientSession, tmp_path: Path
) -> None:
    """F17: a refused token is replaced by the file's new one within the same call."""
    assert (await client.register(REGISTER)).verdict is Verdict.OK
    new = await Operator(server, session).enrol()
    assert (await client.register(REGISTER)).verdict is Verdict.UNAUTHORIZED
    (tmp_path / "token").write_text(new)
    assert (await client.register(REGISTER)).verdict is Verdict.OK


async def test_f16_a_pause_after_no_answer_ends_when_another_call_is_answered(
    server: Server, client: ControlPlane
) -> None:
    """F16: nobody waits out a backoff of minutes when contact is back; what the plane has put off itself waits on."""
    server.faults.order("register", faults.DropBefore(), faults.Respond(503, b"busy"), faults.DropBefore())
    unheard = await client.register(REGISTER)
    busy = await client.register(REGISTER)
    put_off = asyncio.create_task(client.pause(3600.0, busy.answer))
    waiting = asyncio.create_task(client.pause(3600.0, unheard.answer))
    await client.register(REGISTER)
    assert not waiting.done()
    assert (await client.register(REGISTER)).verdict is Verdict.OK
    async with asyncio.timeout(DEADLINE_S):
        await waiting
    assert not put_off.done()
    put_off.cancel()


async def test_a_pause_is_no_longer_than_asked_for(client: ControlPlane) -> None:
    """Without any contact it ends in its own time."""
    async with asyncio.timeout(DEADLINE_S):
        await client.pause(0.05, Answer(Verdict.RETRY, "no connection"))
