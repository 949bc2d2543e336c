"""The calls about groups of tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from aiohttp import web

from control_plane.dependencies import GroupState, Standing
from control_plane.group_forms import read_group
from control_plane.groups import Groups
from control_plane.operator_calls import Route, actor_of, count_of, limit_of, with_times
from control_plane.requests import read_object
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.wire import JsonObject

_INSIDE: Final = ("seq", "settled_at_ms")
_INSIDE_MEMBER: Final = ("group_id", "position", "name", "is_unneeded")


class GroupApi:
    """The handlers."""

    def __init__(self, groups: Groups, new_id: Callable[[], str]) -> None:
        self._groups = groups
        self._new_id = new_id

    def routes(self) -> list[Route]:
        """Submit, list, look, cancel."""
        return [
            Route("POST", "/groups", "admin-group-submit", self._submit),
            Route("GET", "/groups", "admin-groups", self._list),
            Route("GET", "/groups/{group_id}", "admin-group", self._get),
            Route("POST", "/groups/{group_id}/cancel", "admin-group-cancel", self._cancel),
        ]

    async def _submit(self, request: web.Request) -> JsonObject:
        new, to = read_group(await read_object(request), self._new_id)
        task_ids = await self._groups.submit(new, to.destination, actor_of(request))
        return {"group_id": new.group_id, "task_ids": task_ids}

    async def _list(self, request: web.Request) -> JsonObject:
        state = request.query.get("state")
        if state is not None and state not in set(GroupState):
            raise Refused(Code.INVALID_PARAMETERS, f"state: {state[:20]!r} is none of {', '.join(GroupState)}")
        wanted = GroupState(state) if state else None
        total, page = await self._groups.listed(wanted, limit_of(request), count_of(request, "offset", 0))
        return {"total": total, "groups": [_shown(group) for group in page]}

    async def _get(self, request: web.Request) -> JsonObject:
        group = await self._groups.get(request.match_info["group_id"])
        members: list[dict[str, Any]] = group.pop("tasks")
        counts = Counter(member["standing"] for member in members)
        return {
            **_shown(group),
            "counts": {standing.value: counts[standing] for standing in Standing},
            "tasks": [{"id": member["name"]} | with_times(_without(member, _INSIDE_MEMBER)) for member in members],
        }

    async def _cancel(self, request: web.Request) -> JsonObject:
        group_id = request.match_info["group_id"]
        return {"group_id": group_id, "state": await self._groups.cancel(group_id, actor_of(request))}


def _shown(group: dict[str, Any]) -> JsonObject:
    return with_times(_without(group, _INSIDE))


def _without(stored: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in stored.items() if name not in names}
