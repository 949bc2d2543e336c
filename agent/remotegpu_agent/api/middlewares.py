"""What happens to every request, outside in, before its handler runs.

State changes outlive their caller; every answer is an envelope, is logged and audited; the caller is recognised;
the body is read within bounds.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from typing import Final

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

from remotegpu_agent.api.auth import (
    READING_METHODS,
    LocalPeer,
    NetworkPeer,
    Peer,
    identify,
    local_peer,
    network_peer,
    peer_key,
)
from remotegpu_agent.api.context import AUDIT_DETAIL, CALLER, Context, Route, context_of
from remotegpu_agent.api.envelope import failure
from remotegpu_agent.api.origins import check_host, check_origin, check_site
from remotegpu_agent.audit import AuditEntry
from remotegpu_schemas.errors import Code, Refused, Retryable

_PATH_SHOWN_CHARS: Final = 200
_RETRY_AFTER_S: Final = 5.0

_HEADERS: Final = {
    Code.UNAUTHORIZED: {"WWW-Authenticate": 'Bearer realm="remotegpu-agent"'},
    Code.RATE_LIMITED: {"Retry-After": "5"},
    Code.REQUEST_TIMEOUT: {"Connection": "close"},
}

log: structlog.typing.FilteringBoundLogger = structlog.get_logger(__name__)


def peer_of(request: web.Request) -> Peer:
    """The other end of this request's connection."""
    sock = None if request.transport is None else request.transport.get_extra_info("socket")
    if sock is None:
        raise Refused(Code.UNAVAILABLE, "the connection is gone")
    if sock.family.name == "AF_UNIX":
        return local_peer(sock)
    return network_peer(request.remote or "")


@web.middleware
async def outlive_caller(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A client that goes away ends its own reading, never a half-made change: that runs on, owned by the server."""
    if request.method in READING_METHODS:
        return await handler(request)
    context = context_of(request)
    change = asyncio.ensure_future(handler(request))
    context.pending.add(change)
    change.add_done_callback(context.pending.discard)
    return await asyncio.shield(change)


@web.middleware
async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever is raised into an envelope; write the access log and, for changes and legacy callers, the audit."""
    context = context_of(request)
    loop = asyncio.get_running_loop()
    started = loop.time()
    code, message, response = await _respond(context, request, handler)
    caller = request.get(CALLER)
    route = context.routes.get(request.match_info.route)
    if caller and route and (caller.is_legacy or request.method not in READING_METHODS):
        outcome = "ok" if code is Code.OK else f"{code.value} {code.name}: {message}"
        detail = request.get(AUDIT_DETAIL, {})
        await context.audit.record(
            AuditEntry(who=caller.who, what=route.name, source=caller.source, outcome=outcome, detail=detail)
        )
    log.debug(
        "api_request",
        caller=caller.who if caller else None,
        source=caller.source if caller else request.remote or "unix",
        method=request.method,
        path=request.path[:_PATH_SHOWN_CHARS],
        status=response.status,
        code=code.value,
        duration_ms=round(1000 * (loop.time() - started), 1),
    )
    return response


@web.middleware
async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Nobody passes without a right to (promise 8); the caller is bound to everything that is logged behind this."""
    context = context_of(request)
    peer = peer_of(request)
    if isinstance(peer, NetworkPeer):
        host = request.headers.get("Host")
        check_host(host, context.host_names)
        if request.method not in READING_METHODS:
            check_origin(request.headers.get("Origin"), host)
            check_site(request.headers.get("Sec-Fetch-Site"))
    route = context.routes.get(request.match_info.route)
    if route is not None and route.is_public:
        return await handler(request)
    try:
        caller = identify(context.rules, peer, request.headers, request.method, route.legacy_call if route else None)
    except Refused as refusal:
        if isinstance(peer, NetworkPeer) and refusal.code is Code.UNAUTHORIZED:
            _count_failure(context, request, peer)
        _log_refused(request, peer, route, refusal)
        raise
    request[CALLER] = caller
    with structlog.contextvars.bound_contextvars(caller=caller.who):
        return await handler(request)


@web.middleware
async def read_body(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Have the whole body in memory before the handler runs: at most `body_max_bytes`, within `body_deadline_s`."""
    if request.can_read_body:
        settings = context_of(request).settings
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in {"", "identity"}:
            # Nothing is unpacked here, so that no small body becomes a huge one.
            raise Refused(Code.INVALID_PARAMETERS, "a request body is sent as it is, without Content-Encoding")
        if (request.content_length or 0) > settings.body_max_bytes:
            raise Refused(Code.PAYLOAD_TOO_LARGE, f"a request body has at most {settings.body_max_bytes} bytes")
        try:
            async with asyncio.timeout(settings.body_deadline_s):
                await request.read()
        except TimeoutError as error:
            raise Refused(
                Code.REQUEST_TIMEOUT, f"the request body did not arrive within {settings.body_deadline_s:g} s"
            ) from error
        except (web.RequestPayloadError, HttpProcessingError, ConnectionError) as error:
            raise Refused(Code.INVALID_PARAMETERS, "the request body ended early or is badly encoded") from error
    return await handler(request)


async def _respond(context: Context, request: web.Request, handler: Handler) -> tuple[Code, str, web.StreamResponse]:
    headers: dict[str, str] = {}
    try:
        return Code.OK, "", await handler(request)
    except Refused as refusal:
        code, message = refusal.code, str(refusal)
        if refusal.retry_after_s is not None:
            headers = {"Retry-After": str(math.ceil(refusal.retry_after_s))}
    except web.HTTPException as error:
        code, message = _of_http(context, error)
        headers = {name: error.headers[name] for name in ("Allow",) if name in error.headers}
    except Retryable as error:
        code, message = Code.UNAVAILABLE, f"{error}; try again"
        headers = {"Retry-After": str(math.ceil(error.retry_after_s or _RETRY_AFTER_S))}
    except Exception:
        # The top of the loop over requests: one that fails must not hurt the others, and tells its caller nothing
        # but where to look.
        error_id = secrets.token_hex(4)
        log.exception("api_request_failed", error_id=error_id, method=request.method, path=request.path)
        code, message = Code.INTERNAL, f"internal error; see error_id {error_id} in the agent's log"
    response = failure(code, message, context.now())
    response.headers.update(_HEADERS.get(code, {}) | headers)
    return code, message, response


def _of_http(context: Context, error: web.HTTPException) -> tuple[Code, str]:
    """What aiohttp itself refuses, in our codes."""
    match error.status:
        case 404:
            return Code.ROUTE_NOT_FOUND, "no such route; the API begins at /api/v1"
        case 405:
            return Code.METHOD_NOT_ALLOWED, f"method not allowed; this route takes {error.headers.get('Allow', 'none')}"
        case 413:
            return Code.PAYLOAD_TOO_LARGE, f"a request body has at most {context.settings.body_max_bytes} bytes"
        case _:
            return Code.INVALID_PARAMETERS, error.reason


def _count_failure(context: Context, request: web.Request, peer: NetworkPeer) -> None:
    """One more that was not let in; raises Refused(RATE_LIMITED) instead when its address has failed too often."""
    failure = context.failures.note(peer_key(peer), asyncio.get_running_loop().time())
    if failure.retry_after_s == 0:
        return
    if failure.is_first_refused:
        log.warning("api_callers_limited", source=str(peer.address), method=request.method, until_it_pauses=True)
    raise Refused(
        Code.RATE_LIMITED,
        "too many requests without a right token from this address; one with a right token is served",
        failure.retry_after_s,
    )


def _log_refused(request: web.Request, peer: Peer, route: Route | None, refusal: Refused) -> None:
    log.warning(
        "api_caller_refused",
        source=f"unix uid {peer.uid}" if isinstance(peer, LocalPeer) else str(peer.address),
        method=request.method,
        operation=route.name if route else None,
        code=refusal.code.value,
        reason=str(refusal),
    )
