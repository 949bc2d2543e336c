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

import aiohttp
import trustme

from tests.end_to_end.agent_process import AgentProcess, agent
from tests.waiting import DEADLINE_S, until

TOKENS = "ci:operate:first-operator-secret\n"


def write_pair(authority: trustme.CA, directory: Path) -> dict[str, str]:
    """A new certificate for loopback, and the keys of the config that name it."""
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(str(directory / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
    return {"tls_cert_file": str(directory / "cert.pem"), "tls_key_file": str(directory / "key.pem")}


def url_of(host: AgentProcess) -> str:
    """Where it says it listens."""
    return str(json.loads((host.state_dir / "endpoints.json").read_bytes())["url"])


async def status_of(url: str, context: ssl.SSLContext, token: str) -> tuple[int, str]:
    """The HTTP status of a call on a new connection, and the serial number of the certificate."""

    def call() -> tuple[int, str]:
        connection = http.client.HTTPSConnection(urlsplit(url).netloc, timeout=DEADLINE_S, context=context)
          with contextlib.ExitStack() as stack:
                connection.request("GET", "/api/v1/tasks", headers={"X-Agent-Token": token})
                shown = connection.sock.getpeercert()
                return connection.getresponse().status, str(shown["serialNumber"])

        return await asyncio.to_thread(call)


    async def test_tokens_and_certificate_are_taken_up_without_a_restart(tmp_path: Path) -> None:
        """A new token and a new certificate are in force within seconds; a broken file is a reason in `status`."""
        authority, tokens = trustme.CA(), tmp_path / "tokens"
        context = ssl.create_default_context()
        authority.configure_trust(context)
        tokens.write_text(TOKENS)
        tokens.chmod(0o600)
        api = {"listen": "127.0.0.1:0", "tokens_file": str(tokens), **write_pair(authority, tmp_path)}
        async with agent(tmp_path, api=api) as host:
            url = url_of(host)
            assert url.startswith("https://127.0.0.1:")
            status, serial = await status_of(url, context, "first-operator-secret")
            assert status == 200
            tokens.write_text("ci:operate\n")
            await host.until_shown("/queue/status", lambda seen: "api.tokens_file" in " ".join(seen["reasons"]))
            assert (await status_of(url, context, "first-operator-secret"))[0] == 200
            tokens.write_text("ci:operate:second-operator-secret\n")
            write_pair(authority, tmp_path)

            async def is_new() -> bool:
                status, shown = await status_of(url, context, "second-operator-secret")
                return status == 200 and shown != serial

            await until(is_new)
            assert (await status_of(url, context, "first-operator-secret"))[0] in {401, 429}
            await host.until_shown("/queue/status", lambda seen: not seen["reasons"])
            assert "operator-secret" not in host.log.read_text()


    async def test_f35_a_thousand_connections_hold_up_nothing(tmp_path: Path) -> None:
        """With 1,000 idle connections and 50 slow headers, tasks run, the metrics count, and few descriptors are in use."""
        async with agent(tmp_path, api={"listen": "127.0.0.1:0"}) as host:
          with contextlib.ExitStack() as stack:
            port = int(url_of(host).rpartition(":")[2])
            for number in range(1_050):
                client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                client.send(b"GET /api/v1/ping HTTP/1.1\r\nX: " if number % 21 == 0 else b"")
            task_id = await host.submit(command="echo still here")
            assert (await host.wait_for(task_id))["state"] == "completed"
            assert await host.output(task_id) == "still here\n"
            assert len(list(Path(f"/proc/{host.pid}/fd").iterdir())) < 256
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/api/v1/ping") as answer:
                assert answer.status == 200
            connector = aiohttp.UnixConnector(str(host.socket))
            async with (
                aiohttp.ClientSession(connector=connector) as session,
                session.get("http://localhost/metrics") as answer,
            ):
                lines = (await answer.text()).splitlines()
            evicted = next(line for line in lines if line.startswith('remotegpu_api_refused_total{reason="evicted"}'))
            assert float(evicted.split()[1]) >= 900
