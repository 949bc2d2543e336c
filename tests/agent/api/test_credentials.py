"""Tokens and certificates change while the agent runs; a broken new file changes nothing, and is said loudly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from pathlib import Path

import pytest
import structlog.testing
import trustme

from remotegpu_agent.api import TlsPair
from remotegpu_schemas.errors import Misconfigured
from tests.agent.api.conftest import OPERATOR, Api, StartApi
from tests.agent.api.fake_operations import TASK_ID, chunk
from tests.agent.api.raw import Raw, connect
from tests.waiting import until, until_so

QUICK_S = 0.02
LOGS = (
    f"GET /api/v1/tasks/{TASK_ID}/logs HTTP/1.1\r\nHost: localhost\r\nX-Agent-Token: operator-secret\r\n\r\n"
).encode()
NEW = {"X-Agent-Token": "a-new-and-longer-secret"}


def replace(path: Path, text: bytes | str) -> None:
    """As careful programs do: write beside it, and rename."""
    draft = path.with_name(path.name + ".new")
    draft.write_bytes(text.encode() if isinstance(text, str) else text)
    draft.chmod(0o600)
    draft.rename(path)


async def status_of(api: Api, headers: dict[str, str], method: str = "GET", path: str = "/api/v1/tasks") -> int:
    """The HTTP status of a call with this token."""
    return (await api.call(method, path, headers=headers))[0]


# --- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["rename", "in-place", "link"])
async def test_new_tokens_are_in_force_without_a_restart(start_api: StartApi, short_dir: Path, how: str) -> None:
    """A token that was added is accepted, one that was taken out is refused, and a role changes."""
    path = short_dir / "tokens"
    if how == "link":
        path.rename(short_dir / "first")
        path.symlink_to("first")
    async with start_api(look_at_files_s=QUICK_S) as api:
        assert await status_of(api, NEW) == 401
        text = "ci:operate:a-new-and-longer-secret\nboard:operate:reader-secret\n"
        if how == "link":
            (short_dir / "second").write_text(text)
            (short_dir / "next").symlink_to("second")
            (short_dir / "next").rename(path)
        elif how == "rename":
            replace(path, text)
        else:
            path.write_text(text)

        async def is_new() -> bool:
            return await status_of(api, NEW) == 200

        await until(is_new)
        assert await status_of(api, OPERATOR) in {401, 429}
        cancel = f"/api/v1/tasks/{TASK_ID}/cancel"
        assert await status_of(api, {"X-Agent-Token": "reader-secret"}, "POST", cancel) == 200


@pytest.mark.parametrize("content", ["", "# nothing\n", "ci:admin:a-new-secret\n", "x" * 70_000, None])
async def test_a_broken_tokens_file_keeps_the_old_tokens(
    start_api: StartApi, short_dir: Path, content: str | None
) -> None:
    """The old tokens stay in force, the log says so as an error without a token in it, and a mended file is read."""
    path = short_dir / "tokens"
    async with start_api(look_at_files_s=QUICK_S) as api:
        with structlog.testing.capture_logs() as logs:
            path.unlink() if content is None else replace(path, content)
            await until_so(lambda: bool(api.server.problems))
        assert [(line["event"], line["log_level"], line["what"]) for line in logs] == [
            ("api_file_not_reloaded", "error", "tokens")
        ]
        assert "a-new-secret" not in repr(logs)
        (problem,) = api.server.problems
        assert problem.startswith("api.tokens_file: ")
        assert problem.endswith("What was read before stays in force")
        assert await status_of(api, OPERATOR) == 200
        replace(path, "ci:operate:a-new-and-longer-secret\n")
        await until_so(lambda: not api.server.problems)
        assert await status_of(api, NEW) == 200


async def test_an_untouched_file_is_not_read_again(start_api: StartApi, short_dir: Path) -> None:
    """Looking costs no reading: the log says nothing while nothing changes."""
    async with start_api(look_at_files_s=0.001) as api:
        with structlog.testing.capture_logs() as logs:
            for _ in range(20):
                assert await status_of(api, OPERATOR) == 200
        assert not [line for line in logs if line["event"].startswith("api_file")]


# --- TLS -----------------------------------------------------------------------------------------------------------


def certificate(authority: trustme.CA, directory: Path) -> TlsPair:
    """Files with a new certificate for loopback and its key, in place of those that were there."""
    issued = authority.issue_cert("localhost", "127.0.0.1")
    pair = TlsPair(directory / "cert.pem", directory / "key.pem")
    replace(pair.key_file, issued.private_key_pem.bytes())
    replace(pair.cert_file, b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    return pair


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Who signs the certificates of a test."""
    return trustme.CA()


def client_context(authority: trustme.CA) -> ssl.SSLContext:
    """A client that trusts this authority only."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def raw_tls(port: int, authority: trustme.CA) -> contextlib.AbstractAsyncContextManager[Raw]:
    """A connection that keeps little of what is not read."""
    return connect(port, kept_bytes=65_536, context=client_context(authority))


async def serial_of(port: int, context: ssl.SSLContext) -> str:
    """The serial number of the certificate that a new connection is shown."""
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        shown = writer.get_extra_info("ssl_object").getpeercert()
        assert writer.get_extra_info("ssl_object").version() in {"TLSv1.2", "TLSv1.3"}
        return str(shown["serialNumber"])
    finally:
        writer.close()
        await writer.wait_closed()


async def test_tls(start_api: StartApi, authority: trustme.CA, short_dir: Path) -> None:
    """With a certificate the API is https, its address says so, callers are named, and the Unix socket is as before."""
    async with start_api(tls=certificate(authority, short_dir)) as api:
        assert api.url.startswith("https://127.0.0.1:")
        context = client_context(authority)
        async with api.tcp.post(f"{api.url}/api/v1/tasks/{TASK_ID}/cancel", headers=OPERATOR, ssl=context) as answer:
            assert answer.status == 200
        assert api.audit_lines()[0]["from"] == "127.0.0.1"
        assert (await api.call("GET", "/api/v1/tasks", session=api.unix, headers={}))[0] == 200


async def test_tls_with_a_big_answer(start_api: StartApi, authority: trustme.CA, short_dir: Path) -> None:
    """An answer of many records arrives whole."""
    async with start_api(tls=certificate(authority, short_dir)) as api:
        api.operations.log_text = "x" * 3_000_000
        url = f"{api.url}/api/v1/tasks/{TASK_ID}/logs"
        async with api.tcp.get(url, headers=OPERATOR, ssl=client_context(authority)) as answer:
            assert (await answer.json())["data"]["text"] == api.operations.log_text


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
async def test_old_tls_is_refused(start_api: StartApi, authority: trustme.CA, short_dir: Path) -> None:
    """TLS 1.1 gets no handshake, though the client would take it; TLS 1.2 does."""
    async with start_api(tls=certificate(authority, short_dir)) as api:
        context = client_context(authority)
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await serial_of(api.port, context)
        context = client_context(authority)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        assert await serial_of(api.port, context)


async def test_a_new_certificate_is_shown_without_a_restart(
    start_api: StartApi, authority: trustme.CA, short_dir: Path
) -> None:
    """New connections are shown the new certificate; one that is open goes on."""
    async with start_api(tls=certificate(authority, short_dir), look_at_files_s=QUICK_S) as api:
        context = client_context(authority)
        before = await serial_of(api.port, context)
        async with api.tcp.get(f"{api.url}/api/v1/ping", ssl=context) as answer:
            assert answer.status == 200
            certificate(authority, short_dir)

            async def is_new() -> bool:
                return await serial_of(api.port, context) != before

            await until(is_new)
        async with api.tcp.get(f"{api.url}/api/v1/ping", ssl=context) as answer:
            assert answer.status == 200


@pytest.mark.parametrize("broken", ["noise", "other-key", "missing"])
async def test_a_broken_pair_keeps_the_old_certificate(
    start_api: StartApi, authority: trustme.CA, short_dir: Path, broken: str
) -> None:
    """What is no certificate, has another's key, or is not there changes nothing, and is said as an error."""
    pair = certificate(authority, short_dir)
    async with start_api(tls=pair, look_at_files_s=QUICK_S) as api:
        context = client_context(authority)
        before = await serial_of(api.port, context)
        with structlog.testing.capture_logs() as logs:
            if broken == "missing":
                pair.key_file.unlink()
            elif broken == "noise":
                replace(pair.cert_file, "no certificate")
            else:
                replace(pair.key_file, authority.issue_cert("localhost").private_key_pem.bytes())
            await until_so(lambda: bool(api.server.problems))
        assert [line["log_level"] for line in logs if line["event"] == "api_file_not_reloaded"] == ["error"]
        assert api.server.problems[0].startswith("api.tls_cert_file: ")
        assert await serial_of(api.port, context) == before
        certificate(authority, short_dir)
        await until_so(lambda: not api.server.problems)
        assert await serial_of(api.port, context) != before


@pytest.mark.parametrize("broken", ["noise", "missing", "encrypted"])
async def test_a_first_pair_that_is_broken_is_one_sentence(
    start_api: StartApi, authority: trustme.CA, short_dir: Path, broken: str
) -> None:
    """At the start it is refused, with what to do; nobody is asked for a pass phrase."""
    pair = certificate(authority, short_dir)
    if broken == "missing":
        pair.cert_file.unlink()
    else:
        replace(pair.key_file, "noise" if broken == "noise" else encrypted_key())
    with pytest.raises(Misconfigured, match=r"^api\.tls_cert_file: .*(belongs together|readable by the agent)$"):
        async with start_api(tls=pair):
            pass


def encrypted_key() -> bytes:
    """A private key under a pass phrase."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"pass")
    )


async def test_f35_a_handshake_that_does_not_come(start_api: StartApi, authority: trustme.CA, short_dir: Path) -> None:
    """Who connects and never greets holds a place, but only until the deadline; others are served meanwhile."""
    pair = certificate(authority, short_dir)
    async with start_api(tls=pair, headers_deadline_s=0.3) as api:
        with socket.create_connection(("127.0.0.1", api.port)):
            await until_so(lambda: api.server.figures.connections == 1)
            assert await serial_of(api.port, client_context(authority))
            await until_so(lambda: api.server.figures.refused["handshake"] == 1)
        await until_so(lambda: api.server.figures.connections == 0)


async def test_f35_plain_http_to_a_tls_port(start_api: StartApi, authority: trustme.CA, short_dir: Path) -> None:
    """It gets no answer, and others are served."""
    async with start_api(tls=certificate(authority, short_dir)) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(b"GET /api/v1/ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP" not in await reader.read()
        writer.close()
        assert await serial_of(api.port, client_context(authority))


async def test_f35_a_slow_reader_over_tls(start_api: StartApi, authority: trustme.CA, short_dir: Path) -> None:
    """A follower that does not read loses its place over TLS, too."""
    async with start_api(tls=certificate(authority, short_dir), slow_reader_s=0.2) as api:
        for _ in range(100):
            api.operations.chunks.put_nowait(chunk("x" * 1_000_000))
        async with raw_tls(api.port, authority) as slow:
            await slow.send(LOGS.replace(b"/logs", b"/logs?follow=1"))
            async with asyncio.timeout(30):
                await api.operations.follower_closed.wait()
            await until_so(lambda: api.server.figures.connections == 0)
        assert api.operations.chunks.qsize() > 0


async def test_f35_a_big_answer_that_nobody_reads_over_tls(
    start_api: StartApi, authority: trustme.CA, short_dir: Path
) -> None:
    """What asyncio has handed to the layer below counts, too: the connection goes long before it would be idle."""
    async with start_api(tls=certificate(authority, short_dir), slow_reader_s=0.3) as api:
        api.operations.log_text = "x" * 20_000_000
        async with raw_tls(api.port, authority) as slow:
            await slow.send(LOGS)
            await until_so(lambda: api.server.figures.refused["slow_reader"] == 1)
            await until_so(lambda: api.server.figures.connections == 0)


async def test_f35_a_reader_over_tls_that_reads_gets_all(
    start_api: StartApi, authority: trustme.CA, short_dir: Path
) -> None:
    """A big answer that takes longer than the patience arrives whole, as long as some is taken all the time."""
    patience_s = 1.5  # longer than the kernel needs to find out about a small window that was closed (tcp(7))
    async with start_api(tls=certificate(authority, short_dir), slow_reader_s=patience_s, idle_s=patience_s) as api:
        api.operations.log_text = "x" * 5_000_000
        loop = asyncio.get_running_loop()
        started, got = loop.time(), 0
        async with raw_tls(api.port, authority) as slow, asyncio.timeout(60):
            await slow.send(LOGS)
            while piece := await slow.reader.read(20_000):
                got += len(piece)
                await asyncio.sleep(0.016)  # this reader's pace
        assert got > 5_000_000, api.server.figures
        assert loop.time() - started > 2 * patience_s
        assert api.server.figures.refused["slow_reader"] == 0


def test_the_pair_is_read_by_its_owner_only_once(authority: trustme.CA, tmp_path: Path) -> None:
    """A context stands for the files as they were: it goes on when they are gone."""
    pair = certificate(authority, tmp_path)
    context = pair.context()
    os.unlink(pair.key_file)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
