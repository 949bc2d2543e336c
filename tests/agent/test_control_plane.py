"""The client of the control plane against real servers over loopback: TLS, proxies, tokens, bounds and plain words."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gzip
import json
import ssl
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import pytest
import trustme
from structlog.testing import capture_logs

from remotegpu_agent.clock import SystemClock
from remotegpu_agent.contact import Problem
from remotegpu_agent.control_plane import ControlPlane, Reply
from remotegpu_agent.proxies import proxy_for
from remotegpu_agent.tls import TlsFiles
from remotegpu_schemas import limits
from remotegpu_schemas.errors import Misconfigured
from remotegpu_schemas.wire import ClaimRequest, HeartbeatRequest, Verdict
from tests import middle
from tests.waiting import DEADLINE_S

TOKEN: Final = "hush-hush"
BEAT: Final = HeartbeatRequest(agent_id="agent-1", machine_id="machine-1", metrics={}, state="ready")
CLAIM: Final = ClaimRequest(agent_id="agent-1", machine_id="machine-1", limit=1, request_id="r1")
ENVELOPE: Final = b'{"code": 0, "message": "ok", "data": {}}'
NAME: Final = "plane.test"  # known to the proxy alone


def answer(body: bytes = ENVELOPE, status: str = "200 OK", *headers: str, length: int | None = None) -> bytes:
    """An HTTP answer; `length` is what it says of its body where that is not true."""
    size = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {size}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


FINE: Final = middle.saying(answer())


@contextlib.asynccontextmanager
async def client(
    directory: Path, url: str, *, tls: TlsFiles | None = None, proxy: str | None = None, timeout_s: float = DEADLINE_S
) -> AsyncGenerator[ControlPlane]:
    """The agent's client, with a token in a file; `proxy` as HTTPS_PROXY and HTTP_PROXY have it."""
    token_file = directory / "token"
    token_file.write_text(TOKEN)
    environ = {"HTTPS_PROXY": proxy, "HTTP_PROXY": proxy} if proxy is not None else {}
    async with ControlPlane(
        url, token_file=token_file, timeout_s=timeout_s, clock=SystemClock(), tls=tls, proxy=proxy_for(url, environ)
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    """Who signed the plane's certificate."""
    return trustme.CA()


@pytest.fixture(scope="module")
def stranger() -> trustme.CA:
    """Another CA."""
    return trustme.CA()


@pytest.fixture(scope="module")
def plane_tls(ca: trustme.CA) -> ssl.SSLContext:
    """TLS of a plane with a good certificate."""
    return middle.serving(ca.issue_cert(middle.HOST, NAME))


@pytest.fixture
def trust(ca: trustme.CA, tmp_path: Path) -> TlsFiles:
    """The CA, as `control_plane.ca_file`."""
    return TlsFiles(ca_file=middle.write_ca(ca, tmp_path / "ca.pem"))


# --- TLS ---


async def test_own_ca(plane_tls: ssl.SSLContext, trust: TlsFiles, tmp_path: Path) -> None:
    """A plane whose certificate is from the CA in `ca_file` is reached."""
    async with (
        middle.listening(FINE, plane_tls) as port,
        client(tmp_path, f"https://{middle.HOST}:{port}", tls=trust) as plane,
    ):
        assert (await plane.heartbeat(BEAT)).verdict is Verdict.OK
        assert (plane.contact.is_connected, plane.contact.error, plane.contact.problem) == (True, None, None)


async def refused_contact(plane: ControlPlane) -> tuple[Problem | None, str]:
    """What a call says that gets no answer; log and contact say the same, and nothing shows the token."""
    with capture_logs() as logs:
        reply = await plane.heartbeat(BEAT)
    assert reply.verdict is Verdict.RETRY
    [line] = [line for line in logs if line["log_level"] == "warning"]
    assert line["error"] == plane.contact.error == reply.answer.message
    assert TOKEN not in json.dumps(logs, default=str)
    assert not plane.contact.is_connected
    return plane.contact.problem, reply.answer.message


async def test_unknown_ca(plane_tls: ssl.SSLContext, stranger: trustme.CA, tmp_path: Path) -> None:
    """It is said that the CA is not trusted, and which key names one."""
    files = TlsFiles(ca_file=middle.write_ca(stranger, tmp_path / "ca.pem"))
    async with (
        middle.listening(FINE, plane_tls) as port,
        client(tmp_path, f"https://{middle.HOST}:{port}", tls=files) as plane,
    ):
        problem, text = await refused_contact(plane)
    assert problem is Problem.TLS
    assert text.startswith("the certificate of 127.0.0.1 is from a CA that is not trusted here")
    assert "control_plane.ca_file" in text


@pytest.mark.parametrize(
    ("days_from", "days_to", "text"),
    [(-9, -2, "the certificate of 127.0.0.1 has expired"), (2, 9, "the certificate of 127.0.0.1 is not valid yet")],
)
async def test_certificate_out_of_its_time(
    ca: trustme.CA, trust: TlsFiles, tmp_path: Path, days_from: int, days_to: int, text: str
) -> None:
    """Too old and too young are told apart, and the clock is named."""
    now = datetime.datetime.now(datetime.UTC)
    certificate = ca.issue_cert(
        middle.HOST,
        not_before=now + datetime.timedelta(days=days_from),
        not_after=now + datetime.timedelta(days=days_to),
    )
    async with (
        middle.listening(FINE, middle.serving(certificate)) as port,
        client(tmp_path, f"https://{middle.HOST}:{port}", tls=trust) as plane,
    ):
        problem, said = await refused_contact(plane)
    assert problem is Problem.TLS
    assert said.startswith(text)
    assert "clock" in said


async def test_certificate_for_another_name(ca: trustme.CA, trust: TlsFiles, tmp_path: Path) -> None:
    """It is said for which name it is not, and what to do."""
    tls = middle.serving(ca.issue_cert("other.test"))
    async with (
        middle.listening(FINE, tls) as port,
        client(tmp_path, f"https://{middle.HOST}:{port}", tls=trust) as plane,
    ):
        problem, text = await refused_contact(plane)
    assert problem is Problem.TLS
    assert text.startswith("the certificate of 127.0.0.1 is for another host name")
    assert "control_plane.url" in text


async def test_http_to_a_port_of_tls(plane_tls: ssl.SSLContext, tmp_path: Path) -> None:
    """The remedy is named: https."""
    async with middle.listening(FINE, plane_tls) as port, client(tmp_path, f"http://{middle.HOST}:{port}") as plane:
        problem, text = await refused_contact(plane)
    assert problem is Problem.UNREACHABLE
    assert text.endswith("if that port speaks TLS, control_plane.url must begin with https")


async def test_https_to_a_port_of_http(trust: TlsFiles, tmp_path: Path) -> None:
    """It is said that there is no TLS."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer(b"", "400 Bad Request"))
        await writer.drain()

    async with middle.listening(respond) as port, client(tmp_path, f"https://{middle.HOST}:{port}", tls=trust) as plane:
        problem, text = await refused_contact(plane)
    assert problem is Problem.TLS
    assert text.startswith("this port of 127.0.0.1 does not speak TLS")


async def test_client_certificate(ca: trustme.CA, stranger: trustme.CA, trust: TlsFiles, tmp_path: Path) -> None:
    """A plane that wants one answers those that have it, and what a refusal may be is said."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    files = TlsFiles(trust.ca_file, cert, key)
    tls = middle.serving(ca.issue_cert(middle.HOST), clients=ca)
    async with middle.listening(FINE, tls) as port:
        url = f"https://{middle.HOST}:{port}"
        async with client(tmp_path, url, tls=trust) as plane:
            assert "client certificate" in (await refused_contact(plane))[1]
        middle.write_pair(stranger.issue_cert("agent-1"), cert, key)
        async with client(tmp_path, url, tls=files) as plane:
            assert "client certificate" in (await refused_contact(plane))[1]
        middle.write_pair(ca.issue_cert("agent-1"), cert, key)
        async with client(tmp_path, url, tls=files) as plane:
            assert (await plane.heartbeat(BEAT)).verdict is Verdict.OK


async def test_renewed_files_are_used_without_a_restart(
    ca: trustme.CA, stranger: trustme.CA, trust: TlsFiles, tmp_path: Path
) -> None:
    """CA and client certificate are both replaced on disk; half of a pair leaves the earlier one in use."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    middle.write_pair(ca.issue_cert("agent-1"), cert, key)
    assert trust.ca_file is not None
    async with contextlib.AsyncExitStack() as stack:
        old_tls = middle.serving(ca.issue_cert(middle.HOST), clients=ca)
        plane = None
        async with middle.listening(FINE, old_tls) as port:
            plane = await stack.enter_async_context(
                client(tmp_path, f"https://{middle.HOST}:{port}", tls=TlsFiles(trust.ca_file, cert, key))
            )
            assert (await plane.heartbeat(BEAT)).verdict is Verdict.OK
            renewed = stranger.issue_cert("agent-1")
            renewed.private_key_pem.write_to_path(key)
            with capture_logs() as logs:
                assert (await plane.heartbeat(BEAT)).verdict is Verdict.OK
                assert (await plane.heartbeat(BEAT)).verdict is Verdict.OK
            [line] = logs
            assert line["event"].endswith("cannot be loaded; the earlier ones stay in use")
        new_tls = middle.serving(stranger.issue_cert(middle.HOST), clients=stranger)
        async with middle.listening(FINE, new_tls, port):
            assert plane.contact.is_connected
            assert (await refused_contact(plane))[0] is Problem.TLS
            middle.write_pair(renewed, cert, key)
            middle.write_ca(stranger, trust.ca_file)
            assert (await plane.heartbeat(BEAT)).verdict is Verdict.OK


async def test_certificates_that_cannot_be_used_are_refused_at_the_start(tmp_path: Path) -> None:
    """The keys are named; nobody is asked for a pass phrase."""
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\n")
    with pytest.raises(Misconfigured, match=r"control_plane\.ca_file"):
        async with client(tmp_path, "https://plane.test", tls=TlsFiles(ca_file=broken)):
            pass


# --- proxies ---


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_by_way_of_a_proxy(plane_tls: ssl.SSLContext, trust: TlsFiles, tmp_path: Path, scheme: str) -> None:
    """The proxy knows the plane's name, the agent need not; it is given user and password, and no log has them."""
    async with middle.listening(FINE, plane_tls if scheme == "https" else None) as port:
        url = f"{scheme}://{NAME}:{port}"
        proxy = middle.Proxy({f"{NAME}:{port}": port}, credentials="gpu@host:s/ecret")
        async with middle.listening(proxy.respond) as proxy_port:
            with capture_logs() as logs:
                address = f"http://gpu%40host:s%2Fecret@{middle.HOST}:{proxy_port}"
                async with client(tmp_path, url, tls=trust, proxy=address) as plane:
                    assert (await plane.heartbeat(BEAT)).verdict is Verdict.OK
    [asked] = proxy.asked
    assert asked.startswith(f"CONNECT {NAME}:{port} " if scheme == "https" else f"POST {url}/api/v1/agent/heartbeat ")
    assert (TOKEN.encode() in proxy.heads[0]) == (scheme == "http"), "a tunnel's proxy must not see the token"
    assert f"{middle.HOST}:{proxy_port}" in str(logs)
    assert "ecret" not in str(logs)


async def test_tls_is_checked_through_the_tunnel(stranger: trustme.CA, trust: TlsFiles, tmp_path: Path) -> None:
    """A proxy that answers in the plane's place with a certificate of its own is found out before the token is sent."""
    seen: list[bytes] = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read(1))

    async with middle.listening(respond, middle.serving(stranger.issue_cert(NAME))) as port:
        proxy = middle.Proxy({f"{NAME}:{port}": port})
        async with (
            middle.listening(proxy.respond) as proxy_port,
            client(tmp_path, f"https://{NAME}:{port}", tls=trust, proxy=f"{middle.HOST}:{proxy_port}") as plane,
        ):
            problem, text = await refused_contact(plane)
    assert problem is Problem.TLS
    assert text.startswith(f"the certificate of {NAME} is from a CA")
    assert not any(seen)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_refused_by_the_proxy(trust: TlsFiles, tmp_path: Path, scheme: str) -> None:
    """A wrong password is the proxy's refusal, not the plane's; the variable is named, its value is not."""
    proxy = middle.Proxy({}, credentials="gpu:right")
    async with middle.listening(proxy.respond) as port:
        address = f"http://gpu:wr0ng@{middle.HOST}:{port}"
        async with client(tmp_path, f"{scheme}://{NAME}", tls=trust, proxy=address) as plane:
            problem, text = await refused_contact(plane)
    assert problem is Problem.PROXY
    assert text.startswith(
        f"the proxy {middle.HOST}:{port} refuses to connect to {NAME}:{443 if scheme == 'https' else 80}"
    )
    assert f"{scheme.upper()}_PROXY=http://USER:PASSWORD@HOST:PORT" in text
    assert "wr0ng" not in text


async def test_a_tunnel_that_is_not_allowed(trust: TlsFiles, tmp_path: Path) -> None:
    """The proxy's status is told, and what can be done."""
    proxy = middle.Proxy({}, refusal=b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    async with (
        middle.listening(proxy.respond) as port,
        client(tmp_path, f"https://{NAME}", tls=trust, proxy=f"http://{middle.HOST}:{port}") as plane,
    ):
        problem, text = await refused_contact(plane)
    assert problem is Problem.PROXY
    assert "HTTP 403" in text
    assert "NO_PROXY" in text


async def test_no_proxy_there(trust: TlsFiles, tmp_path: Path) -> None:
    """A proxy that is down is told apart from a plane that is."""
    async with middle.listening(FINE) as port:
        pass
    async with client(tmp_path, f"https://{NAME}", tls=trust, proxy=f"http://u:s3cret@{middle.HOST}:{port}") as plane:
        problem, text = await refused_contact(plane)
    assert problem is Problem.PROXY
    assert text == f"the proxy {middle.HOST}:{port} cannot be reached: Connection refused"


async def test_nobody_there(tmp_path: Path) -> None:
    """No address and no connection, each in a sentence."""
    async with middle.listening(FINE) as port:
        pass
    async with client(tmp_path, f"http://{middle.HOST}:{port}") as plane:
        assert await refused_contact(plane) == (
            Problem.UNREACHABLE,
            f"{middle.HOST}:{port} takes no connection: Connection refused",
        )
    async with client(tmp_path, "http://nowhere.invalid") as plane:
        problem, text = await refused_contact(plane)
    assert problem is Problem.UNREACHABLE
    assert text.startswith("nowhere.invalid has no address: ")


# --- the token ---


async def test_f17_concurrent_calls_share_a_token_that_was_read_again(tmp_path: Path) -> None:
    """F17: of two calls that were refused with the old token both are answered, though only one finds a new one."""
    both_are_here = asyncio.Barrier(2)
    tokens: list[bytes] = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await middle.read_request(reader)
        token = next(line for line in head.split(b"\r\n") if line.startswith(b"X-Agent-Token: "))[15:]
        tokens.append(token)
        if token == TOKEN.encode():
            await both_are_here.wait()
            writer.write(answer(b"", "401 Unauthorized"))
        else:
            writer.write(answer())
        await writer.drain()

    async with middle.listening(respond) as port, client(tmp_path, f"http://{middle.HOST}:{port}") as plane:
        (tmp_path / "token").write_text("new")
        replies: tuple[Reply, Reply] = await asyncio.gather(plane.heartbeat(BEAT), plane.claim(CLAIM))
    assert [reply.verdict for reply in replies] == [Verdict.OK] * 2
    assert sorted(tokens) == sorted([TOKEN.encode()] * 2 + [b"new"] * 2)


@pytest.mark.parametrize("content", ["", "two words", "x" * 9000])
async def test_f17_a_token_file_that_is_being_written_is_no_reason_to_stop(tmp_path: Path, content: str) -> None:
    """F17: with nothing usable in the file the call stays refused, and the next one looks again."""
    refusals = [answer(b"", "403 Forbidden"), answer(b"", "403 Forbidden"), answer()]

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await middle.read_request(reader)
        writer.write(refusals.pop(0))
        await writer.drain()

    async with middle.listening(respond) as port, client(tmp_path, f"http://{middle.HOST}:{port}") as plane:
        (tmp_path / "token").write_text(content)
        assert (await plane.heartbeat(BEAT)).verdict is Verdict.UNAUTHORIZED
        assert plane.contact.problem is Problem.TOKEN_REFUSED
        assert plane.contact.error is not None
        assert str(tmp_path / "token") in plane.contact.error
        (tmp_path / "token").write_text("good")
        assert (await plane.heartbeat(BEAT)).verdict is Verdict.OK


# --- answers ---


async def said(
    tmp_path: Path, *pieces: bytes, timeout_s: float = DEADLINE_S, is_claim: bool = False
) -> tuple[Problem | None, str]:
    """What becomes of an answer that cannot be used: retried, and told in words; the next call is answered as ever."""
    responses = [middle.saying(*pieces), FINE]

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await responses.pop(0)(reader, writer)

    async with (
        middle.listening(respond) as port,
        client(tmp_path, f"http://{middle.HOST}:{port}", timeout_s=timeout_s) as plane,
    ):
        reply = await (plane.claim(CLAIM) if is_claim else plane.heartbeat(BEAT))
        problem = plane.contact.problem
        assert reply.verdict is Verdict.RETRY
        assert (await plane.heartbeat(BEAT)).verdict is Verdict.OK
        assert plane.contact.problem is None
    return problem, reply.answer.message


CHUNKED: Final = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
MALFORMED: Final[dict[str, tuple[bytes, str]]] = {
    "no JSON": (answer(b"<html>log in to the network</html>"), "without an envelope: '<html>log in"),
    "empty": (answer(b""), "without an envelope: empty body"),
    "a list": (answer(b"[]"), "without an envelope"),
    "no code": (answer(b'{"message": "ok"}'), "without an envelope"),
    "code of a wrong type": (answer(b'{"code": true}'), "without an envelope"),
    "no UTF-8": (answer(b'{"code": 0, "message": "\xff"}'), "without an envelope"),
    "endless nesting": (answer(b'{"code": 0, "data": ' + b"[" * 100_000), "without an envelope"),
    "an endless number": (answer(b'{"code": 1' + b"0" * 100_000 + b"}"), "without an envelope"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.2\r\n", "does not answer in HTTP as it should"),
    "a bad length": (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n", "does not answer in HTTP as it should"),
    "a bad chunk": (CHUNKED + b"zz\r\n", "does not answer in HTTP as it should"),
    "a long header": (answer(ENVELOPE, "200 OK", "X: " + "x" * 100_000), "does not answer in HTTP as it should"),
    "many headers": (answer(ENVELOPE, "200 OK", *["X: x"] * 10_000), "does not answer in HTTP as it should"),
    "truncated": (answer(b'{"code": 0, "da', length=1000), "the answer ended before it was whole"),
    "a truncated chunk": (CHUNKED + b'50\r\n{"code": 0', "the answer ended before it was whole"),
    "unknown coding": (answer(ENVELOPE, "200 OK", "Content-Encoding: br"), "the coding 'br', which was not asked for"),
    "too many values": (
        answer(b'{"code": 0, "data": [' + b"[]," * 1_300_000 + b"[]]}"),
        "made of more than 2500000 values",
    ),
    "not gzip": (answer(ENVELOPE, "200 OK", "Content-Encoding: gzip"), "the compressed answer is damaged"),
    "truncated gzip": (
        answer(gzip.compress(ENVELOPE)[:-9], "200 OK", "Content-Encoding: gzip"),
        "the compressed answer ended before it was whole",
    ),
}


@pytest.mark.parametrize("kind", MALFORMED)
async def test_f19_a_malformed_answer_is_retried_and_told_in_words(tmp_path: Path, kind: str) -> None:
    """F19: malformed, truncated, of a wrong type: each is a bad answer with a sentence, and nothing breaks."""
    pieces, text = MALFORMED[kind]
    problem, message = await said(tmp_path, pieces)
    assert problem is Problem.BAD_ANSWER
    assert text in message
    assert len(message) <= limits.WIRE_MESSAGE_MAX_CHARS


def _large(size: int) -> bytes:
    return ENVELOPE[:-1] + b', "padding": "' + b"x" * (size - len(ENVELOPE) - 15) + b'"}'


@pytest.mark.parametrize("is_claim", [False, True])
@pytest.mark.parametrize("way", ["plain", "chunked", "gzip"])
async def test_f19_a_huge_answer_is_read_to_its_bound_only(tmp_path: Path, way: str, is_claim: bool) -> None:
    """F19: as it comes and as it is decompressed; a claim may be larger than other answers. At the bound it is read."""
    bound = limits.WIRE_CLAIM_ANSWER_MAX_BYTES if is_claim else limits.WIRE_ANSWER_MAX_BYTES
    too_large, allowed = _large(bound + 1), _large(bound)
    assert (len(too_large), len(allowed)) == (bound + 1, bound)
    if way == "plain":
        pieces = [answer(too_large), answer(allowed)]
    elif way == "chunked":
        pieces = [CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) for body in (too_large, allowed)]
    else:
        coding = "Content-Encoding: gzip"
        pieces = [answer(gzip.compress(body, 1), "200 OK", coding) for body in (too_large, allowed)]
    problem, message = await said(tmp_path, pieces[0], is_claim=is_claim)
    assert problem is Problem.BAD_ANSWER
    assert message.startswith(f"the answer is longer than {bound} bytes")
    async with (
        middle.listening(middle.saying(pieces[1])) as port,
        client(tmp_path, f"http://{middle.HOST}:{port}") as plane,
    ):
        reply = await (plane.claim(CLAIM) if is_claim else plane.heartbeat(BEAT))
        assert reply.verdict is Verdict.OK


async def test_f19_a_compressed_answer_is_read(tmp_path: Path) -> None:
    """F19: a proxy on the way that compresses unasked costs nothing, in both codings."""
    import zlib

    body = b'{"code": 0, "data": {"status": "known"}}'
    for coding, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body))):
        pieces = answer(packed, "200 OK", f"Content-Encoding: {coding}")
        async with (
            middle.listening(middle.saying(pieces)) as port,
            client(tmp_path, f"http://{middle.HOST}:{port}") as plane,
        ):
            assert (await plane.heartbeat(BEAT)).answer.data == {"status": "known"}


@pytest.mark.parametrize("where", ["nothing", "head", "body"])
async def test_f19_a_slow_answer_is_given_up_in_time(tmp_path: Path, where: str) -> None:
    """F19: the time counts for the whole answer: a byte now and then does not prolong it."""
    whole = answer()
    starts = {"nothing": b"", "head": whole[:20], "body": whole[:-10]}
    has_gone = asyncio.Event()

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await middle.read_request(reader)
        rest = iter(whole[len(starts[where]) :])
        writer.write(starts[where])
        try:
            while await _pause(reader, 0.1):
                if where != "nothing":
                    writer.write(bytes([next(rest)]))
        finally:
            has_gone.set()

    async with (
        middle.listening(respond) as port,
        client(tmp_path, f"http://{middle.HOST}:{port}", timeout_s=0.5) as plane,
    ):
        async with asyncio.timeout(DEADLINE_S):
            problem, text = await refused_contact(plane)
            await has_gone.wait()
    assert (problem, text) == (Problem.TIMEOUT, "no whole answer within 0.5 s")


async def _pause(reader: asyncio.StreamReader, seconds: float) -> bool:
    """Whether the client is still there after so long."""
    try:
        async with asyncio.timeout(seconds):
            return bool(await reader.read(1))
    except TimeoutError:
        return True


@pytest.mark.parametrize(
    "status", ["301 Moved Permanently", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"]
)
@pytest.mark.parametrize("is_same_origin", [True, False])
async def test_no_redirect_is_followed(tmp_path: Path, status: str, is_same_origin: bool) -> None:
    """Neither to another host nor to the same one: the token goes nowhere else, and the sentence names the remedy."""
    asked: list[bytes] = []

    async def elsewhere(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.read(1))

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await middle.read_request(reader))
        host = writer.get_extra_info("sockname")[1] if is_same_origin else other
        location = f"Location: http://u:s3cret@{middle.HOST}:{host}/moved?signature=s3cret"
        writer.write(answer(b"", status, location))
        await writer.drain()

    async with (
        middle.listening(elsewhere) as other,
        middle.listening(respond) as port,
        client(tmp_path, f"http://{middle.HOST}:{port}") as plane,
    ):
        problem, text = await refused_contact(plane)
    assert problem is Problem.BAD_ANSWER
    assert (
        f"redirects to http://{middle.HOST}:{port if is_same_origin else other}/moved, where the token is not sent"
        in text
    )
    assert "s3cret" not in text
    assert len(asked) == 1


@pytest.mark.parametrize("location", ["Location: http://[", "Location: \x01\x02", "X: none"])
async def test_a_redirect_to_nowhere_is_no_crash(tmp_path: Path, location: str) -> None:
    """Whatever stands there, it is a bad answer."""
    problem, _ = await said(tmp_path, answer(b"", "302 Found", location))
    assert problem is Problem.BAD_ANSWER


def _any(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("value", ["7", "date"])
async def test_f18_both_forms_of_retry_after_are_read(tmp_path: Path, status: int, value: str) -> None:
    """F18: seconds, or a date against the date of the same answer; the clock of this host does not count."""
    form = {"7": "Retry-After: 7", "date": "Retry-After: Thu, 05 Feb 2026 12:00:07 GMT"}[value]
    pieces = answer(
        _any({"code": status, "message": "busy"}), f"{status} Busy", form, "Date: Thu, 05 Feb 2026 12:00:00 GMT"
    )
    async with (
        middle.listening(middle.saying(pieces)) as port,
        client(tmp_path, f"http://{middle.HOST}:{port}") as plane,
    ):
        reply = await plane.heartbeat(BEAT)
    assert (reply.verdict, reply.answer.retry_after_s) == (Verdict.RETRY, 7.0)
