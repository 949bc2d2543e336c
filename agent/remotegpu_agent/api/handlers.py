"""One handler a call: read the request, ask `Operations`, wrap the answer. No decisions are made here."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

from aiohttp import web

from remotegpu_agent import host
from remotegpu_agent.api.context import CALLER, Context, context_of, note
from remotegpu_agent.api.envelope import bare, success
from remotegpu_agent.api.openapi import text
from remotegpu_agent.api.parsing import ListQuery, ShowQuery, SubmitQuery, parse_body, parse_query, task_id_of
from remotegpu_agent.api.submission import parse_submission
from remotegpu_agent.task_user import Submitter
from remotegpu_schemas import limits
from remotegpu_schemas.api import ProcessStopRequest, SubmitAnswer, TaskDetail
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.task import Task

_IDS_AUDITED_MAX = 20
_PARSED_AT_ONCE_MAX_BYTES = 8 * limits.KIB


async def ping(request: web.Request) -> web.Response:
    """GET /ping."""
    context = context_of(request)
    return success(context.operations.ping(), context.now())


async def system_info(request: web.Request) -> web.Response:
    """GET /system/info: not wrapped, because deployed planes read it from the top level."""
    return bare(await context_of(request).operations.system_info())


async def queue_status(request: web.Request) -> web.Response:
    """GET /queue/status."""
    context = context_of(request)
    return success(await context.operations.queue_status(), context.now())


async def openapi(request: web.Request) -> web.Response:
    """GET /openapi.json: not wrapped. Made once, on a thread: it takes as long as reading a large task file."""
    routes = tuple(dict.fromkeys(context_of(request).routes.values()))
    return web.Response(text=await asyncio.to_thread(text, routes), content_type="application/json")


async def submit_tasks(request: web.Request) -> web.Response:
    """POST /tasks?directory=: the tasks of a task file, all or none."""
    context = context_of(request)
    directory = parse_query(SubmitQuery, request).directory
    tasks = await _parse(await request.read(), context.settings.machine_id)
    uid, here = request[CALLER].uid, Path(directory) if directory is not None else None
    task_ids = await context.operations.submit(tasks, Submitter(uid, here) if uid is not None else None)
    note(request, tasks=len(task_ids), task_ids=" ".join(task_ids[:_IDS_AUDITED_MAX]))
    return success(SubmitAnswer(task_ids=task_ids), context.now())


async def list_tasks(request: web.Request) -> web.Response:
    """GET /tasks?state=&label=&limit=&offset=."""
    context = context_of(request)
    query = parse_query(ListQuery, request)
    page = await context.operations.list_tasks(
        states=query.state, labels=query.labels, limit=query.limit, offset=query.offset
    )
    return success(page, context.now())


async def show_task(request: web.Request) -> web.Response:
    """GET /tasks/{id}?wait=seconds; a wait ends early, with the present state, when the server stops."""
    context = context_of(request)
    task_id = task_id_of(request)
    wait_s = parse_query(ShowQuery, request).wait
    return success(await _show(context, task_id, wait_s), context.now())


async def cancel_task(request: web.Request) -> web.Response:
    """POST /tasks/{id}/cancel."""
    context = context_of(request)
    task_id = task_id_of(request)
    note(request, task_id=task_id)
    return success(await context.operations.cancel_task(task_id), context.now())


async def suspend_task(request: web.Request) -> web.Response:
    """POST /tasks/{id}/suspend."""
    context = context_of(request)
    task_id = task_id_of(request)
    note(request, task_id=task_id)
    return success(await context.operations.suspend_task(task_id), context.now())


async def resume_task(request: web.Request) -> web.Response:
    """POST /tasks/{id}/resume."""
    context = context_of(request)
    task_id = task_id_of(request)
    note(request, task_id=task_id)
    return success(await context.operations.resume_task(task_id), context.now())


async def stop_process(request: web.Request) -> web.Response:
    """POST /process/stop, as deployed planes call it. Process 1 and the agent are nobody's run, whoever asks."""
    context = context_of(request)
    asked = await parse_body(ProcessStopRequest, request)
    note(request, process_id=asked.process_id, signal=asked.signal.value)
    if asked.process_id in (1, context.own_pid):
        name = "the init process" if asked.process_id == 1 else "the agent itself"
        raise Refused(Code.PROCESS_NOT_MANAGED, f"process {asked.process_id} is {name}, not a run of this agent")
    try:
        async with asyncio.timeout(context.settings.stop_answer_s):
            stopped = await context.operations.stop_process(asked)
    except TimeoutError as error:
        raise Refused(
            Code.UNAVAILABLE, f"no answer about process {asked.process_id} in time; ask again to see whether it ended"
        ) from error
    note(request, task_id=stopped.task_id, state=stopped.state)
    return success(stopped, context.now())


async def _parse(body: bytes, machine_id: str) -> list[Task]:
    """A long file is read on a thread: it may take a second, and the others are served meanwhile (F33)."""
    parse = functools.partial(parse_submission, body, machine_id=machine_id, own_addresses=host.ip_addresses)
    return await asyncio.to_thread(parse) if len(body) > _PARSED_AT_ONCE_MAX_BYTES else parse()


async def _show(context: Context, task_id: str, wait_s: float) -> TaskDetail:
    if wait_s == 0 or context.stopping.is_set():
        return await context.operations.show_task(task_id)
    shown = asyncio.ensure_future(context.operations.show_task(task_id, wait_s=wait_s))
    stopping = asyncio.ensure_future(context.stopping.wait())
    try:
        await asyncio.wait((shown, stopping), return_when=asyncio.FIRST_COMPLETED)
        if shown.done():
            return shown.result()
    finally:
        stopping.cancel()
        shown.cancel()
        await asyncio.gather(shown, stopping, return_exceptions=True)
    return await context.operations.show_task(task_id)
