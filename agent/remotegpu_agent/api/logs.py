"""GET /tasks/{id}/logs: a piece of output as JSON, or what comes as Server-Sent Events (WHATWG HTML, 9.2)."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Final, Literal

import structlog
from aiohttp import web

from remotegpu_agent.api.context import Context, context_of
from remotegpu_agent.api.envelope import failure_text, success
from remotegpu_agent.api.parsing import LogQuery, parse_query, task_id_of
from remotegpu_schemas.api import LogChunk
from remotegpu_schemas.errors import Code, Refused

_KEEP_ALIVE: Final = b": keep-alive\n\n"

log: structlog.typing.FilteringBoundLogger = structlog.get_logger(__name__)


async def read_logs(request: web.Request) -> web.StreamResponse:
    """One chunk from `offset`; with `follow` an event for each chunk until the output ends or the client goes."""
    context = context_of(request)
    task_id = task_id_of(request)
    query = parse_query(LogQuery, request)
    if query.follow:
        return await _follow(context, request, task_id, query)
    chunk = await context.operations.read_log(
        task_id, stream=query.stream, offset=query.offset, limit=query.limit, run_no=query.run
    )
    return success(chunk, context.now())


async def _follow(context: Context, request: web.Request, task_id: str, query: LogQuery) -> web.StreamResponse:
    """Stream; a browser that reconnects sends the id of the last event, which is the next offset."""
    offset = _resume_offset(request, query.offset)
    with context.followers:
        # Refusals (no such task) must come as an ordinary answer, so ask before the stream begins.
        await context.operations.read_log(task_id, stream=query.stream, offset=offset, limit=1, run_no=query.run)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        response.force_close()
        await response.prepare(request)
        chunks = context.operations.follow_log(task_id, stream=query.stream, offset=offset, run_no=query.run)
        try:
            async with contextlib.aclosing(chunks):
                await _send_all(context, response, chunks)
        except ConnectionError:
            pass  # the client has gone, or did not read and lost its connection
        except Refused as refusal:
            await _send_error(context, response, refusal.code, str(refusal))
        except Exception:
            # As in `answer`, but the answer has begun: the error goes into the stream.
            error_id = secrets.token_hex(4)
            log.exception("api_follow_failed", error_id=error_id, task_id=task_id)
            await _send_error(
                context, response, Code.INTERNAL, f"internal error; see error_id {error_id} in the agent's log"
            )
    return response


async def _send_all(context: Context, response: web.StreamResponse, chunks: AsyncIterator[LogChunk]) -> None:
    stopping = asyncio.ensure_future(context.stopping.wait())
    try:
        while (chunk := await _next(context, response, chunks, stopping)) is not None:
            await response.write(f"id: {chunk.next_offset}\ndata: {chunk.model_dump_json()}\n\n".encode())
            if chunk.is_end:
                break
    finally:
        stopping.cancel()


async def _next(
    context: Context,
    response: web.StreamResponse,
    chunks: AsyncIterator[LogChunk],
    stopping: asyncio.Future[Literal[True]],
) -> LogChunk | None:
    """The next chunk, with comments while there is none; None at the end, or when the server stops."""
    coming = asyncio.ensure_future(_advance(chunks))
    try:
        while True:
            await asyncio.wait(
                (coming, stopping), timeout=context.settings.keep_alive_s, return_when=asyncio.FIRST_COMPLETED
            )
            if coming.done():
                return coming.result()
            if stopping.done():
                return None
            await response.write(_KEEP_ALIVE)
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)


async def _advance(chunks: AsyncIterator[LogChunk]) -> LogChunk | None:
    return await anext(chunks, None)


async def _send_error(context: Context, response: web.StreamResponse, code: Code, message: str) -> None:
    """The last event of a stream that breaks: named `error`, with the envelope as data."""
    with contextlib.suppress(ConnectionError):
        text = failure_text(code, message, context.now())
        await response.write(f"event: error\ndata: {text}\n\n".encode())


def _resume_offset(request: web.Request, asked: int) -> int:
    last_id = request.headers.get("Last-Event-ID", "")
    return int(last_id) if last_id.isascii() and last_id.isdigit() and len(last_id) < 16 else asked
