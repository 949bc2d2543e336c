"""One connection: aiohttp's protocol, and what that lacks against clients that are slow, silent or greedy.

Deadlines for headers, for idleness and for readers; a bound of a request's headers in all; what the parser refuses, in
the envelope. `look` decides and is asked from outside, by whoever owns the connections. Knows no route and no caller.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import fcntl
import socket
import struct
import termios
from collections.abc import Callable
from typing import Final

import structlog
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong

from remotegpu_agent.api.envelope import HEADERS, failure, failure_bytes
from remotegpu_schemas import limits
from remotegpu_schemas.errors import Code

_LINGER_S: Final = 1.0
"""What still comes of a body that nobody wants is read for so long, so that the client sees the answer."""
_TAKEN_MIN_BYTES: Final = 16 * limits.KIB
"""Of a full buffer so much is taken within the patience with slow readers, or the reader is given up."""

_INT: Final = struct.Struct("i")
_LONG: Final = struct.Struct("Q")
_ACKED_OFFSET: Final = 120
"""`tcpi_bytes_acked` in struct tcp_info of linux/tcp.h."""

log: structlog.typing.FilteringBoundLogger = structlog.get_logger(__name__)


class Verdict(enum.Enum):
    """What is to become of a connection."""

    STAYS = enum.auto()
    IDLE = enum.auto()
    SLOW_HEADERS = enum.auto()
    SLOW_READER = enum.auto()


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a client may take, in seconds: for the headers of a request, between two requests, to read."""

    headers_s: float
    idle_s: float
    slow_reader_s: float


class WriteWatch:
    """Whether the other side takes what waits for it. Pure: told how much waits, and when.

    Where it is known how much was taken since the beginning (`acked_bytes`), that counts: what waits is filled up again
    as fast as it is taken, and looks the same each time.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._since: float | None = None
        self._last_bytes = 0
        self._taken_bytes = 0
        self._acked_bytes: int | None = None

    def took(self) -> None:
        """The buffer was emptied far enough to write on: begin anew."""
        self._since = None

    def is_stalled(self, waiting_bytes: int, now: float, acked_bytes: int | None = None) -> bool:
        """Whether too little was taken for too long, given what waits now."""
        if waiting_bytes == 0:
            self._since = None
            return False
        if self._since is None:
            self._since, self._last_bytes, self._taken_bytes, self._acked_bytes = now, waiting_bytes, 0, acked_bytes
            return False
        if acked_bytes is not None and self._acked_bytes is not None:
            self._taken_bytes = acked_bytes - self._acked_bytes
        else:
            self._taken_bytes += max(0, self._last_bytes - waiting_bytes)
        self._last_bytes = waiting_bytes
        if now - self._since < self._patience_s:
            return False
        if self._taken_bytes < _TAKEN_MIN_BYTES:
            return True
        self._since, self._taken_bytes, self._acked_bytes = now, 0, acked_bytes
        return False


class Connection(web.RequestHandler):
    """aiohttp's protocol for one connection. It awaits a request whenever all that were parsed are answered."""

    __slots__ = (
        "_answered",
        "_header_bytes",
        "_headers_since",
        "_link",
        "_now",
        "_on_lost",
        "_patience",
        "_quiet_since",
        "_wall_s",
        "_write_watch",
    )

    def __init__(
        self,
        manager: web.Server,
        *,
        loop: asyncio.AbstractEventLoop,
        patience: Patience,
        wall_s: Callable[[], float],
        on_lost: Callable[[Connection], None],
    ) -> None:
        super().__init__(
            manager,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # what aiohttp's own runner passes to have none
            lingering_time=_LINGER_S,
            max_line_size=limits.API_LINE_MAX_BYTES,
            max_field_size=limits.API_FIELD_MAX_BYTES,
            max_headers=limits.API_HEADERS_MAX_COUNT,
            auto_decompress=False,
        )
        self._patience = patience
        self._wall_s = wall_s
        self._on_lost = on_lost
        self._now = loop.time
        self._link: asyncio.Transport | None = None
        self._answered = 0
        self._header_bytes = 0
        self._headers_since: float | None = None
        self._quiet_since = self._now()
        self._write_watch = WriteWatch(patience.slow_reader_s)

    @property
    def awaits_request(self) -> bool:
        """Whether nothing is being answered: who waits for room may take the place of such a one."""
        return self._request_count <= self._answered

    @property
    def has_served(self) -> bool:
        """Whether a request of it was answered."""
        return self._answered > 0

    @property
    def quiet_since(self) -> float:
        """When it was made, or its last answer was on its way, on the loop's clock."""
        return self._quiet_since

    # --- asyncio's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake, if there is one, is over."""
        assert isinstance(transport, asyncio.Transport)
        self._link = transport
        self._quiet_since = self._now()
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Closed by whomever."""
        self._link = None
        super().connection_lost(exc)
        self._on_lost(self)

    def data_received(self, data: bytes) -> None:
        """Count what comes of a request that is not yet whole."""
        before = self._request_count
        super().data_received(data)
        if self._request_count > before:
            self._header_bytes, self._headers_since = 0, None
        elif data and self.awaits_request and self.transport is not None:
            self._header_bytes += len(data)
            if self._headers_since is None:
                self._headers_since = self._now()
            if self._header_bytes > limits.API_HEADERS_MAX_BYTES:
                self._refuse(
                    Code.HEADERS_TOO_LARGE,
                    f"request line and headers have at most {limits.API_HEADERS_MAX_BYTES} bytes in all",
                )

    def resume_writing(self) -> None:
        """The other side reads."""
        super().resume_writing()
        self._write_watch.took()

    # --- aiohttp's side ---

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer; what aiohttp refuses before our middlewares (an unknown Expect) has an envelope too."""
        if isinstance(resp, web.HTTPException):
            resp = self._refusal(Code.INVALID_PARAMETERS, resp.reason)
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._answered += 1
            self._quiet_since = self._now()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - aiohttp's signature; it shows what was sent
    ) -> web.StreamResponse:
        """The answer to what is no request. What was sent is not shown: it may hold a token."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        code, text = _of_parser(exc)
        if code is Code.INTERNAL:
            log.error("api_connection_failed", status=status, exc_info=exc)
        else:
            log.debug("api_not_http", source=request.remote or "unix", code=code.value, reason=type(exc).__name__)
        return self._refusal(code, text)

    def _refusal(self, code: Code, message: str) -> web.Response:
        refused = failure(code, message, self._wall_s())
        refused.headers.update(HEADERS)
        refused.force_close()
        return refused

    # --- the owner's side ---

    def look(self, now: float) -> Verdict:
        """What is due at `now` (the loop's clock). Changes nothing but what it remembers of the buffer."""
        if self._link is None:
            return Verdict.STAYS
        if waiting_bytes := _waiting_bytes(self._link):
            is_stalled = self._write_watch.is_stalled(waiting_bytes, now, _acked_bytes(self._link))
            self._quiet_since = now
            return Verdict.SLOW_READER if is_stalled else Verdict.STAYS
        self._write_watch.took()
        if self.transport is None or not self.awaits_request:
            return Verdict.STAYS
        if self._headers_since is not None:
            return Verdict.SLOW_HEADERS if now - self._headers_since >= self._patience.headers_s else Verdict.STAYS
        idle_s = self._patience.idle_s if self.has_served else self._patience.headers_s
        return Verdict.IDLE if now - self._quiet_since >= idle_s else Verdict.STAYS

    def end(self, verdict: Verdict) -> None:
        """Carry out what `look` found."""
        match verdict:
            case Verdict.STAYS:
                pass
            case Verdict.IDLE:
                self.force_close()
            case Verdict.SLOW_HEADERS:
                self._refuse(Code.REQUEST_TIMEOUT, f"the headers did not arrive within {self._patience.headers_s:g} s")
            case Verdict.SLOW_READER:
                self.abort()

    def abort(self) -> None:
        """Close at once: what the other side has not read is thrown away."""
        link = self._link
        self.force_close()
        if link is not None:
            link.abort()

    def _refuse(self, code: Code, message: str) -> None:
        """Answer outside of any request, and close: nothing else is being written while a request is awaited."""
        if self.transport is not None:
            self.transport.write(failure_bytes(code, message, self._wall_s()))
        self.force_close()


def _waiting_bytes(link: asyncio.Transport) -> int:
    """What the other side has yet to take; what lies below TLS shows in the kernel's queue only (tcp(7), TIOCOUTQ)."""
    waiting_bytes = link.get_write_buffer_size()
    if link.get_extra_info("ssl_object") is None:
        return waiting_bytes
    sock = link.get_extra_info("socket")
    if sock is None or sock.fileno() < 0:
        return waiting_bytes  # closed meanwhile
    queued = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(_INT.size))
    return waiting_bytes + int(_INT.unpack(queued)[0])


def _acked_bytes(link: asyncio.Transport) -> int | None:
    """What the other side's kernel has taken since the connection was made (tcp(7), TCP_INFO); None where unknown."""
    sock = link.get_extra_info("socket")
    if sock is None or sock.fileno() < 0 or sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return None
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_OFFSET + _LONG.size)
    # Linux before 4.1 gives less.
    return int(_LONG.unpack_from(info, _ACKED_OFFSET)[0]) if len(info) == _ACKED_OFFSET + _LONG.size else None


def _of_parser(error: BaseException | None) -> tuple[Code, str]:
    match error:
        case LineTooLong():
            return Code.HEADERS_TOO_LARGE, "the request line or a header is too long"
        case BadHttpMessage() if "Too many headers" in str(error.message):
            return Code.HEADERS_TOO_LARGE, f"a request has at most {limits.API_HEADERS_MAX_COUNT} headers"
        case BadHttpMessage():
            return Code.INVALID_PARAMETERS, "this is no valid HTTP/1.1 request"
        case _:
            return Code.INTERNAL, "internal error; see the agent's log"
