"""Output as JSON and as Server-Sent Events, with clients that come, go, and do not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp
import pytest

from remotegpu_schemas.errors import Code, Refused
from tests.agent.api.conftest import OPERATOR, Api, StartApi
from tests.agent.api.fake_operations import TASK_ID, chunk

PATH = f"/api/v1/tasks/{TASK_ID}/logs"


@contextlib.asynccontextmanager
async def follow(
    api: Api, query: str = "", headers: dict[str, str] | None = None
) -> AsyncGenerator[aiohttp.ClientResponse, None]:
    """An open stream of events."""
    async with (
        asyncio.timeout(20),
        api.tcp.get(f"{api.url}{PATH}?follow=1{query}", headers=OPERATOR | (headers or {})) as answer,
    ):
        assert answer.status == 200
        assert answer.content_type == "text/event-stream"
        yield answer


async def event(answer: aiohttp.ClientResponse) -> dict[str, str]:
    """The next event's fields; a comment has the empty name."""
    fields: dict[str, str] = {}
    while line := (await answer.content.readline()).decode().rstrip("\n"):
        name, _, value = line.partition(":")
        fields[name] = value.removeprefix(" ")
    return fields


async def no_follower_left(api: Api) -> None:
    """Wait until the follower's generator is closed and its place is free."""
    async with asyncio.timeout(20):
        await api.operations.follower_closed.wait()
        while api.server.follower_count:  # noqa: ASYNC110 - the handler needs a few turns of the loop to unwind
            await asyncio.sleep(0)


async def test_a_piece_of_output(api: Api) -> None:
    """Without `follow` one chunk comes in the envelope; all parameters reach the daemon."""
    status, body = await api.call("GET", PATH + "?stream=stderr&offset=-100&limit=50&run=2")
    assert status == 200
    assert body["data"] == json.loads(chunk("hello\n").model_dump_json())
    assert api.operations.calls == [("read_log", {"stream": "stderr", "offset": -100, "limit": 50, "run_no": 2})]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("stream=both", "stream"),
        ("offset=x", "offset"),
        ("offset=1e400", "offset"),
        (f"offset={10**30}", "offset"),
        ("limit=0", "limit"),
        ("limit=1048577", "limit"),
        ("run=0", "run"),
        ("follow=perhaps", "follow"),
    ],
)
async def test_bad_parameters(api: Api, query: str, field: str) -> None:
    """Each is INVALID_PARAMETERS with its name."""
    status, body = await api.call("GET", f"{PATH}?{query}")
    assert (status, body["code"]) == (400, 30005)
    assert body["message"].startswith(f"{field}: ")


async def test_following_to_the_end(api: Api) -> None:
    """Each chunk is an event with its JSON and the next offset as id; after the last one the stream ends."""
    chunks = [chunk("one\n"), chunk("zwei ü\n", 4), chunk("", 12, is_end=True)]
    async with follow(api) as answer:
        for piece in chunks:
            api.operations.chunks.put_nowait(piece)
            fields = await event(answer)
            assert json.loads(fields["data"]) == json.loads(piece.model_dump_json())
            assert fields["id"] == str(piece.next_offset)
        assert await answer.content.read() == b""
    await no_follower_left(api)


async def test_a_browser_resumes_where_it_was(api: Api) -> None:
    """The id of the last event that a client saw counts more than the offset in the address."""
    api.operations.chunks.put_nowait(chunk("", 12, is_end=True))
    async with follow(api, "&offset=3", {"Last-Event-ID": "12"}):
        pass
    api.operations.chunks.put_nowait(chunk("", 12, is_end=True))
    async with follow(api, "&offset=3", {"Last-Event-ID": "nonsense"}):
        pass
    offsets = [arguments["offset"] for name, arguments in api.operations.calls if name == "follow_log"]
    assert offsets == [12, 3]


async def test_silence_is_kept_alive(start_api: StartApi) -> None:
    """While there is no output, comments come, so that proxies and dead clients are noticed."""
    async with start_api(keep_alive_s=0.01) as api, follow(api) as answer:
        assert await event(answer) == {"": "keep-alive"}
        assert await event(answer) == {"": "keep-alive"}
        api.operations.chunks.put_nowait(chunk("x", is_end=True))
        while "data" not in (fields := await event(answer)):
            pass
        assert json.loads(fields["data"])["text"] == "x"


async def test_a_client_that_goes_leaves_nothing_behind(api: Api) -> None:
    """When the client disconnects, the follower's generator is closed and its place is free, without any output."""
    async with follow(api) as answer:
        await api.operations.follower_opened.wait()
        assert api.server.follower_count == 1
        answer.close()
    await no_follower_left(api)


async def test_a_client_that_does_not_read_loses_its_place(start_api: StartApi) -> None:
    """A stream whose buffers are full for too long is dropped; memory stays bounded."""
    async with start_api(slow_reader_s=0.1) as api, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port, limit=1024)
        writer.write(
            f"GET {PATH}?follow=1 HTTP/1.1\r\nHost: localhost\r\nX-Agent-Token: operator-secret\r\n\r\n".encode()
        )
        await reader.readuntil(b"\r\n\r\n")
        for _ in range(100):
            api.operations.chunks.put_nowait(chunk("x" * 1_000_000))
        await no_follower_left(api)
        assert api.operations.chunks.qsize() > 0
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_followers_are_bounded(start_api: StartApi) -> None:
    """One more than there are places is told to come later, and is served when a place is free."""
    async with start_api(followers_max=1) as api:
        async with follow(api) as first:
            async with api.tcp.get(f"{api.url}{PATH}?follow=1", headers=OPERATOR) as second:
                body = await second.json()
                assert (second.status, body["code"]) == (429, 30019)
                assert second.headers["Retry-After"] == "5"
            first.close()
        await no_follower_left(api)
        api.operations.chunks.put_nowait(chunk("", is_end=True))
        async with follow(api) as third:
            assert "data" in await event(third)


async def test_an_unknown_task_is_an_ordinary_answer(api: Api) -> None:
    """What can be refused before the stream begins is refused in an envelope, and takes no place."""
    status, body = await api.call("GET", "/api/v1/tasks/other/logs?follow=1")
    assert (status, body["code"]) == (404, 30004)
    assert api.server.follower_count == 0


@pytest.mark.parametrize(
    ("failure", "code"), [(Refused(Code.TASK_NOT_FOUND, "it was deleted"), 30004), (RuntimeError("secret"), 30099)]
)
async def test_a_stream_that_breaks_says_so(api: Api, failure: Exception, code: int) -> None:
    """An error in the middle is an event of its own with the envelope as data, and the stream ends."""
    async with follow(api) as answer:
        api.operations.chunks.put_nowait(chunk("one\n"))
        api.operations.chunks.put_nowait(failure)
        assert "data" in await event(answer)
        fields = await event(answer)
        assert fields["event"] == "error"
        envelope: dict[str, Any] = json.loads(fields["data"])
        assert (envelope["success"], envelope["code"]) == (False, code)
        assert "secret" not in envelope["message"]
        assert await answer.content.read() == b""
    await no_follower_left(api)


async def test_stop_is_quick_with_followers(api: Api) -> None:
    """Stopping ends the streams; clients see an orderly end and may come back."""
    async with follow(api) as answer:
        await api.operations.follower_opened.wait()
        async with asyncio.timeout(5):
            await api.server.stop()
        assert await answer.content.read() == b""
    await no_follower_left(api)
