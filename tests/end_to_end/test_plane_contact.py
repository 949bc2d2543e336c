"""How an agent reaches its plane: tokens, TLS and proxies, each broken and mended while the agent runs."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
from pathlib import Path
from typing import Any, Final

import pytest
import trustme

from control_plane.faults import Respond
from tests import middle
from tests.end_to_end.agent_process import AgentProcess
from tests.end_to_end.fleet import MACHINE_ID, fleet
from tests.end_to_end.gates import Gate
from tests.waiting import DEADLINE_S

FAST: Final[dict[str, Any]] = {"control_plane": {"heartbeat_interval": 0.2, "long_poll": 1, "poll_interval": 0.1}}
NAME: Final = "plane.test"  # known to the proxy alone


async def _said(host: AgentProcess, *arguments: str) -> str:
    """What the program prints."""
    process = await asyncio.create_subprocess_exec(
        *host.command(*arguments), stdout=asyncio.subprocess.PIPE, env={**os.environ, **host.environ}
    )
    async with asyncio.timeout(DEADLINE_S):
        return (await process.communicate())[0].decode()


async def _metrics(host: AgentProcess) -> str:
    """The text for Prometheus."""
    session = host.session()
    async with session.get("http://localhost/api/v1/metrics") as answer:
        return await answer.text()


async def _degraded(host: AgentProcess, text: str) -> str:
    """What the status says of the control plane as soon as that has the text."""
    status = await host.until_shown("/queue/status", lambda status: text in (status["control_plane"]["error"] or ""))
    assert (status["state"], status["control_plane"]["is_connected"]) == ("degraded", False)
    return str(status["control_plane"]["error"])


async def _ready(host: AgentProcess) -> None:
    status = await host.until_shown("/queue/status", lambda status: status["state"] == "ready")
    assert (status["control_plane"]["is_connected"], status["control_plane"]["error"]) == (True, None)


@pytest.mark.parametrize("status", [401, 403])
async def test_f17_a_refused_token_is_seen_everywhere_and_heals_by_its_file(tmp_path: Path, status: int) -> None:
    """F17: what runs goes on, results are kept; log, metrics and status say what is wrong; a new token file heals it.

    The results of what ended meanwhile arrive once each, and the same process of the agent has done it all.
    """
    gate = Gate(tmp_path / "gate")
    async with fleet(tmp_path, FAST) as all_of_it:
        host, faults = all_of_it.host, all_of_it.plane.faults
        task_ids = await all_of_it.submit(*[{"command": f"{gate.wait}; echo out-{number}"} for number in range(4)])
        for task_id in task_ids:
            await host.wait_running(task_id)
        pid, new_token = host.pid, await all_of_it.operator.enrol(MACHINE_ID)
        if status == 403:
            for call in ("heartbeat", "claim", "start", "renew", "complete"):
                faults.order_always(call, Respond(403, json.dumps({"code": 403, "message": "not yours"}).encode()))
        said = await _degraded(host, "it refuses the token")
        assert f"HTTP {status}" in said
        assert str(tmp_path / "token") in said
        assert "it refuses the token" in await _said(host, "status")
        metrics = await _metrics(host)
        assert 'remotegpu_control_plane_problem{problem="token_refused"} 1.0' in metrics
        assert "remotegpu_control_plane_connected 0.0" in metrics
        assert any(event["event"].startswith("the control plane refuses the token") for event in host.events())
        gate.open()
        for task_id in task_ids:
            assert (await host.wait_for(task_id))["state"] == "completed"
        assert (await host.get("/queue/status"))["reports_waiting"] >= 4
        assert [(await all_of_it.operator.task(task_id))["status"] for task_id in task_ids] == ["running"] * 4
        faults.clear()
        (tmp_path / "token").write_text(new_token)
        tasks = await all_of_it.ended(task_ids)
        assert [(task["status"], task["completions"]["accepted"]) for task in tasks] == [("completed", 1)] * 4
        assert [task["result"]["stdout"] for task in tasks] == [f"out-{number}\n" for number in range(4)]
        await _ready(host)
        assert 'remotegpu_control_plane_problem{problem="token_refused"} 0.0' in await _metrics(host)
        assert host.pid == pid
        assert host.is_running
        assert new_token not in host.log.read_text()


async def test_f17_reports_that_are_refused_are_tried_slowly(tmp_path: Path) -> None:
    """F17: while a token is refused, the results of 4 tasks are kept and cost a few calls each in two seconds."""
    gate = Gate(tmp_path / "gate")
    async with fleet(tmp_path, FAST) as all_of_it:
        host, faults = all_of_it.host, all_of_it.plane.faults
        faults.order_always("complete", Respond(401))
        task_ids = await all_of_it.submit(*[{"command": gate.wait}] * 4)
        for task_id in task_ids:
            await host.wait_running(task_id)
        gate.open()
        await faults.wait_calls("complete", 4, DEADLINE_S)
        beats = faults.calls["heartbeat"]
        await faults.wait_calls("heartbeat", beats + 10, DEADLINE_S)  # two seconds of the agent's own time
        assert faults.calls["complete"] <= 4 * 4
        status = await host.get("/queue/status")
        assert (status["reports_waiting"], status["dead_letters"]) == (4, 0)


async def test_f17_an_agent_that_starts_with_a_bad_token_works_and_registers_once_it_is_good(tmp_path: Path) -> None:
    """F17: local tasks run meanwhile, and what is said names the file."""
    async with fleet(tmp_path, FAST, is_started=False) as all_of_it:
        host, token = all_of_it.host, (tmp_path / "token").read_text()
        (tmp_path / "token").write_text("wrong")
        await host.start()
        await _degraded(host, str(tmp_path / "token"))
        assert (await host.wait_for(await host.submit(command="true")))["state"] == "completed"
        (tmp_path / "token").write_text(token)
        assert (await all_of_it.task({"command": "true"}))["status"] == "completed"


async def test_f17_the_token_as_a_credential_of_systemd(tmp_path: Path) -> None:
    """F17: without `token_file` the credential `control-plane-token` is used, and read again when it is refused."""
    async with fleet(tmp_path, FAST, is_started=False) as all_of_it:
        host = all_of_it.host
        credentials = tmp_path / "credentials"
        credentials.mkdir()
        (tmp_path / "token").rename(credentials / "control-plane-token")
        host.configure({"control_plane": {"token_file": None}})
        host.environ["CREDENTIALS_DIRECTORY"] = str(credentials)
        await host.start()
        assert (await all_of_it.task({"command": "true"}))["status"] == "completed"
        new_token = await all_of_it.operator.enrol(MACHINE_ID)
        await _degraded(host, "it refuses the token")
        (credentials / "control-plane-token").write_text(new_token)
        assert (await all_of_it.task({"command": "true"}))["status"] == "completed"


async def _start_on(host: AgentProcess, url: str, **more: Any) -> None:
    host.configure({"control_plane": {"url": url, **more}})
    await host.start()


async def test_tls_that_breaks_and_is_mended_while_the_agent_runs(tmp_path: Path) -> None:
    """A task runs on while the plane's certificate is out of date, then of another CA, until the agent's files follow.

    The status names each in words; no restart is needed, and the result arrives once.
    """
    ca, other = trustme.CA(), trustme.CA()
    ca_file, cert, key = (tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem"))
    middle.write_ca(ca, ca_file)
    middle.write_pair(ca.issue_cert("agent"), cert, key)
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=2)
    old = ca.issue_cert(middle.HOST, not_before=long_ago - datetime.timedelta(days=9), not_after=long_ago)
    gate = Gate(tmp_path / "gate")
    async with fleet(tmp_path, FAST, is_started=False) as all_of_it:
        host, relay = all_of_it.host, middle.relay_to(all_of_it.plane.port)
        async with middle.listening(relay, middle.serving(ca.issue_cert(middle.HOST), clients=ca)) as port:
            files = {"ca_file": str(ca_file), "client_cert_file": str(cert), "client_key_file": str(key)}
            await _start_on(host, f"https://{middle.HOST}:{port}", **files)
            [task_id] = await all_of_it.submit({"command": gate.wait})
            await host.wait_running(task_id)
        async with middle.listening(relay, middle.serving(old, clients=ca), port):
            await _degraded(host, "the certificate of 127.0.0.1 has expired")
            assert "the certificate of 127.0.0.1 has expired" in await _said(host, "status")
        async with middle.listening(relay, middle.serving(other.issue_cert(middle.HOST), clients=other), port):
            await _degraded(host, "is from a CA that is not trusted here")
            gate.open()
            assert (await host.wait_for(task_id))["state"] == "completed"
            middle.write_ca(other, ca_file)
            middle.write_pair(other.issue_cert("agent"), cert, key)
            [task] = await all_of_it.ended([task_id])
            assert (task["status"], task["completions"]["accepted"]) == ("completed", 1)
            await _ready(host)
            await host.stop()


async def test_a_proxy_of_the_environment(tmp_path: Path) -> None:
    """HTTPS_PROXY with user and password: the whole way of a task; nothing that the agent writes has the password.

    A proxy that refuses is named in the status, and used again once it does not.
    """
    ca = trustme.CA()
    ca_file = middle.write_ca(ca, tmp_path / "ca.pem")
    async with fleet(tmp_path, FAST, is_started=False) as all_of_it:
        host = all_of_it.host
        tls = middle.serving(ca.issue_cert(NAME))
        async with middle.listening(middle.relay_to(all_of_it.plane.port), tls) as port:
            proxy = middle.Proxy({f"{NAME}:{port}": port}, credentials="gpu:pr0xy-secret")
            async with middle.listening(proxy.respond) as proxy_port:
                host.environ |= {
                    "HTTPS_PROXY": f"http://gpu:pr0xy-secret@{middle.HOST}:{proxy_port}",
                    "NO_PROXY": "other.test",
                }
                await _start_on(host, f"https://{NAME}:{port}", ca_file=str(ca_file))
                task = await all_of_it.task({"command": "echo by proxy"})
                assert task["result"]["stdout"] == "by proxy\n"
                assert {line.split()[0] for line in proxy.asked} == {"CONNECT"}
                proxy.credentials = "gpu:another"
                proxy.cut()
                said = await _degraded(host, "refuses to connect")
                assert said.startswith(
                    f"the proxy {middle.HOST}:{proxy_port} refuses to connect to {NAME}:{port}: HTTP 407"
                )
                proxy.credentials = "gpu:pr0xy-secret"
                await _ready(host)
                doctor = await _said(host, "doctor")
                assert f"reached by way of the proxy {middle.HOST}:{proxy_port}" in doctor
                assert "answers and takes the token" in doctor
                await host.stop()
    written = [path for path in [host.log, *host.state_dir.rglob("*")] if path.is_file()]
    assert host.log in written
    assert not [path for path in written if b"pr0xy-secret" in path.read_bytes()]
