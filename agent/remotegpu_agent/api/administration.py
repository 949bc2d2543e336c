"""Handlers of what an operator does to the agent as a whole: drain, undrain, dead letters, metrics."""

from __future__ import annotations

from aiohttp import web
from pydantic import ValidationError

from remotegpu_agent.api.context import CALLER, context_of, note
from remotegpu_agent.api.envelope import success
from remotegpu_agent.api.parsing import OFFSET_MAX, Limit, Offset, ShowQuery, invalid, parse_query
from remotegpu_agent.metrics import CONTENT_TYPE
from remotegpu_schemas import limits
from remotegpu_schemas.api import DrainRequest, Message
from remotegpu_schemas.errors import Code, Refused


class PageQuery(Message):
    """?limit=&offset=."""

    limit: Limit = limits.API_LIST_DEFAULT
    offset: Offset = 0


async def drain(request: web.Request) -> web.Response:
    """POST /drain; the body may be empty."""
    context, body = context_of(request), await request.read()
    try:
        asked = DrainRequest() if body.strip() in {b"", b"null"} else DrainRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error, "body") from error
    note(request, reason=asked.reason)
    return success(await context.operations.drain(request[CALLER].who, asked.reason), context.now())


async def undrain(request: web.Request) -> web.Response:
    """POST /undrain."""
    context = context_of(request)
    return success(await context.operations.undrain(), context.now())


async def drain_state(request: web.Request) -> web.Response:
    """GET /drain?wait=seconds."""
    context = context_of(request)
    wait_s = 0.0 if context.stopping.is_set() else parse_query(ShowQuery, request).wait
    return success(await context.operations.drain_state(wait_s=wait_s), context.now())


async def metrics(request: web.Request) -> web.Response:
    """GET /metrics: Prometheus text, not wrapped."""
    text = await context_of(request).operations.metrics()
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})


async def list_dead_letters(request: web.Request) -> web.Response:
    """GET /dead-letters?limit=&offset=."""
    context, query = context_of(request), parse_query(PageQuery, request)
    found = await context.operations.dead_letters(limit=query.limit, offset=query.offset)
    return success(found, context.now())


async def show_dead_letter(request: web.Request) -> web.Response:
    """GET /dead-letters/{id}."""
    context = context_of(request)
    return success(await context.operations.show_dead_letter(_letter_id(request)), context.now())


async def resend_dead_letter(request: web.Request) -> web.Response:
    """POST /dead-letters/{id}/resend."""
    context, letter_id = context_of(request), _letter_id(request)
    note(request, letter_id=letter_id)
    return success(await context.operations.resend_dead_letter(letter_id), context.now())


async def drop_dead_letter(request: web.Request) -> web.Response:
    """DELETE /dead-letters/{id}."""
    context, letter_id = context_of(request), _letter_id(request)
    dropped = await context.operations.drop_dead_letter(letter_id)
    note(request, letter_id=letter_id, kind=dropped.kind, task_id=dropped.task_id, attempt_id=dropped.attempt_id)
    return success(dropped, context.now())


def _letter_id(request: web.Request) -> int:
    text = request.match_info["letter_id"]
    if not text.isascii() or not text.isdecimal() or len(text) > len(str(OFFSET_MAX)):
        raise Refused(Code.INVALID_PARAMETERS, f"dead letter: {text[:40]!r} is no number")
    return int(text)
