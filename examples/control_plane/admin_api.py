"""The calls of operators: machines, tasks, cancellation, counts. The envelope is always that of protocol.md."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

from aiohttp import web

from control_plane.dialect import Strict
from control_plane.endpoints import endpoint
from control_plane.requests import MachineBody, parse, read_json, read_object
from control_plane.service import Service
from control_plane.settings import LIST_MAX
from control_plane.store.tables import Status
from control_plane.submissions import read_task_file
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.wire import JsonObject, format_time

BASE_PATH: Final = "/api/v1/admin"
_YAML: Final = frozenset({"application/yaml", "application/x-yaml", "text/yaml"})
_LIST_DEFAULT: Final = 100


class AdminApi:
    """The handlers."""

    def __init__(self, service: Service, new_id: Callable[[], str]) -> None:
        self._service = service
        self._new_id = new_id
        self._dialect = Strict()

    def add_routes(self, app: web.Application) -> None:
        """Add every call, named `admin-...`."""
        handlers = (
            ("POST", "/machines", "admin-enrol", self._enrol),
            ("GET", "/machines", "admin-machines", self._machines),
            ("POST", "/tasks", "admin-submit", self._submit),
            ("GET", "/tasks", "admin-tasks", self._tasks),
            ("GET", "/tasks/{task_id}", "admin-task", self._task),
            ("POST", "/tasks/{task_id}/cancel", "admin-cancel", self._cancel),
            ("GET", "/stats", "admin-stats", self._stats),
        )
        for method, path, name, handler in handlers:
            app.router.add_route(
                method, BASE_PATH + path, endpoint(self._dialect, self._new_id, self._checked(handler)), name=name
            )

    def _checked(
        self, handler: Callable[[web.Request], Awaitable[JsonObject]]
    ) -> Callable[[web.Request], Awaitable[JsonObject]]:
        async def handle(request: web.Request) -> JsonObject:
            self._service.gate.check_admin(request.headers)
            return await handler(request)

        return handle

    async def _enrol(self, request: web.Request) -> JsonObject:
        body = parse(MachineBody, await read_object(request))
        machine_id = body.machine_id or f"machine-{self._new_id()}"
        return {"machine_id": machine_id, "token": await self._service.enrol(machine_id, body.name)}

    async def _machines(self, _request: web.Request) -> JsonObject:
        machines = await self._service.machines()
        for machine in machines:
            machine["agents"] = [_with_times(agent) for agent in machine["agents"]]
        return {"machines": [_with_times(machine) for machine in machines]}

    async def _submit(self, request: web.Request) -> JsonObject:
        items: object
        if request.content_type in _YAML:
            items = read_task_file(await request.read())
        else:
            items = await read_json(request)
        return {"task_ids": await self._service.submit(items if isinstance(items, list) else [items])}

    async def _tasks(self, request: web.Request) -> JsonObject:
        status = request.query.get("status")
        if status is not None and status not in set(Status):
            raise Refused(Code.INVALID_PARAMETERS, f"status: {status!r} is none of {', '.join(Status)}")
        limit = min(_count(request, "limit", _LIST_DEFAULT), LIST_MAX)
        offset = _count(request, "offset", 0)
        total, page = await self._service.tasks(Status(status) if status else None, limit, offset)
        return {"total": total, "tasks": [task_view(task) for task in page]}

    async def _task(self, request: web.Request) -> JsonObject:
        return task_view(await self._service.task(request.match_info["task_id"]))

    async def _cancel(self, request: web.Request) -> JsonObject:
        task_id = request.match_info["task_id"]
        return {"task_id": task_id, "status": await self._service.cancel(task_id)}

    async def _stats(self, _request: web.Request) -> JsonObject:
        return {"tasks": await self._service.stats()}


def task_view(task: dict[str, Any]) -> JsonObject:
    """A task as operators see it; a single one also has `attempt_list` and `events`."""
    view = _with_times(task)
    view["machine_id"] = view["machine_id"] or None
    view["progress"] = {"percent": view.pop("progress_percent"), "message": view.pop("progress_message")}
    view["completions"] = {name: view.pop(f"completions_{name}") for name in ("accepted", "repeated", "rejected")}
    for name in ("attempt_list", "events"):
        if name in view:
            view[name] = [_with_times(item) for item in view[name]]
    return view


def _with_times(stored: dict[str, Any]) -> dict[str, Any]:
    """Names and values of times as on the wire: `..._at_ms` becomes `..._at`, `lease_expires_ms` `lease_expires_at`."""
    shown: dict[str, Any] = {}
    for name, value in stored.items():
        if name.endswith("_ms") and name != "lease_ttl_ms":
            at = name.removesuffix("_ms").removesuffix("_at") + "_at"
            shown["at" if name == "at_ms" else at] = None if value is None else format_time(value / 1000)
        else:
            shown[name] = value
    return shown


def _count(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not text.isdecimal() or len(text) > 9:
        raise Refused(Code.INVALID_PARAMETERS, f"{name}: {text[:20]!r} is not a number from 0")
    return int(text)
