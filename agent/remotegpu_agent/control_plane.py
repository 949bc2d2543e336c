"""HTTP client of the control plane: auth, bounds, time limits. Makes no decisions: every call gives a `Reply`.

Never raises for what the other side does; no connection and a timeout are answers of the kind RETRY.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import aiohttp
import structlog

from remotegpu_agent import VERSION
from remotegpu_agent.clock import Clock
from remotegpu_schemas import limits
from remotegpu_schemas.errors import Misconfigured
from remotegpu_schemas.task import TaskId
from remotegpu_schemas.wire import (
    Answer,
    ClaimRequest,
    HeartbeatRequest,
    JsonObject,
    RegisterRequest,
    RenewRequest,
    UploadUrlRequest,
    Verdict,
    parse_answer,
)

log = structlog.get_logger(__name__)

_BASE_PATH: Final = "/api/v1/agent"


@dataclass(frozen=True)
class Reply:
    """An answer and when its request was sent (CLOCK_BOOTTIME ns, taken before the first byte)."""

    answer: Answer
    sent_boottime_ns: int

    @property
    def verdict(self) -> Verdict:
        """What the answer means."""
        return self.answer.verdict


@dataclass(frozen=True)
class TlsFiles:
    """Own CA and client certificate, each optional."""

    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None


@dataclass
class Contact:
    """How the agent stands with the control plane, for people."""

    is_connected: bool = False
    last_contact_ms: int | None = None
    error: str | None = "not contacted yet"


class ControlPlane:
    """One control plane. Use as `async with`; calls may run concurrently and each may be repeated."""

    def __init__(
        self,
        url: str,
        *,
        token_file: Path | None,
        timeout_s: float,
        clock: Clock,
        tls: TlsFiles | None = None,
        on_reconnect: Callable[[], None] = lambda: None,
    ) -> None:
        self._url = url.rstrip("/") + _BASE_PATH
        self._token_file = token_file
        self._timeout_s = timeout_s
        self._clock = clock
        self._tls = tls or TlsFiles()
        self._on_reconnect = on_reconnect
        self._token = ""
        # Looked up once: aiohttp's `trust_env` asks two threads at each request.
        self._proxy = proxy_for(url)
        self._session: aiohttp.ClientSession | None = None
        self._back = asyncio.Event()
        self.contact = Contact()

    async def __aenter__(self) -> Self:
        """Open the connection pool; nothing is sent yet. Raises Misconfigured."""
        self._token = self._read_token()
        connector = aiohttp.TCPConnector(limit=limits.PLANE_CONNECTIONS_MAX, ssl=self._ssl_context())
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"Accept-Encoding": "identity", "User-Agent": f"remotegpu-agent/{VERSION}"},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the pool."""
        if self._session is not None:
            await self._session.close()

    async def register(self, request: RegisterRequest) -> Reply:
        """POST /register."""
        return await self._call("/register", request.body())

    async def heartbeat(self, request: HeartbeatRequest) -> Reply:
        """POST /heartbeat."""
        return await self._call("/heartbeat", request.body())

    async def claim(self, request: ClaimRequest) -> Reply:
        """POST /tasks/claim; waits `wait_sec` longer than other calls."""
        return await self._call("/tasks/claim", request.body(), extra_s=request.wait_sec or 0)

    async def renew(self, task_id: TaskId, request: RenewRequest, *, timeout_s: float) -> Reply:
        """POST /tasks/{id}/lease/renew within `timeout_s`, so that one hanging call does not eat the lease."""
        return await self._call(f"/tasks/{task_id}/lease/renew", request.body(), timeout_s=timeout_s)

    async def report(self, kind: str, task_id: TaskId, body: JsonObject) -> Reply:
        """POST /tasks/{id}/KIND, with KIND one of start, progress, complete, release; the body is sent as it is."""
        return await self._call(f"/tasks/{task_id}/{kind}", body)

    async def upload_url(self, task_id: TaskId, request: UploadUrlRequest) -> Reply:
        """POST /tasks/{id}/result/upload-url; only where the plane's `features` name `upload-url`."""
        return await self._call(f"/tasks/{task_id}/result/upload-url", request.body())

    async def pause(self, seconds: float, after: Answer) -> None:
        """Wait before a call is made again; where nothing answered it, no longer than until another call is answered.

        What the plane itself has put off waits its time, whatever becomes of other calls.
        """
        back = self._back
        at_least_s = seconds if after.http_status != 0 else min(seconds, limits.RECONNECT_PAUSE_MIN_S)
        await asyncio.sleep(at_least_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds - at_least_s):
                await back.wait()

    async def _call(self, path: str, body: JsonObject, *, extra_s: float = 0, timeout_s: float | None = None) -> Reply:
        reply = await self._try(path, body, (timeout_s or self._timeout_s) + extra_s)
        self._note(reply.answer)
        if reply.verdict is Verdict.UNAUTHORIZED and self._reread_token():
            reply = await self._try(path, body, (timeout_s or self._timeout_s) + extra_s)
            self._note(reply.answer)
        return reply

    async def _try(self, path: str, body: JsonObject, timeout_s: float) -> Reply:
        if self._session is None:
            raise RuntimeError("the client is not open")
        sent_ns = self._clock.boottime_ns()
        headers = {"X-Agent-Token": self._token, "Authorization": f"Bearer {self._token}"} if self._token else {}
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.post(
                    self._url + path, json=body, headers=headers, allow_redirects=False, proxy=self._proxy
                ) as response,
            ):
                data = await _read_bounded(response)
                answer = parse_answer(response.status, response.headers, data)
        except TimeoutError:
            answer = Answer(Verdict.RETRY, f"no answer within {timeout_s:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            answer = Answer(Verdict.RETRY, f"{type(error).__name__}: {error}"[: limits.WIRE_MESSAGE_MAX_CHARS])
        return Reply(answer, sent_ns)

    def _note(self, answer: Answer) -> None:
        was_connected = self.contact.is_connected
        reached = answer.http_status != 0
        works = reached and answer.verdict is not Verdict.UNAUTHORIZED and answer.http_status < 500
        self.contact.is_connected = works
        if reached:
            self.contact.last_contact_ms = self._clock.wall_ms()
        self.contact.error = None if works else answer.message
        if works and not was_connected:
            log.info("the control plane answers", url=self._url)
            self._back.set()
            self._back = asyncio.Event()
            self._on_reconnect()
        elif was_connected and not works:
            log.warning("the control plane does not answer as it should", url=self._url, error=answer.message)

    def _read_token(self) -> str:
        if self._token_file is None:
            return ""
        try:
            token = self._token_file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Misconfigured(
                f"the token file {self._token_file} cannot be read: {error}; name another one"
            ) from error
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise Misconfigured(
                f"the token file {self._token_file} must hold one token of printable ASCII, and nothing else"
            )
        return token

    def _reread_token(self) -> bool:
        """Whether the token file now holds another token than the refused one."""
        try:
            token = self._read_token()
        except Misconfigured as error:
            log.error("the control plane refuses the token", error=str(error))
            return False
        if token == self._token:
            log.error(
                "the control plane refuses the token; tasks go on and results are kept",
                token_file=str(self._token_file),
                remedy="put a valid token into the file; it is read again by itself",
            )
            return False
        self._token = token
        return True

    def _ssl_context(self) -> ssl.SSLContext | bool:
        if not self._url.startswith("https:"):
            return True
        tls = self._tls
        try:
            context = ssl.create_default_context(cafile=str(tls.ca_file) if tls.ca_file else None)
            if tls.client_cert_file is not None:
                context.load_cert_chain(tls.client_cert_file, tls.client_key_file)
        except (OSError, ssl.SSLError) as error:
            raise Misconfigured(
                f"the certificates of the control plane cannot be loaded: {error}; "
                "check control_plane.ca_file, client_cert_file and client_key_file"
            ) from error
        return context


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for this URL (`http_proxy`, `https_proxy`, `no_proxy`), or None."""
    parts = urllib.parse.urlsplit(url)
    if parts.hostname is None or urllib.request.proxy_bypass(parts.hostname):
        return None
    return urllib.request.getproxies().get(parts.scheme)


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    """The body, at most `limits.WIRE_ANSWER_MAX_BYTES`. Raises ValueError for more."""
    chunks, size = [], 0
    async for chunk in response.content.iter_chunked(64 * limits.KIB):
        size += len(chunk)
        if size > limits.WIRE_ANSWER_MAX_BYTES:
            raise ValueError(f"the answer is longer than {limits.WIRE_ANSWER_MAX_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)
