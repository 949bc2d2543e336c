"""The calls of agents (protocol.md, section 1): from a request to the service and back. Knows no dialect."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from aiohttp import web

from control_plane.answers import Bare
from control_plane.dialect import Dialect
from control_plane.endpoints import endpoint
from control_plane.requests import (
    AgentBody,
    AttemptBody,
    ProgressBody,
    ReleaseBody,
    RenewBody,
    StartBody,
    parse,
    read_object,
)
from control_plane.service import Service
from control_plane.settings import WAIT_MAX_S
from control_plane.store.audit import Actor
from control_plane.store.claims import ClaimOrder
from control_plane.store.fencing import Call
from control_plane.store.tables import ID_CHARS
from control_plane.upload_api import UploadApi, UploadUrlBody
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.wire import JsonObject

BASE_PATH: Final = "/api/v1/agent"


@dataclass(frozen=True)
class AgentCall:
    """One request of an agent whose token was accepted."""

    name: str
    request: web.Request
    machine_id: str
    body: JsonObject

    def about(self, body: AttemptBody) -> Call:
        """The attempt that it speaks of."""
        return Call(self.name, self.request.match_info["task_id"], body.attempt_id, body.agent_id, self.machine_id)


class AgentApi:
    """The handlers; `add_routes` names each route as its call."""

    def __init__(
        self, service: Service, dialect: Dialect, new_id: Callable[[], str], uploads: UploadApi | None = None
    ) -> None:
        self._service = service
        self._uploads = uploads
        self._dialect = dialect
        self._new_id = new_id

    def add_routes(self, app: web.Application) -> None:
        """Add every call that this plane offers."""
        handlers = {
            "register": ("/register", self._register),
            "heartbeat": ("/heartbeat", self._heartbeat),
            "claim": ("/tasks/claim", self._claim),
            "start": ("/tasks/{task_id}/start", self._start),
            "renew": ("/tasks/{task_id}/lease/renew", self._renew),
            "progress": ("/tasks/{task_id}/progress", self._progress),
            "complete": ("/tasks/{task_id}/complete", self._complete),
            "release": ("/tasks/{task_id}/release", self._release),
            "upload-url": ("/tasks/{task_id}/result/upload-url", self._upload_url),
        }
        for name, (path, handler) in handlers.items():
            if self._offers(name):
                app.router.add_post(
                    BASE_PATH + path, endpoint(self._dialect, self._new_id, self._checked(name, handler)), name=name
                )

    def _offers(self, name: str) -> bool:
        optional = {"release": self._dialect.offers_release, "upload-url": self._dialect.offers_uploads}
        return optional.get(name, True)

    def _checked(
        self, name: str, handler: Callable[[AgentCall], Awaitable[JsonObject | None]]
    ) -> Callable[[web.Request], Awaitable[JsonObject | None]]:
        async def handle(request: web.Request) -> JsonObject | None:
            who = "unknown"
            try:
                caller = await self._service.gate.caller_of(request.headers)
                who = f"agent:@{caller.machine_id}"
                body = await read_object(request)
                who = f"agent:{str(body.get('agent_id'))[:ID_CHARS]}@{caller.machine_id}"
                caller.check_agent(body.get("agent_id"))
                return await handler(AgentCall(name, request, caller.machine_id, body))
            except (Refused, Bare) as refusal:
                if not isinstance(refusal, Refused) or refusal.code is not Code.INTERNAL:  # that is no fault of theirs
                    by, subject = Actor(who, request.remote), request.match_info.get("task_id", "")
                    await self._service.audit.refused(by, f"{name}.refused", subject, _reason(refusal))
                raise

        return handle

    async def _register(self, call: AgentCall) -> JsonObject | None:
        body = parse(AgentBody, call.body)
        if self._dialect.check_machine(body.machine_id, call.machine_id):
            await self._service.register(body.agent_id, body.machine_id, call.body)
        return self._dialect.registered(body.machine_id)

    async def _heartbeat(self, call: AgentCall) -> JsonObject | None:
        body = parse(AgentBody, call.body)
        self._dialect.check_heartbeat(call.body)
        if not self._dialect.check_machine(body.machine_id, call.machine_id):
            return self._dialect.heartbeat(None)
        return self._dialect.heartbeat(await self._service.heartbeat(body.agent_id, body.machine_id, call.body))

    async def _claim(self, call: AgentCall) -> JsonObject | None:
        body = self._dialect.read_claim(call.body)
        if not self._dialect.check_machine(body.machine_id, call.machine_id) or body.count < 1:
            return {"tasks": []}
        order = ClaimOrder(
            machine_id=body.machine_id,
            agent_id=body.agent_id,
            request_id=body.request_id,
            limit=body.count,
            is_idempotent=self._dialect.is_idempotent,
            repeats_held=self._dialect.repeats_held,
        )
        tasks = await self._service.claim(order, min(body.wait_sec, WAIT_MAX_S), lambda: _is_gone(call.request))
        return {"tasks": [self._dialect.claimed_task(task) for task in tasks]}

    async def _start(self, call: AgentCall) -> JsonObject | None:
        body = parse(StartBody, call.body)
        about = call.about(body)
        started = await self._service.start(
            about, process_id=body.process_id, gpu_uuids=body.gpu_uuids, run_no=body.run_no
        )
        return {
            "task_id": about.task_id,
            "status": started.status,
            "attempt_id": about.attempt_id,
            "started_at": self._dialect.time(started.started_at_ms),
        }

    async def _renew(self, call: AgentCall) -> JsonObject | None:
        body = parse(RenewBody, call.body)
        about = call.about(body)
        return self._dialect.renewed(about.task_id, await self._service.renew(about, body.extend_sec))

    async def _progress(self, call: AgentCall) -> JsonObject | None:
        body = parse(ProgressBody, call.body)
        about = call.about(body)
        await self._service.progress(about, body.percent, body.message)
        return {"task_id": about.task_id, "progress": body.percent}

    async def _complete(self, call: AgentCall) -> JsonObject | None:
        about = call.about(parse(AttemptBody, call.body))
        status, result = self._dialect.read_completion(call.body)
        ended = await self._service.complete(about, status, result)
        return {
            "task_id": about.task_id,
            "status": ended.status,
            "ended_at": self._dialect.time(ended.ended_at_ms),
        }

    async def _release(self, call: AgentCall) -> JsonObject | None:
        body = parse(ReleaseBody, call.body)
        about = call.about(body)
        ended = await self._service.release(about, body.reason)
        return {"task_id": about.task_id, "status": ended.status}

    async def _upload_url(self, call: AgentCall) -> JsonObject | None:
        body = parse(UploadUrlBody, call.body)
        if self._uploads is None:
            raise Refused(Code.NOT_SUPPORTED, "this control plane takes no uploads")
        return await self._uploads.url_for(call.request, call.about(body), body)


def _reason(refusal: Refused | Bare) -> str:
    return f"{refusal.status if isinstance(refusal, Bare) else int(refusal.code)} {refusal}"


def _is_gone(request: web.Request) -> bool:
    """Whether nobody will read the answer."""
    return request.transport is None or request.transport.is_closing()
