"""A client that speaks HTTP byte by byte, as slowly, as greedily and as wrongly as a test wants."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

PATIENCE_S: Final = 30.0
PING: Final = b"GET /api/v1/ping HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass
class Raw:
    """An open connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        """Send these bytes."""
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], dict[str, Any]]:
        """Status, headers and decoded body of the next answer."""
        async with asyncio.timeout(PATIENCE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            body = await self.reader.readexactly(int(headers["content-length"]))
            return int(head[0].split()[1]), headers, json.loads(body)

    async def ping(self) -> bool:
        """Whether /ping is answered on this connection."""
        await self.send(PING)
        return (await self.answer())[0] == 200

    async def rest(self) -> bytes:
        """What comes until the other side closes; a reset counts as that."""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                return await self.reader.read()
            return b""


@contextlib.asynccontextmanager
async def connect(
    port: int, *, source: str = "127.0.0.1", kept_bytes: int | None = None, context: ssl.SSLContext | None = None
) -> AsyncGenerator[Raw]:
    """A TCP connection from `source`, an address of loopback; of what is not read the kernel keeps `kept_bytes`."""
    sock = socket.socket()
    if kept_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, kept_bytes)
    sock.setblocking(False)
    sock.bind((source, 0))
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(
        sock=sock,
        limit=2**16 if kept_bytes is None else 1024,
        ssl=context,
        server_hostname="127.0.0.1" if context is not None else None,
    )
    async with _closing(reader, writer) as raw:
        yield raw


@contextlib.asynccontextmanager
async def connect_unix(path: Path) -> AsyncGenerator[Raw]:
    """A connection to the Unix socket."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    async with _closing(reader, writer) as raw:
        yield raw


@contextlib.asynccontextmanager
async def _closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> AsyncGenerator[Raw]:
    try:
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
