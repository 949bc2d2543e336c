"""GET /audit: who did what when, newest first."""

from __future__ import annotations

from aiohttp import web

from control_plane.audit import Audit
from control_plane.operator_calls import Route, count_of, limit_of, time_of, with_times
from control_plane.store.audit import Filter
from remotegpu_schemas.wire import JsonObject


def routes(audit: Audit) -> list[Route]:
    """The one call. Filters: actor, action, subject, since, until; `before` is the `next_before` of the last page."""

    async def query(request: web.Request) -> JsonObject:
        wanted = Filter(
            actor=request.query.get("actor"),
            action=request.query.get("action"),
            subject=request.query.get("subject"),
            since_ms=time_of(request, "since"),
            until_ms=time_of(request, "until"),
        )
        limit = max(1, limit_of(request))
        before = count_of(request, "before", 0) or None
        entries = await audit.page(wanted, before, limit)
        return {
            "entries": [with_times(entry) for entry in entries],
            "next_before": entries[-1]["seq"] if len(entries) == limit else None,
        }

    return [Route("GET", "/audit", "admin-audit", query)]
