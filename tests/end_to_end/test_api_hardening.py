"""The API of a real agent: certificates and tokens that change under it, and connections that want nothing."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import trustme

from tests.end_to_end.agent_process import AgentProcess, agent
from tests.waiting import DEADLINE_S, until

FIRST, SECOND = "first-operator-secret", "second-operator-secret"


def write_pair(authority: trustme.CA, directory: Path) -> dict[str, str]:
    """A new certificate for loopback, and the keys of the config that name it."""
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(str(directory / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
    return {"tls_cert_file": str(directory / "cert.pem"), "tls_key_file": str(directory / "key.pem")}


def address_of(host: AgentProcess) -> tuple[str, str]:
    """Scheme and address of where it says it listens."""
    parts = urlsplit(json.loads((host.state_dir / "endpoints.json").read_bytes())["url"])
    return parts.scheme, parts.netloc


async def status_of(host: AgentProcess, context: ssl.SSLContext, token: str) -> tuple[int, str]:
    """The HTTP status of a call on a new connection, and the serial number of the certificate that it was shown."""

    def call() -> tuple[int, str]:
        connection = http.client.HTTPSConnection(address_of(host)[1], timeout=DEADLINE_S, context=context)
        with contextlib.closing(connection):
            connection.request("GET", "/api/v1/tasks", headers={"X-Agent-Token": token})
            shown = connection.sock.getpeercert()
            assert shown is not None
            return connection.getresponse().status, str(shown["serialNumber"])

    return await asyncio.to_thread(call)


async def test_tokens_and_certificate_are_taken_up_without_a_restart(tmp_path: Path) -> None:
    """A new token and a new certificate are in force within seconds; a broken file is a reason in `status`."""
    authority, tokens = trustme.CA(), tmp_path / "tokens"
    context = ssl.create_default_context()
    authority.configure_trust(context)
    tokens.write_text(f"ci:operate:{FIRST}\n")
    tokens.chmod(0o600)
    api = {"listen": "127.0.0.1:0", "tokens_file": str(tokens), **write_pair(authority, tmp_path)}
    async with agent(tmp_path, api=api) as host:
        assert address_of(host)[0] == "https"
        status, serial = await status_of(host, context, FIRST)
        assert status == 200
        tokens.write_text("ci:operate\n")
        await host.until_shown("/queue/status", lambda seen: "api.tokens_file" in " ".join(seen["reasons"]))
        assert (await status_of(host, context, FIRST))[0] == 200
        tokens.write_text(f"ci:operate:{SECOND}\n")
        write_pair(authority, tmp_path)

        async def is_new() -> bool:
            status, shown = await status_of(host, context, SECOND)
            return status == 200 and shown != serial

        await until(is_new)
        assert (await status_of(host, context, FIRST))[0] in {401, 429}
        await host.until_shown("/queue/status", lambda seen: not seen["reasons"])
        assert FIRST not in host.log.read_text()
        assert SECOND not in host.log.read_text()


async def test_f35_a_thousand_connections_hold_up_nothing(tmp_path: Path) -> None:
    """With 1,000 idle connections and 50 slow headers a task runs, others are served, and few descriptors are used."""
    async with agent(tmp_path, api={"listen": "127.0.0.1:0"}) as host:
        _, address = address_of(host)
        port = int(address.rpartition(":")[2])
        with contextlib.ExitStack() as stack:
            for number in range(1_050):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                client.send(b"GET /api/v1/ping HTTP/1.1\r\nX: " if number % 21 == 0 else b"")
            task_id = await host.submit(command="echo still here")
            assert (await host.wait_for(task_id))["state"] == "completed"
            assert await host.output(task_id) == "still here\n"
            assert len(list(Path(f"/proc/{host.pid}/fd").iterdir())) < 256
            assert await asyncio.to_thread(ping, address) == 200
            text = await asyncio.to_thread(metrics, host.socket)
        evicted = next(line for line in text.splitlines() if 'api_refused_total{reason="evicted"}' in line)
        assert float(evicted.split()[1]) >= 900


def ping(address: str) -> int:
    """The status of /ping on a new connection."""
    connection = http.client.HTTPConnection(address, timeout=DEADLINE_S)
    with contextlib.closing(connection):
        connection.request("GET", "/api/v1/ping")
        return connection.getresponse().status


def metrics(path: Path) -> str:
    """What Prometheus would read, over the Unix socket."""
    connection = http.client.HTTPConnection("localhost", timeout=DEADLINE_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection):
        connection.sock.connect(str(path))
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
