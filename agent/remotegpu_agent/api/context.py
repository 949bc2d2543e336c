"""What the handlers share: one value in the application, and what a request carries from the guard to log and audit."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler

from remotegpu_agent.api.auth import Caller, Rules
from remotegpu_agent.api.failures import Failures
from remotegpu_agent.api.settings import ApiSettings, LegacyCall
from remotegpu_agent.audit import AuditLog
from remotegpu_agent.operations import Operations
from remotegpu_schemas.errors import Code, Refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """One call of the API. `name` is the operation's word in the audit log."""

    name: str
    method: str
    path: str
    handler: Handler
    legacy_call: LegacyCall | None = None
    is_public: bool = False
    root_path: str | None = None
    """Where the call is found as well, outside of the base path."""


class Followers:
    """The places for clients that follow output; bounded."""

    def __init__(self, places: int) -> None:
        self._places = places
        self.count = 0

    def __enter__(self) -> None:
        if self.count >= self._places:
            raise Refused(Code.RATE_LIMITED, f"{self._places} clients follow output already; try again later")
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The parts behind the handlers. `stopping` is set when the server wants its long answers to end."""

    operations: Operations
    settings: ApiSettings
    rules: Rules
    host_names: frozenset[str]
    audit: AuditLog
    now: Callable[[], float]
    own_pid: int
    followers: Followers
    failures: Failures
    stopping: asyncio.Event
    routes: Mapping[object, Route]
    """By the resource's route object of aiohttp."""
    pending: set[asyncio.Task[web.StreamResponse]]
    """Changes of state that go on although their caller has gone."""


CONTEXT: Final = web.AppKey("CONTEXT", Context)
CALLER: Final = web.RequestKey("CALLER", Caller)
AUDIT_DETAIL: Final = web.RequestKey("AUDIT_DETAIL", dict[str, str | int | None])


def context_of(request: web.Request) -> Context:
    """The parts behind this request."""
    return request.config_dict[CONTEXT]


def note(request: web.Request, **detail: str | int | None) -> None:
    """Say in the audit log what the request was about. Never secrets."""
    request.setdefault(AUDIT_DETAIL, {}).update(detail)
