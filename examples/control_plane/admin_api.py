"""The calls of operators, under `/api/v1/admin`, with the operator's token. The envelope is always that of protocol.md.

| call | what it does |
|---|---|
| POST /machines {machine_id?, name?}, GET /machines | enrol: its first token; machines with agents and labels |
| POST /machines/{id}/tokens {agent_id?, name?, ttl_sec? or expires_at?}, GET | issue one more; list |
| POST /tokens/{id}/rotate {overlap_sec?, ttl_sec? or expires_at?}, /revoke | both good for the overlap; over at once |
| POST /tasks | a task, a list of them, a task file (`application/yaml`), or {tasks[], to} |
| GET /tasks?status, GET /tasks/{id}, POST /tasks/{id}/cancel, GET /stats | |
| GET /tasks/{id}/artifacts, GET and DELETE /tasks/{id}/artifacts/{attempt_id}/{name} | files; with `uploads_dir` only |
| POST /groups {id?, name?, mode?, on_failure?, max_parallel?, defaults{}?, tasks[], to?} | with depends_on, when |
| GET /groups?state, GET /groups/{id}, POST /groups/{id}/cancel | |
| POST /templates {name, description?, variables[]?, task or group}, GET /templates | next version; newest of all |
| GET /templates/{name}?version, DELETE /templates/{name} | |
| POST /templates/{name}/instantiate {variables{}, version?, id?, to?} | submits a task or a group |
| GET /audit?actor, action, subject, since, until, limit, before | who did what when, newest first |

`to` is {mode: any, broadcast or scatter, labels{}?, machine_ids[]?}. Lists take `limit` and `offset`.
`X-Operator: NAME` names the operator in the audit log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from control_plane import audit_api
from control_plane.dialect import Strict
from control_plane.endpoints import endpoint
from control_plane.group_api import GroupApi
from control_plane.operator_calls import Route, actor_of, count_of, limit_of, with_times
from control_plane.requests import MachineBody, SubmissionBody, parse, read_json, read_object
from control_plane.service import Service
from control_plane.store.tables import Status
from control_plane.submissions import read_task_file
from control_plane.template_api import TemplateApi
from control_plane.token_api import TokenApi
from control_plane.upload_api import UploadApi
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.wire import JsonObject

BASE_PATH: Final = "/api/v1/admin"
_YAML: Final = frozenset({"application/yaml", "application/x-yaml", "text/yaml"})


class AdminApi:
    """The handlers."""

    def __init__(self, service: Service, new_id: Callable[[], str], uploads: UploadApi | None = None) -> None:
        self._service = service
        self._uploads = uploads
        self._new_id = new_id
        self._dialect = Strict()

    def add_routes(self, app: web.Application) -> None:
        """Add every call, named `admin-...`."""
        service = self._service
        routes = (
            Route("POST", "/machines", "admin-enrol", self._enrol),
            Route("GET", "/machines", "admin-machines", self._machines),
            Route("POST", "/tasks", "admin-submit", self._submit),
            Route("GET", "/tasks", "admin-tasks", self._tasks),
            Route("GET", "/tasks/{task_id}", "admin-task", self._task),
            Route("POST", "/tasks/{task_id}/cancel", "admin-cancel", self._cancel),
            Route("GET", "/stats", "admin-stats", self._stats),
            *GroupApi(service.groups, self._new_id).routes(),
            *TemplateApi(service).routes(),
            *TokenApi(service.tokens, lambda: service.work.now_ms).routes(),
            *audit_api.routes(service.audit),
            *([] if self._uploads is None else self._uploads.routes()),
        )
        for method, path, name, handler in routes:
            app.router.add_route(
                method, BASE_PATH + path, endpoint(self._dialect, self._new_id, self._checked(handler)), name=name
            )

    def _checked(
        self, handler: Callable[[web.Request], Awaitable[JsonObject | web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[JsonObject | web.StreamResponse]]:
        async def handle(request: web.Request) -> JsonObject | web.StreamResponse:
            self._service.gate.check_admin(request.headers)
            data = await handler(request)
            if request.method != "GET":
                await self._service.audit.keep_bounds()
            return data

        return handle

    async def _enrol(self, request: web.Request) -> JsonObject:
        body = parse(MachineBody, await read_object(request))
        machine_id = body.machine_id or f"machine-{self._new_id()}"
        return {"machine_id": machine_id, "token": await self._service.enrol(machine_id, body.name, actor_of(request))}

    async def _machines(self, _request: web.Request) -> JsonObject:
        machines = await self._service.machines()
        for machine in machines:
            machine["agents"] = [with_times(agent) for agent in machine["agents"]]
        return {"machines": [with_times(machine) for machine in machines]}

    async def _submit(self, request: web.Request) -> JsonObject:
        if request.content_type in _YAML:
            return {"task_ids": await self._service.submit(read_task_file(await request.read()), actor_of(request))}
        sent = await read_json(request)
        if isinstance(sent, dict) and "tasks" in sent:
            body = parse(SubmissionBody, sent)
            task_ids = await self._service.submit(body.tasks, actor_of(request), body.to.destination)
        else:
            task_ids = await self._service.submit(sent if isinstance(sent, list) else [sent], actor_of(request))
        return {"task_ids": task_ids}

    async def _tasks(self, request: web.Request) -> JsonObject:
        status = request.query.get("status")
        if status is not None and status not in set(Status):
            raise Refused(Code.INVALID_PARAMETERS, f"status: {status!r} is none of {', '.join(Status)}")
        limit, offset = limit_of(request), count_of(request, "offset", 0)
        total, page = await self._service.tasks(Status(status) if status else None, limit, offset)
        return {"total": total, "tasks": [task_view(task) for task in page]}

    async def _task(self, request: web.Request) -> JsonObject:
        return task_view(await self._service.task(request.match_info["task_id"]))

    async def _cancel(self, request: web.Request) -> JsonObject:
        task_id = request.match_info["task_id"]
        return {"task_id": task_id, "status": await self._service.cancel(task_id, actor_of(request))}

    async def _stats(self, _request: web.Request) -> JsonObject:
        return {"tasks": await self._service.stats()}


def task_view(task: dict[str, Any]) -> JsonObject:
    """A task as operators see it; a single one also has `attempt_list` and `events`."""
    view = with_times(task)
    if view["machine_labels"] is not None:
        view["machine_id"] = None
    view["machine_id"] = view["machine_id"] or None
    view["progress"] = {"percent": view.pop("progress_percent"), "message": view.pop("progress_message")}
    view["completions"] = {name: view.pop(f"completions_{name}") for name in ("accepted", "repeated", "rejected")}
    for name in ("attempt_list", "events"):
        if name in view:
            view[name] = [with_times(item) for item in view[name]]
    return view
