"""The way from one host to the control plane: a relay of bytes that can be cut off, hang, and come back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Final, Self

_PIECE_BYTES: Final = 64 * 1024
_BACKLOG: Final = 512
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER of no seconds: close(2) sends a reset (socket(7))."""


class Link:
    """A TCP relay on loopback to a port that may change. Use as `async with`; open from the start."""

    def __init__(self, port: Callable[[], int]) -> None:
        self._to_port = port
        # Bound for ever and never listening: nobody else gets the port while the link is cut.
        self._place = socket.socket()
        self._place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._place.bind(("127.0.0.1", 0))
        self._port: int = self._place.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._flows = asyncio.Event()
        self._relays: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    @property
    def url(self) -> str:
        """What the host knows as its control plane."""
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        """Listen."""
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all of it."""
        await self.cut()
        self._place.close()

    async def open(self) -> None:
        """Bytes flow, also those that were held up. Safe to repeat."""
        self._flows.set()
        if self._server is None:
            self._server = await asyncio.start_server(
                self._accept, "127.0.0.1", self._port, backlog=_BACKLOG, reuse_address=True
            )

    async def hang(self) -> None:
        """Connections are accepted and kept, and nothing comes through any more, in either direction."""
        self._flows.clear()

    async def cut(self) -> None:
        """Every connection is reset, and new ones are refused."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        await self.reset()

    async def reset(self) -> None:
        """Every connection is reset; new ones are accepted as before."""
        relays = list(self._relays)
        for relay in relays:
            for writer in self._relays[relay]:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                writer.transport.abort()
            relay.cancel()
        await asyncio.gather(*relays, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A task of our own for each connection: one of the stream server's may not be cancelled."""
        relay = asyncio.create_task(self._relay(reader, writer))
        self._relays[relay] = [writer]
        relay.add_done_callback(self._forget)

    def _forget(self, relay: asyncio.Task[None]) -> None:
        for writer in self._relays.pop(relay):
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relay = asyncio.current_task()
        assert relay is not None
        with contextlib.suppress(OSError, ExceptionGroup):  # either side has gone: so does the other
            await self._flows.wait()
            there, to_there = await asyncio.open_connection("127.0.0.1", self._to_port())
            self._relays[relay].append(to_there)
            async with asyncio.TaskGroup() as both_ways:
                both_ways.create_task(self._pump(reader, to_there))
                both_ways.create_task(self._pump(there, writer))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while piece := await source.read(_PIECE_BYTES):
            await self._flows.wait()
            sink.write(piece)
            await sink.drain()
        await self._flows.wait()
        with contextlib.suppress(OSError):
            sink.write_eof()
