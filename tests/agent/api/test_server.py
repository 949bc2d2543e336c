"""Every answer is an envelope, bounds hold, and the server starts and stops cleanly."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import zlib
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import structlog
import structlog.testing

from remotegpu_agent.api import ApiServer, ApiSettings
from remotegpu_agent.audit import AuditLog
from remotegpu_schemas.api import Ping
from remotegpu_schemas.errors import Code, Misconfigured, Refused
from tests.agent.api.conftest import OPERATOR, Api, StartApi
from tests.agent.api.fake_operations import TASK_ID, FakeOperations

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


async def exchange(port: int, request: bytes) -> bytes:
    """Send raw bytes and read until the server closes."""
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()
            await writer.wait_closed()


def is_error(answer: tuple[int, dict[str, Any]], status: int, code: int) -> bool:
    """A whole error envelope with this status and code."""
    got, body = answer
    assert set(body) == {"success", "code", "message", "data", "timestamp"}, body
    assert body["success"] is False
    assert body["data"] is None
    assert TIMESTAMP.fullmatch(body["timestamp"])
    assert "Traceback" not in body["message"]
    assert (got, body["code"]) == (status, code), body
    return True


async def test_ping_answers_without_a_token(api: Api) -> None:
    """GET /ping is the one call that anybody may make."""
    status, body = await api.call("GET", "/api/v1/ping", headers={})
    assert status == 200
    assert body["success"] is True
    assert body["code"] == 0
    assert body["message"] == "ok"
    assert body["data"] == {"ok": True, "version": "0.1.0", "agent_id": "agent-1", "state": "ready"}
    assert TIMESTAMP.fullmatch(body["timestamp"])


async def test_system_info_is_bare(api: Api) -> None:
    """GET /system/info has its fields at the top level, and is the same over the Unix socket."""
    status, body = await api.call("GET", "/api/v1/system/info")
    assert status == 200
    assert body["hostname"] == "gpu-1"
    assert "data" not in body
    assert (await api.call("GET", "/api/v1/system/info", session=api.unix, headers={}))[1] == body


async def test_queue_status(api: Api) -> None:
    """GET /queue/status is the status in an envelope."""
    status, body = await api.call("GET", "/api/v1/queue/status")
    assert status == 200
    assert body["data"]["tasks"] == {"running": 1}


@pytest.mark.parametrize("path", ["/", "/api/v1", "/api/v1/", "/api/v1/nothing", "/api/v2/ping", "/api/v1/tasks/a/b/c"])
async def test_unknown_routes(api: Api, path: str) -> None:
    """An unknown route is an envelope with its own code."""
    assert is_error(await api.call("GET", path), 404, 30022)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/api/v1/tasks", {"GET", "POST"}),
        ("POST", "/api/v1/ping", {"GET"}),
        ("GET", "/api/v1/process/stop", {"POST"}),
        ("PROPFIND", "/api/v1/tasks", {"GET", "POST"}),
    ],
)
async def test_wrong_methods(api: Api, method: str, path: str, allowed: set[str]) -> None:
    """A wrong or unknown method is 405, with what the route takes."""
    async with api.tcp.request(method, api.url + path, headers=OPERATOR) as answer:
        assert is_error((answer.status, await answer.json()), 405, 30021)
        assert set(answer.headers["Allow"].split(",")) == allowed


async def test_an_unexpected_exception_tells_only_where_to_look(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """A bug is 30099 with an id; neither its text nor a traceback leaves the host, and the next request is served."""
    api.operations.failure = RuntimeError("the secret is 42")
    status, body = await api.call("GET", "/api/v1/queue/status")
    assert is_error((status, body), 500, 30099)
    assert re.search(r"error_id [0-9a-f]{8}", body["message"])
    assert "secret" not in body["message"]
    api.operations.failure = None
    assert (await api.call("GET", "/api/v1/queue/status"))[0] == 200


async def test_an_error_of_system_info_comes_in_the_envelope(api: Api) -> None:
    """Only the success of /system/info is bare."""
    api.operations.failure = RuntimeError("broken")
    assert is_error(await api.call("GET", "/api/v1/system/info"), 500, 30099)


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_f35_a_huge_body_is_refused(start_api: StartApi, is_chunked: bool) -> None:
    """A body above the bound is 413, whether its length is declared or not; nothing reaches the queue."""
    body = b"x" * 200_000

    async def pieces() -> Any:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    async with start_api(body_max_bytes=100_000) as api:
        answer = await api.call("POST", "/api/v1/tasks", data=pieces() if is_chunked else body)
        assert is_error(answer, 413, 30018)
        assert api.operations.calls == []


async def test_f35_a_declared_huge_body_is_refused_before_it_is_sent(api: Api) -> None:
    """Who declares 100 GB is refused by the header alone."""
    head = (
        "POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nX-Agent-Token: operator-secret\r\n"
        f"Content-Length: {10**11}\r\n\r\n"
    )
    answer = await exchange(api.port, head.encode())
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":30018' in answer


async def test_f35_a_slow_body_is_cut_off(start_api: StartApi) -> None:
    """A body that does not come ends with its deadline, in an envelope, and the connection is closed."""
    async with start_api(body_deadline_s=0.1) as api:
        head = (
            "POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nX-Agent-Token: operator-secret\r\n"
            "Content-Length: 100\r\n\r\nonly this"
        )
        answer = await exchange(api.port, head.encode())
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == 30028
        assert api.operations.calls == []


async def test_f35_a_body_that_breaks_off_hurts_nobody(api: Api) -> None:
    """A client that goes in the middle of its body leaves nothing behind, and others are served."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(b"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nX-Agent-Token: operator-secret\r\n")
    writer.write(b"Content-Length: 100\r\n\r\nonly this")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert await reader.read() == b""
    assert (await api.call("GET", "/api/v1/ping"))[0] == 200
    assert api.operations.submitted == []


@pytest.mark.parametrize("body", [b"zz\r\nnonsense\r\n0\r\n\r\n", b"5\r\ntoo long\r\n0\r\n\r\n"])
async def test_f35_a_badly_chunked_body(start_api: StartApi, body: bytes) -> None:
    """A body that is no valid chunked encoding is a client's error, not ours."""
    head = b"POST /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nX-Agent-Token: operator-secret\r\nConnection: close\r\n"
    async with start_api(body_deadline_s=0.1) as api, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(head + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(body)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 408 "))
        assert api.operations.submitted == []


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (b"GRUMBLE /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n", 400, 30005),
        (b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nX-Secret: " + b"x" * 100_000 + b"\r\n\r\n", 431, 30029),
        (b"GET /api/v1/" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 431, 30029),
        (b"GET /api/v1/ping HTTP/1.1\r\n" + b"X-Secret: a\r\n" * 100 + b"\r\n", 431, 30029),
        (b"GET /api/v1/ping HTTP/1.1\r\nHost: localhost\r\nX-Secret\r\n\r\n", 400, 30005),
        (b"GET /api/v1/ping HTTP/1.1\r\nHost: localhost\r\nExpect: X-Secret\r\n\r\n", 400, 30005),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, 30005),
        (b"X-Secret\r\n\r\n", 400, 30005),
    ],
    ids=["method", "field", "line", "fields", "no-colon", "expect", "tls", "noise"],
)
async def test_f35_what_is_no_http_is_refused(api: Api, request_bytes: bytes, status: int, code: int) -> None:
    """Unknown methods, huge headers and lines, TLS and noise are refused in an envelope that shows none of it."""
    answer = await exchange(api.port, request_bytes)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert is_error((int(head.split()[1]), json.loads(body)), status, code)
    assert b"\r\nCache-Control: no-store" in head
    assert b"secret" not in answer.lower()
    assert (await api.call("GET", "/api/v1/ping"))[0] == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, identity"])
async def test_f35_a_compressed_body_is_not_unpacked(api: Api, encoding: str) -> None:
    """A small body that would become a huge one is refused by its header; nothing of it is unpacked."""
    bomb = zlib.compress(b"\0" * 1_000_000)
    answer = await api.call(
        "POST", "/api/v1/tasks", data=bomb, headers=OPERATOR | {"Content-Encoding": encoding, "Content-Type": "a/b"}
    )
    assert is_error(answer, 400, 30005)
    assert "Content-Encoding" in answer[1]["message"]
    assert api.operations.calls == []


@pytest.mark.parametrize("body", [b"", b"{", b"[1, 2", b"\xff\xfe", b'{"process_id": 1e999}', b"[" * 100_000, b"null"])
async def test_f35_bad_json_is_refused(api: Api, body: bytes) -> None:
    """What is no JSON, or nests without end, is the client's mistake; others are served."""
    assert is_error(await api.call("POST", "/api/v1/process/stop", data=body), 400, 30005)
    assert (await api.call("GET", "/api/v1/ping"))[0] == 200


async def test_f35_the_same_connection_serves_on(api: Api) -> None:
    """Pipelined requests are each answered, in order, a refused one between good ones."""
    one = b"GET /api/v1/ping HTTP/1.1\r\nHost: localhost\r\n\r\n"
    two = b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /api/v1/ping HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answers = await exchange(api.port, one + two + last)
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"401", b"200"]


async def test_every_answer_forbids_caching_and_guessing(api: Api) -> None:
    """Errors and successes alike carry the headers, and none names the server's software."""
    for path in ("/api/v1/ping", "/api/v1/nothing"):
        async with api.tcp.get(api.url + path) as answer:
            assert answer.headers["Cache-Control"] == "no-store"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Server"] == "remotegpu-agent"


async def test_a_strange_host_is_refused(start_api: StartApi) -> None:
    """DNS rebinding: a Host that is not ours is refused with a token too; a name in `allowed_hosts` is ours."""
    async with start_api(allowed_hosts=("gpu.example",)) as api:
        assert is_error(await api.call("GET", "/api/v1/ping", headers=OPERATOR | {"Host": "evil.example"}), 403, 30017)
        assert (await api.call("GET", "/api/v1/ping", headers={"Host": "gpu.example:8090"}))[0] == 200


async def test_a_strangers_page_changes_nothing(api: Api) -> None:
    """A change of state from a page of another origin is refused; reading is the browser's business."""
    path = f"/api/v1/tasks/{TASK_ID}"
    stranger = OPERATOR | {"Origin": "http://evil.example"}
    assert is_error(await api.call("POST", path + "/cancel", headers=stranger), 403, 30017)
    assert (await api.call("GET", path, headers=stranger))[0] == 200
    assert (await api.call("POST", path + "/cancel", headers=OPERATOR | {"Origin": api.url}))[0] == 200
    assert [name for name, _ in api.operations.calls] == ["show_task", "cancel_task"]


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_a_browser_that_names_another_site_changes_nothing(api: Api, site: str) -> None:
    """A change that the browser says another site asks for is refused, with no Origin too; reading is not."""
    path = f"/api/v1/tasks/{TASK_ID}"
    stranger = OPERATOR | {"Sec-Fetch-Site": site}
    assert is_error(await api.call("POST", path + "/cancel", headers=stranger), 403, 30017)
    assert (await api.call("GET", path, headers=stranger))[0] == 200
    assert (await api.call("POST", path + "/cancel", headers=OPERATOR | {"Sec-Fetch-Site": "same-origin"}))[0] == 200
    assert [name for name, _ in api.operations.calls] == ["show_task", "cancel_task"]


async def test_a_change_outlives_its_caller(api: Api) -> None:
    """A client that goes while its task is being stored does not leave half a change: it is made and audited."""
    api.operations.submit_may_go.clear()
    sending = asyncio.create_task(api.call("POST", "/api/v1/tasks", json={"task": {"command": "true"}}))
    async with asyncio.timeout(10):
        await api.operations.submit_entered.wait()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        api.operations.submit_may_go.set()
        await api.server.stop()
    assert len(api.operations.submitted) == 1
    assert [line["outcome"] for line in api.audit_lines()] == ["ok"]


async def test_the_access_log_names_the_caller_and_no_token(api: Api) -> None:
    """One line a request, with who, what and how it ended; refusals are warnings; tokens are nowhere."""
    with structlog.testing.capture_logs() as logs:
        await api.call("GET", "/api/v1/tasks?label=a=b")
        await api.call("GET", "/api/v1/tasks", headers={"Authorization": "Bearer wrong-secret"})
    assert [(line["event"], line["log_level"], line.get("caller"), line.get("status")) for line in logs] == [
        ("api_request", "debug", "token:ci", 200),
        ("api_caller_refused", "warning", None, None),
        ("api_request", "debug", None, 401),
    ]
    assert (logs[0]["method"], logs[0]["path"], logs[0]["source"]) == ("GET", "/api/v1/tasks", "127.0.0.1")
    assert "secret" not in repr(logs)


async def test_the_callers_name_is_on_every_log_line_of_its_request(api: Api) -> None:
    """What the daemon logs for a request carries the caller."""
    seen: list[object] = []

    def look() -> Ping:
        seen.append(structlog.contextvars.get_contextvars().get("caller"))
        raise Refused(Code.UNAVAILABLE)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.operations, "queue_status", look)
        await api.call("GET", "/api/v1/queue/status")
    assert seen == ["token:ci"]


async def test_stop_is_quick_with_open_long_polls(api: Api) -> None:
    """Stopping answers a long poll with the present state, at once."""
    polling = asyncio.create_task(api.call("GET", f"/api/v1/tasks/{TASK_ID}?wait=300"))
    async with asyncio.timeout(10):
        await api.operations.show_waits.wait()
        await api.server.stop()
        status, body = await polling
    assert status == 200
    assert body["data"]["state"] == "running"
    with pytest.raises(aiohttp.ClientConnectorError):
        await api.call("GET", "/api/v1/ping")


async def test_stop_is_quick_with_a_stuck_change(api: Api) -> None:
    """Stopping does not wait for an operation that hangs, nor does it leave its task behind."""
    api.operations.submit_may_go.clear()
    sending = asyncio.create_task(api.call("POST", "/api/v1/tasks", json={"task": {"command": "true"}}))
    async with asyncio.timeout(10):
        await api.operations.submit_entered.wait()
        await api.server.stop()
        await asyncio.gather(sending, return_exceptions=True)
    assert api.operations.submitted == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_stop_twice_and_before_start(settings: ApiSettings, operations: FakeOperations, short_dir: Path) -> None:
    """Stopping twice, or what never started, is no error, and leaves no socket file."""
    server = ApiServer(operations, settings, AuditLog(short_dir))
    await server.stop()
    other = ApiServer(operations, settings, AuditLog(short_dir))
    await other.start()
    assert settings.socket is not None
    assert settings.socket.is_socket()
    await other.stop()
    await other.stop()
    assert not settings.socket.exists()


async def test_a_first_start_makes_a_token(start_api: StartApi, short_dir: Path) -> None:
    """Without a tokens file the agent makes one operator token, 0600, and keeps it at the next start."""
    path = short_dir / "api-token"
    seen: set[str] = set()
    for _ in range(2):
        async with start_api(tokens_file=None) as api:
            assert path.stat().st_mode & 0o777 == 0o600
            token = path.read_text().strip().split(":")[2]
            assert len(token) >= 32
            assert (await api.call("GET", "/api/v1/tasks", headers={"X-Agent-Token": token}))[0] == 200
            seen.add(token)
    assert len(seen) == 1


async def test_tcp_and_unix_can_be_switched_off(start_api: StartApi, short_dir: Path) -> None:
    """`listen: null` leaves only the socket, `socket: null` only TCP."""
    async with start_api(listen=None) as api:
        assert api.server.endpoints.url is None
        assert (await api.call("GET", "/api/v1/tasks", session=api.unix, headers={}))[0] == 200
    async with start_api(socket=None) as api:
        assert api.server.endpoints.socket is None
        assert (await api.call("GET", "/api/v1/tasks"))[0] == 200
        assert not (short_dir / "agent.sock").exists()


async def test_ipv6(start_api: StartApi) -> None:
    """An IPv6 address is written with brackets, in the setting and in the reported address."""
    async with start_api(listen="[::1]:0") as api:
        assert re.fullmatch(r"http://\[::1\]:\d+", api.url)
        assert (await api.call("GET", "/api/v1/tasks"))[0] == 200


async def test_dual_stack_callers_keep_their_ipv4_address(start_api: StartApi) -> None:
    """`[::]` takes IPv4 callers, who are named by their IPv4 address in the audit log."""
    async with start_api(listen="[::]:0") as api:
        port = int(api.url.rpartition(":")[2])
        url = f"http://127.0.0.1:{port}/api/v1/tasks/{TASK_ID}/cancel"
        async with api.tcp.post(url, headers=OPERATOR) as answer:
            assert answer.status == 200
        assert api.audit_lines()[0]["from"] == "127.0.0.1"


async def test_a_busy_port_is_one_clear_sentence(start_api: StartApi, settings: ApiSettings, short_dir: Path) -> None:
    """A port that is taken is Misconfigured with what to do, and nothing is left open."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Misconfigured, match=rf"api.listen: 127.0.0.1:{port} is in use .*0 picks a free one"):
            async with start_api(listen=f"127.0.0.1:{port}"):
                pass
    assert settings.socket is not None
    assert not settings.socket.exists()


async def test_off_loopback_needs_a_tokens_file(start_api: StartApi) -> None:
    """Listening for other hosts without a chosen tokens file is refused."""
    with pytest.raises(Misconfigured, match=r"reachable from other hosts.*api\.tokens_file"):
        async with start_api(listen="0.0.0.0:0", tokens_file=None):
            pass


async def test_an_unwritable_state_directory(start_api: StartApi, short_dir: Path) -> None:
    """A token that cannot be made is one clear sentence."""
    with pytest.raises(Misconfigured, match=r"cannot write .*api-token"):
        async with start_api(tokens_file=None, state_dir=short_dir / "missing"):
            pass
