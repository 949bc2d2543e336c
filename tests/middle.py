"""What stands between an agent and its control plane, as real servers over loopback: TLS, a proxy, odd answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import trustme

Respond: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HOST: Final = "127.0.0.1"
_PIECE_BYTES: Final = 65536
_DRIP_S: Final = 0.05
_HEAD_MAX_BYTES: Final = 1 << 20


@contextlib.asynccontextmanager
async def listening(respond: Respond, tls: ssl.SSLContext | None = None, port: int = 0) -> AsyncGenerator[int]:
    """A server that answers each connection so; the port. What it still does at the end is cancelled."""
    open_now: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_now.add(task)
        try:
            await respond(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):  # the other side has gone, or the test is over
            writer.transport.abort()
        finally:
            open_now.discard(task)
            with contextlib.suppress(OSError):
                writer.close()

    server = await asyncio.start_server(serve, HOST, port, ssl=tls, limit=_HEAD_MAX_BYTES)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(open_now):
            task.cancel()
        await asyncio.gather(*open_now, return_exceptions=True)


def relay_to(port: int) -> Respond:
    """Both directions to a server of this host, until either side ends."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection(HOST, port)
        try:
            await _relay((reader, writer), (onward_reader, onward_writer))
        finally:
            onward_writer.transport.abort()

    return respond


_Side: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _relay(near: _Side, far: _Side) -> None:
    ways = [asyncio.create_task(_copy(near[0], far[1])), asyncio.create_task(_copy(far[0], near[1]))]
    try:
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(_PIECE_BYTES):
        writer.write(piece)
        await writer.drain()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """A whole request, head and body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
    return head + await reader.readexactly(int(length.partition(b":")[2]))


def saying(*pieces: bytes) -> Respond:
    """One request is read, these bytes are the answer, and the connection ends."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()

    return respond


@dataclass
class Front:
    """Stands before a plane on `port`, a request per connection, and plays what is ordered instead of some answers.

    Calls are named by the end of their path: register, heartbeat, claim, start, renew, progress, complete. `seen` has
    each call with the time (monotonic, s) at which it came.
    """

    port: int
    ordered: dict[str, list[Respond]] = field(default_factory=dict)
    lasting: dict[str, Respond] = field(default_factory=dict)
    seen: list[tuple[str, float]] = field(default_factory=list)

    async def respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        request = await read_request(reader)
        call = request.partition(b"\r\n")[0].split(b" ")[1].rpartition(b"/")[2].decode()
        self.seen.append((call, time.monotonic()))
        row = self.ordered.get(call)
        odd = row.pop(0) if row else self.lasting.get(call)
        if odd is not None:
            await odd(_having(request), writer)
            return
        far_reader, far_writer = await asyncio.open_connection(HOST, self.port)
        try:
            far_writer.write(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            await _relay((reader, writer), (far_reader, far_writer))
        finally:
            far_writer.transport.abort()


def _having(request: bytes) -> asyncio.StreamReader:
    """A reader that has this request and nothing more."""
    reader = asyncio.StreamReader(limit=_HEAD_MAX_BYTES)
    reader.feed_data(request)
    return reader


def dripping(head: bytes, drop: bytes = b" ") -> Respond:
    """The beginning of an answer, then a byte now and then, as long as somebody listens."""

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(head)
        while not writer.is_closing():
            writer.write(drop)
            await writer.drain()
            await asyncio.sleep(_DRIP_S)

    return respond


@dataclass
class Proxy:
    """An HTTP proxy with CONNECT, which finds hosts by `routes` alone. `asked` has the first line of each request."""

    routes: Mapping[str, int]
    credentials: str | None = None
    refusal: bytes | None = None
    asked: list[str] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    def cut(self) -> None:
        """End every connection that goes through it now."""
        for writer in self._open:
            writer.transport.abort()

    async def respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        line = head.partition(b"\r\n")[0].decode()
        self.asked.append(line)
        self.heads.append(head)
        if self.refusal is not None:
            writer.write(self.refusal)
        elif not self._may(head):
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        else:
            await self._forward(line, head, (reader, writer))
        await writer.drain()

    async def _forward(self, line: str, head: bytes, near: _Side) -> None:
        method, target, _ = line.split(" ", 2)
        place = target if method == "CONNECT" else target.split("/")[2]
        if place not in self.routes:
            near[1].write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
            return
        far = await asyncio.open_connection(HOST, self.routes[place])
        try:
            self._open.add(near[1])
            if method == "CONNECT":
                near[1].write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                path = "/" + target.split("/", 3)[3]
                far[1].write(head.replace(target.encode(), path.encode(), 1))
            await _relay(near, far)
        finally:
            self._open.discard(near[1])
            far[1].transport.abort()

    def _may(self, head: bytes) -> bool:
        if self.credentials is None:
            return True
        wanted = base64.b64encode(self.credentials.encode())
        return b"\r\nProxy-Authorization: Basic " + wanted + b"\r\n" in head


def serving(certificate: trustme.LeafCert, clients: trustme.CA | None = None) -> ssl.SSLContext:
    """TLS of a server with this certificate; with `clients` only for those that have one of this CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    if clients is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        clients.configure_trust(context)
    return context


def write_ca(authority: trustme.CA, path: Path) -> Path:
    """The CA's certificate as a file."""
    authority.cert_pem.write_to_path(path)
    return path


def write_pair(certificate: trustme.LeafCert, cert_file: Path, key_file: Path) -> None:
    """A certificate with its chain, and its key, as two files."""
    cert_file.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(key_file)
