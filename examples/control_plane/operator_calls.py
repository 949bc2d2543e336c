"""What the calls of operators have in common: their routes, who makes them, numbers in a query, times in an answer."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from aiohttp import web

from control_plane.settings import LIST_MAX
from control_plane.store.audit import Actor
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.wire import JsonObject, format_time, parse_time

_LIST_DEFAULT: Final = 100
_SAID_NAME: Final = re.compile(r"[\w.@+-]{1,64}", re.ASCII)


class Route(NamedTuple):
    """One call; `name` begins with `admin-`. The handler runs only for somebody with the operator's token."""

    method: str
    path: str
    name: str
    handler: Callable[[web.Request], Awaitable[JsonObject | web.StreamResponse]]


def actor_of(request: web.Request) -> Actor:
    """The operator. There is one token for all of them; who uses it may say a name in `X-Operator`, unproven."""
    said = request.headers.get("X-Operator", "")
    name = f"operator:{said}" if _SAID_NAME.fullmatch(said) else "operator"
    return Actor(name, request.remote)


def limit_of(request: web.Request) -> int:
    """How many items a page has. Raises Refused (30005)."""
    return min(count_of(request, "limit", _LIST_DEFAULT), LIST_MAX)


def count_of(request: web.Request, name: str, default: int) -> int:
    """A number of the query. Raises Refused (30005)."""
    text = request.query.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 12:
        raise Refused(Code.INVALID_PARAMETERS, f"{name}: {text[:20]!r} is not a number from 0")
    return int(text)


def time_of(request: web.Request, name: str) -> int | None:
    """A time of the query, in milliseconds since 1970. Raises Refused (30005)."""
    text = request.query.get(name)
    if text is None:
        return None
    at = parse_time(text)
    if at is None:
        raise Refused(Code.INVALID_PARAMETERS, f"{name}: must be a time such as 2026-02-05T12:00:00Z")
    return int(at.timestamp() * 1000)


def with_times(stored: dict[str, Any]) -> dict[str, Any]:
    """Names and values of times as on the wire: `..._at_ms` becomes `..._at`, `lease_expires_ms` `lease_expires_at`."""
    shown: dict[str, Any] = {}
    for name, value in stored.items():
        if name.endswith("_ms") and name != "lease_ttl_ms":
            at = name.removesuffix("_ms").removesuffix("_at") + "_at"
            shown["at" if name == "at_ms" else at] = None if value is None else format_time(value / 1000)
        else:
            shown[name] = value
    return shown
