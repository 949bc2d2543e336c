"""The calls about stored templates. A task or a group of one is submitted as if an operator had written it."""

from __future__ import annotations

from typing import Annotated, Any

from aiohttp import web
from pydantic import Field

from control_plane.group_forms import read_group
from control_plane.operator_calls import Route, actor_of, count_of, limit_of, with_times
from control_plane.requests import DestinationBody, Id, OperatorBody, parse, read_object
from control_plane.service import Service
from control_plane.store.distribution import ANYWHERE
from control_plane.templates import Filled
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.wire import JsonObject


class _NameBody(OperatorBody):
    name: Id


class _InstantiateBody(OperatorBody):
    version: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    variables: dict[str, Any] = Field(default={})
    id: Id | None = None
    to: DestinationBody | None = None


class TemplateApi:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._templates = service.templates

    def routes(self) -> list[Route]:
        """Store, list, look, remove, instantiate."""
        return [
            Route("POST", "/templates", "admin-template-store", self._store),
            Route("GET", "/templates", "admin-templates", self._list),
            Route("GET", "/templates/{name}", "admin-template", self._get),
            Route("DELETE", "/templates/{name}", "admin-template-remove", self._remove),
            Route("POST", "/templates/{name}/instantiate", "admin-template-instantiate", self._instantiate),
        ]

    async def _store(self, request: web.Request) -> JsonObject:
        sent = await read_object(request)
        name = parse(_NameBody, {"name": sent.pop("name", None)}).name
        return {"name": name, "version": await self._templates.store(name, sent, actor_of(request))}

    async def _list(self, request: web.Request) -> JsonObject:
        total, page = await self._templates.listed(limit_of(request), count_of(request, "offset", 0))
        return {"total": total, "templates": [_shown(template) for template in page]}

    async def _get(self, request: web.Request) -> JsonObject:
        version = count_of(request, "version", 0) or None
        return _shown(await self._templates.get(request.match_info["name"], version))

    async def _remove(self, request: web.Request) -> JsonObject:
        name = request.match_info["name"]
        return {"name": name, "removed_versions": await self._templates.remove(name, actor_of(request))}

    async def _instantiate(self, request: web.Request) -> JsonObject:
        body = parse(_InstantiateBody, await read_object(request))
        filled = await self._templates.fill(request.match_info["name"], body.version, body.variables)
        form = filled.form if body.id is None else {**filled.form, "id": body.id}
        made_of = {"template": filled.name, "version": filled.version}
        origin = f"template {filled.name} version {filled.version}"
        if not filled.is_group:
            to = ANYWHERE if body.to is None else body.to.destination
            task_ids = await self._service.submit([form], actor_of(request), to, origin)
            return {**made_of, "task_ids": task_ids}
        new, own_to = read_group(_with_destination(filled, form, body.to), self._service.work.new_id)
        ids = await self._service.groups.submit(new, own_to.destination, actor_of(request), origin)
        return {**made_of, "group_id": new.group_id, "task_ids": ids}


def _with_destination(filled: Filled, form: JsonObject, to: DestinationBody | None) -> JsonObject:
    if to is None:
        return form
    if "to" in form:
        raise Refused(Code.INVALID_PARAMETERS, f"to: template {filled.name} says itself where its tasks go")
    return {**form, "to": to.model_dump()}


def _shown(template: dict[str, Any]) -> JsonObject:
    body: JsonObject = template.pop("body")
    return {**with_times(template), **body}
