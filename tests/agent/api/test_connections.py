"""F35: clients that are slow, silent, greedy or many, over real sockets; the others are served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncGenerator

import pytest
import structlog.testing

from remotegpu_agent.api.connection import WriteWatch
from remotegpu_agent.api.places import Bounds
from tests.agent.api.conftest import Api, StartApi
from tests.agent.api.fake_operations import TASK_ID, chunk
from tests.agent.api.raw import PING, Raw, connect, connect_unix
from tests.waiting import until_so

END = "HTTP/1.1\r\nHost: localhost\r\nX-Agent-Token: operator-secret\r\n"
WAIT = f"GET /api/v1/tasks/{TASK_ID}?wait=300 {END}\r\n".encode()
FOLLOW = f"GET /api/v1/tasks/{TASK_ID}/logs?follow=1 {END}\r\n".encode()
BIG_BODY = f"POST /api/v1/tasks {END}Content-Length: 999999\r\n\r\n".encode()


@contextlib.asynccontextmanager
async def many(port: int, count: int, first_bytes: bytes = b"") -> AsyncGenerator[list[Raw]]:
    """So many connections, each after it has sent these bytes."""
    async with contextlib.AsyncExitStack() as stack:
        opened = []
        for _ in range(count):
            opened.append(await stack.enter_async_context(connect(port)))
            await opened[-1].send(first_bytes)
        yield opened


# --- deadlines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answered", [0, 1])
async def test_f35_slow_headers_are_cut_off(start_api: StartApi, answered: int) -> None:
    """Headers that do not end are 408 in an envelope after their deadline, on a new and on a used connection."""
    async with start_api(headers_deadline_s=0.2) as api, connect(api.port) as slow:
        for _ in range(answered):
            assert await slow.ping()
        await slow.send(PING[:-2])
        status, headers, body = await slow.answer()
        assert (status, body["code"], headers["connection"]) == (408, 30028, "close")
        assert await slow.rest() == b""
        assert api.server.figures.refused["slow_headers"] == 1


async def test_f35_dripping_headers_gain_no_time(start_api: StartApi) -> None:
    """A byte now and then does not move the deadline."""
    async with start_api(headers_deadline_s=0.3) as api, connect(api.port) as slow:

        async def drip() -> None:
            await slow.send(b"GET /api/v1/ping HTTP/1.1\r\nHost: localhost\r\nX: ")
            while True:
                await slow.send(b"x")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        try:
            assert (await slow.answer())[0] == 408
        finally:
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)


async def test_f35_silent_connections_are_closed(start_api: StartApi) -> None:
    """Who says nothing is closed without a word: at once by the deadline of headers, between requests by `idle_s`."""
    async with (
        start_api(headers_deadline_s=0.1, idle_s=0.3) as api,
        connect(api.port) as silent,
        connect(api.port) as used,
    ):
        assert await used.ping()
        assert await silent.rest() == b""
        assert await used.ping()
        assert await used.rest() == b""
        assert api.server.figures.refused["idle"] == 2


async def test_f35_a_long_poll_is_not_idle(start_api: StartApi) -> None:
    """What waits for its answer is left alone by every deadline."""
    async with start_api(headers_deadline_s=0.05, idle_s=0.05, slow_reader_s=0.05) as api, connect(api.port) as polling:
        await polling.send(WAIT)
        await api.operations.show_waits.wait()
        async with connect(api.port) as silent:
            assert await silent.rest() == b""
        assert api.server.figures.connections == 1
        api.operations.task_ended.set()
        assert (await polling.answer())[0] == 200


async def test_f35_a_body_that_drips_is_cut_off(start_api: StartApi) -> None:
    """The deadline of a body is for all of it, and its answer is 408."""
    async with start_api(body_deadline_s=0.3) as api, connect(api.port) as slow:

        async def drip() -> None:
            await slow.send(BIG_BODY)
            while True:
                await slow.send(b"x")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        try:
            status, headers, body = await slow.answer()
        finally:
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)
        assert (status, body["code"], headers["connection"]) == (408, 30028, "close")
        assert api.operations.calls == []


async def test_f35_a_slow_reader_of_a_big_answer_loses_its_connection(start_api: StartApi) -> None:
    """A client that does not read its answer does not keep it in our memory."""
    async with start_api(slow_reader_s=0.2) as api, connect(api.port, kept_bytes=4096) as slow:
        api.operations.log_text = "x" * 30_000_000
        await slow.send(FOLLOW.replace(b"?follow=1", b""))
        await until_so(lambda: api.server.figures.refused["slow_reader"] == 1)
        await until_so(lambda: api.server.figures.connections == 0)


async def test_f35_a_pipeline_that_nobody_reads_is_bounded(start_api: StartApi) -> None:
    """Thousands of pipelined requests whose answers are not read end with the connection, and were not all answered."""
    async with start_api(slow_reader_s=0.3) as api, connect(api.port, kept_bytes=4096) as greedy:
        greedy.writer.write(PING * 200_000)
        await until_so(lambda: api.server.figures.refused["slow_reader"] == 1)
        await until_so(lambda: api.server.figures.connections == 0)
        assert len(api.operations.calls) < 200_000
        assert (await api.call("GET", "/api/v1/ping"))[0] == 200


async def test_f35_a_stream_lives_as_long_as_its_reader_reads(start_api: StartApi) -> None:
    """A follower that takes longer than the patience for all of it, but takes some all the time, gets all of it."""
    size, count, patience_s = 300_000, 10, 1.5
    async with start_api(slow_reader_s=patience_s) as api, connect(api.port, kept_bytes=65_536) as slow:
        for _ in range(count):
            api.operations.chunks.put_nowait(chunk("x" * size))
        api.operations.chunks.put_nowait(chunk("", is_end=True))
        loop = asyncio.get_running_loop()
        started, got = loop.time(), 0
        await slow.send(FOLLOW)
        async with asyncio.timeout(60):
            while piece := await slow.reader.read(20_000):
                got += len(piece)
                await asyncio.sleep(0.025)  # this reader's pace
        assert got > size * count
        assert loop.time() - started > 2 * patience_s
        assert api.server.figures.refused["slow_reader"] == 0


def test_f35_what_is_filled_up_again_counts_as_taken() -> None:
    """As much waits at each look; what was taken meanwhile tells a reader from one that has stopped."""
    reads, stands = WriteWatch(10.0), WriteWatch(10.0)
    for watch in (reads, stands):
        assert not watch.is_stalled(190_000, 0.0, 1_000_000)
    assert not reads.is_stalled(190_000, 10.0, 2_000_000)
    assert not reads.is_stalled(190_000, 20.0, 3_000_000)
    assert stands.is_stalled(190_000, 10.0, 1_000_100)
    assert reads.is_stalled(190_000, 30.0, 3_000_100)


def test_what_counts_as_reading() -> None:
    """Little taken in all is a stall; enough, an empty buffer, or one emptied far enough is none."""
    watch = WriteWatch(10.0)
    assert not watch.is_stalled(1_000_000, 0.0)
    assert not watch.is_stalled(990_000, 9.0)
    assert watch.is_stalled(985_000, 10.0)
    watch = WriteWatch(10.0)
    assert not watch.is_stalled(1_000_000, 0.0)
    assert not watch.is_stalled(900_000, 10.0)
    assert watch.is_stalled(900_000, 20.0)
    for is_emptied in (True, False):
        watch = WriteWatch(10.0)
        watch.is_stalled(1_000_000, 0.0)
        if is_emptied:
            watch.is_stalled(0, 5.0)
        else:
            watch.took()
        assert not watch.is_stalled(1_000_000, 15.0)
        assert watch.is_stalled(1_000_000, 25.0)


# --- bounds --------------------------------------------------------------------------------------------------------


async def test_f35_headers_are_bounded_in_all(start_api: StartApi) -> None:
    """Many headers, each small enough, are refused before they end."""
    async with start_api() as api, connect(api.port) as greedy:
        await greedy.send(b"GET /api/v1/ping HTTP/1.1\r\n")
        for number in range(9):
            await greedy.send(b"X-%d: " % number + b"x" * 8_000 + b"\r\n")
        status, _, body = await greedy.answer()
        assert (status, body["code"]) == (431, 30029)


async def test_f35_a_thousand_idle_connections(api: Api) -> None:
    """1,000 silent connections of one address hold no more than their share; another and the socket are served."""
    async with many(api.port, 1_000):
        assert api.server.figures.connections <= 128
        async with connect(api.port, source="127.0.0.2") as other:
            assert await other.ping()
        assert (await api.call("GET", "/api/v1/ping", session=api.unix))[0] == 200
        assert (await api.call("GET", "/api/v1/ping"))[0] == 200
        assert api.server.figures.refused["evicted"] >= 1_000 - 128


async def test_f35_those_without_a_request_give_way_first(start_api: StartApi) -> None:
    """For a newcomer the silent one goes, not the one that was served, nor the one that waits for its answer."""
    async with (
        start_api(tcp_bounds=Bounds(in_all=3, per_peer=3)) as api,
        connect(api.port) as polling,
        connect(api.port) as served,
        connect(api.port) as silent,
    ):
        await polling.send(WAIT)
        await api.operations.show_waits.wait()
        assert await served.ping()
        async with connect(api.port) as newcomer:
            assert await newcomer.ping()
            assert await silent.rest() == b""
            assert await served.ping()
        api.operations.task_ended.set()
        assert (await polling.answer())[0] == 200


async def test_f35_the_bound_in_all_takes_from_every_peer(start_api: StartApi) -> None:
    """Where many addresses fill all places, the one that has been silent for the longest gives way."""
    async with (
        start_api(tcp_bounds=Bounds(in_all=2, per_peer=2)) as api,
        connect(api.port, source="127.0.0.2") as oldest,
        connect(api.port, source="127.0.0.3") as other,
    ):
        await until_so(lambda: api.server.figures.connections == 2)
        async with connect(api.port, source="127.0.0.4") as newcomer:
            assert await newcomer.ping()
            assert await oldest.rest() == b""
            assert await other.ping()


async def test_f35_busy_places_are_not_taken(start_api: StartApi) -> None:
    """Where every place is busy a newcomer is told to come again; the Unix socket has places of its own."""
    async with start_api(tcp_bounds=Bounds(in_all=2, per_peer=2)) as api, many(api.port, 2, WAIT) as polling:
        await until_so(lambda: sum(name == "show_task" for name, _ in api.operations.calls) == 2)
        with structlog.testing.capture_logs() as logs:
            for _ in range(3):
                async with connect(api.port) as newcomer:
                    status, headers, body = await newcomer.answer()
                    assert (status, body["code"], headers["retry-after"]) == (503, 30023, "5")
                    assert await newcomer.rest() == b""
        assert [line["event"] for line in logs] == ["api_full"]
        assert (await api.call("GET", "/api/v1/ping", session=api.unix))[0] == 200
        api.operations.task_ended.set()
        for each in polling:
            assert (await each.answer())[0] == 200
        async with connect(api.port) as newcomer:
            assert await newcomer.ping()


async def test_f35_the_unix_socket_is_bounded_by_user(start_api: StartApi) -> None:
    """On the socket a user's own idle connections give way, too."""
    async with start_api(unix_bounds=Bounds(in_all=9, per_peer=1)) as api:
        path = api.server.endpoints.socket
        assert path is not None
        async with connect_unix(path) as first:
            assert await first.ping()
            async with connect_unix(path) as second:
                assert await second.ping()
                assert await first.rest() == b""


async def test_f35_places_come_back(start_api: StartApi) -> None:
    """However a connection ends, its place is free again."""
    async with start_api() as api:
        async with many(api.port, 20, PING[:-2]), many(api.port, 20, PING), many(api.port, 20, b"noise\r\n\r\n"):
            await until_so(lambda: api.server.figures.connections == 40)
        await until_so(lambda: api.server.figures.connections == 0)


async def test_f35_no_descriptors_left(start_api: StartApi) -> None:
    """A host out of descriptors is said in the log, what is open is served on, and later all of it again."""
    async with start_api() as api, connect(api.port) as old:
        assert await old.ping()
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as client:
            client.setblocking(False)
            with socket.socket() as next_one:
                lowest_free = next_one.fileno()
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
            try:
                with structlog.testing.capture_logs() as logs:
                    client.connect_ex(("127.0.0.1", api.port))
                    await until_so(lambda: any(line["event"] == "api_accept_failed" for line in logs))
                    assert await old.ping()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, before)
        async with connect(api.port) as later:
            assert await later.ping()
