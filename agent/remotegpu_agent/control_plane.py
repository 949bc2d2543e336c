"""HTTP client of the control plane: auth, bounds, time limits. Makes no decisions: every call gives a `Reply`.

Never raises for what the other side does; no connection and a timeout are answers of the kind RETRY.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import aiohttp
import structlog

from remotegpu_agent import VERSION
from remotegpu_agent.answer_reading import read_body, redirect_sentence
from remotegpu_agent.clock import Clock
from remotegpu_agent.config_check import read_token
from remotegpu_agent.contact import Contact, Peer, Problem, failure_of, problem_of, proxy_refusal
from remotegpu_agent.proxies import Proxy
from remotegpu_agent.tls import RenewedContext, TlsFiles
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
    """An answer and when its request was sent (CLOCK_BOOTTIME ns, taken before the first byte).

    `problem` is why there is no answer of the plane; None when there is one.
    """

    answer: Answer
    sent_boottime_ns: int
    problem: Problem | None = None

    @property
    def verdict(self) -> Verdict:
        """What the answer means."""
        return self.answer.verdict


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
        proxy: Proxy | None = None,
        on_reconnect: Callable[[], None] = lambda: None,
    ) -> None:
        self._url = url.rstrip("/") + _BASE_PATH
        self._token_file = token_file
        self._timeout_s = timeout_s
        self._clock = clock
        files = tls or TlsFiles()
        self._peer = Peer(url, proxy, files.client_cert_file is not None)
        self._context = RenewedContext(files)
        self._on_reconnect = on_reconnect
        self._token = ""
        self._session: aiohttp.ClientSession | None = None
        self._back = asyncio.Event()
        self.contact = Contact()

    async def __aenter__(self) -> Self:
        """Open the connection pool; nothing is sent yet. Raises Misconfigured."""
        self._token = self._read_token()
        if self._peer.is_tls:
            self._context.open()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=limits.PLANE_CONNECTIONS_MAX),
            # The time of a whole call is bounded where it is made; aiohttp's own five minutes would cut long polls.
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"Accept-Encoding": "identity", "User-Agent": f"remotegpu-agent/{VERSION}"},
        )
        if self._peer.proxy is not None:
            log.info("the control plane is reached by way of a proxy", url=self._url, proxy=self._peer.proxy.name)
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
        return await self._call(
            "/tasks/claim",
            request.body(),
            extra_s=request.wait_sec or 0,
            answer_max_bytes=limits.WIRE_CLAIM_ANSWER_MAX_BYTES,
        )

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

    async def _call(
        self,
        path: str,
        body: JsonObject,
        *,
        extra_s: float = 0,
        timeout_s: float | None = None,
        answer_max_bytes: int = limits.WIRE_ANSWER_MAX_BYTES,
    ) -> Reply:
        whole_s, token = (timeout_s or self._timeout_s) + extra_s, self._token
        reply = await self._try(path, body, whole_s, answer_max_bytes)
        self._note(reply)
        if reply.verdict is Verdict.UNAUTHORIZED and self._has_other_token(token):
            reply = await self._try(path, body, whole_s, answer_max_bytes)
            self._note(reply)
        if reply.answer.has_odd_data:
            log.warning("the data of an answer is no object and counts as not given", path=path)
        return reply

    async def _try(self, path: str, body: JsonObject, timeout_s: float, answer_max_bytes: int) -> Reply:
        """One request; whatever comes of it is a reply."""
        sent_ns = self._clock.boottime_ns()
        problem: Problem | None = None
        try:
            async with asyncio.timeout(timeout_s):
                answer, problem = await self._post(path, body, answer_max_bytes)
        except TimeoutError:
            problem, answer = Problem.TIMEOUT, Answer(Verdict.RETRY, f"no whole answer within {timeout_s:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            had_contact = self.contact.last_contact_ms is not None
            problem, text = failure_of(error, self._peer, had_contact=had_contact)
            answer = Answer(Verdict.RETRY, text)
        return Reply(answer, sent_ns, problem)

    async def _post(self, path: str, body: JsonObject, answer_max_bytes: int) -> tuple[Answer, Problem | None]:
        if self._session is None:
            raise RuntimeError("the client is not open")
        peer = self._peer
        headers = {"X-Agent-Token": self._token, "Authorization": f"Bearer {self._token}"} if self._token else {}
        to_proxy = peer.proxy.authorization if peer.proxy is not None else {}
        if not peer.is_tls:
            headers |= to_proxy  # there is no tunnel: the request itself is the proxy's
        async with self._session.post(
            self._url + path,
            json=body,
            headers=headers,
            allow_redirects=False,
            ssl=self._context.current() if peer.is_tls else True,
            proxy=peer.proxy.url if peer.proxy is not None else None,
            proxy_headers=to_proxy or None,
        ) as response:
            if response.status == 407 and peer.proxy is not None:
                text = proxy_refusal(response.status, response.reason or "", peer)
                return Answer(Verdict.RETRY, text), Problem.PROXY
            if 300 <= response.status < 400:
                # Not even to the same origin: the answer to a POST that was redirected by 301 or 302 is a GET's.
                return Answer(Verdict.RETRY, redirect_sentence(response), {}, response.status), None
            data = await read_body(response, answer_max_bytes)
            return parse_answer(response.status, response.headers, data), None

    def _note(self, reply: Reply) -> None:
        contact, answer = self.contact, reply.answer
        was_connected, problem_before = contact.is_connected, contact.problem
        contact.problem = reply.problem or problem_of(answer)
        if contact.problem is None and answer.http_status == 0:
            contact.problem = Problem.UNREACHABLE
        contact.is_connected = contact.problem is None
        if answer.http_status != 0:
            contact.last_contact_ms = self._clock.wall_ms()
        contact.error = self._error(answer) if contact.problem is not None else None
        if contact.is_connected and not was_connected:
            log.info("the control plane answers", url=self._url)
            self._back.set()
            self._back = asyncio.Event()
            self._on_reconnect()
        elif contact.problem is not None and contact.problem is not problem_before:
            log.warning(
                "the control plane does not answer as it should",
                url=self._url,
                problem=contact.problem,
                error=contact.error,
            )

    def _error(self, answer: Answer) -> str:
        if self.contact.problem is Problem.TOKEN_REFUSED:
            return (
                f"it refuses the token (HTTP {answer.http_status}: {answer.message or 'no reason'}); tasks go on and "
                f"results are kept; put a valid token into {self._token_file}, it is read again by itself"
            )
        return answer.message or f"HTTP {answer.http_status}"

    def _read_token(self) -> str:
        if self._token_file is None:
            return ""
        try:
            return read_token(self._token_file)
        except OSError as error:
            raise Misconfigured(
                f"the token file {self._token_file} cannot be read: {error.strerror or error}; name another one"
            ) from error
        except ValueError as error:
            raise Misconfigured(f"the token file {self._token_file} {error}") from error

    def _has_other_token(self, refused: str) -> bool:
        """Whether there is another token than the refused one: of the file, or read by another call meanwhile."""
        try:
            self._token = self._read_token()
        except Misconfigured as error:
            log.error("the control plane refuses the token, and there is no other", error=str(error))
            return False
        if self._token == refused:
            log.error(
                "the control plane refuses the token; tasks go on and results are kept",
                token_file=str(self._token_file),
                remedy="put a valid token into the file; it is read again by itself",
            )
            return False
        return True
