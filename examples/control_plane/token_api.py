"""The calls about agents' tokens. A secret is in the answer that made it, and nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

from aiohttp import web
from pydantic import Field

from control_plane.operator_calls import Route, actor_of, with_times
from control_plane.requests import Id, OperatorBody, Text, Time, parse, read_object
from control_plane.settings import TOKEN_OVERLAP_DEFAULT_S, TOKEN_OVERLAP_MAX_S, TOKEN_TTL_MAX_S
from control_plane.tokens import Issued, Tokens
from remotegpu_schemas import limits
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.wire import JsonObject, format_time, parse_time


class _ExpiringBody(OperatorBody):
    expires_at: Time | None = None
    ttl_sec: Annotated[int, Field(ge=1, le=TOKEN_TTL_MAX_S)] | None = None

    def expires_at_ms(self, now_ms: int) -> int | None:
        """When the token ends, in milliseconds; None for never. Raises Refused (30005)."""
        if self.expires_at is not None and self.ttl_sec is not None:
            raise Refused(Code.INVALID_PARAMETERS, "expires_at, ttl_sec: one thing, two values; keep one")
        if self.ttl_sec is not None:
            return now_ms + self.ttl_sec * 1000
        at = parse_time(self.expires_at)
        if at is None:
            return None
        at_ms = int(at.timestamp() * 1000)
        if not now_ms < at_ms <= now_ms + TOKEN_TTL_MAX_S * 1000:
            raise Refused(Code.INVALID_PARAMETERS, f"expires_at: must lie ahead, at most {TOKEN_TTL_MAX_S} seconds")
        return at_ms


class _IssueBody(_ExpiringBody):
    agent_id: Id | None = None
    name: Annotated[Text, Field(max_length=limits.NAME_MAX_CHARS)] = ""


class _RotateBody(_ExpiringBody):
    overlap_sec: Annotated[int, Field(ge=0, le=TOKEN_OVERLAP_MAX_S)] = TOKEN_OVERLAP_DEFAULT_S


class TokenApi:
    """The handlers."""

    def __init__(self, tokens: Tokens, now_ms: Callable[[], int]) -> None:
        self._tokens = tokens
        self._now_ms = now_ms

    def routes(self) -> list[Route]:
        """Issue and list by machine; rotate and revoke by token."""
        return [
            Route("POST", "/machines/{machine_id}/tokens", "admin-token-issue", self._issue),
            Route("GET", "/machines/{machine_id}/tokens", "admin-tokens", self._list),
            Route("POST", "/tokens/{token_id}/rotate", "admin-token-rotate", self._rotate),
            Route("POST", "/tokens/{token_id}/revoke", "admin-token-revoke", self._revoke),
        ]

    async def _issue(self, request: web.Request) -> JsonObject:
        body = parse(_IssueBody, await read_object(request))
        issued = await self._tokens.issue(
            request.match_info["machine_id"],
            agent_id=body.agent_id,
            name=body.name,
            expires_at_ms=body.expires_at_ms(self._now_ms()),
            by=actor_of(request),
        )
        return _shown(issued)

    async def _list(self, request: web.Request) -> JsonObject:
        found = await self._tokens.listed(request.match_info["machine_id"])
        now_ms = self._now_ms()
        return {"tokens": [{**with_times(token), "is_good": _is_good(token, now_ms)} for token in found]}

    async def _rotate(self, request: web.Request) -> JsonObject:
        body = parse(_RotateBody, await read_object(request))
        issued = await self._tokens.rotate(
            request.match_info["token_id"],
            expires_at_ms=body.expires_at_ms(self._now_ms()),
            overlap_ms=body.overlap_sec * 1000,
            by=actor_of(request),
        )
        return _shown(issued)

    async def _revoke(self, request: web.Request) -> JsonObject:
        token_id = request.match_info["token_id"]
        ended_ms = await self._tokens.revoke(token_id, actor_of(request))
        return {"token_id": token_id, "revoked_at": format_time(ended_ms / 1000)}


def _shown(issued: Issued) -> JsonObject:
    return with_times(dataclasses.asdict(issued))


def _is_good(token: dict[str, Any], now_ms: int) -> bool:
    ends_ms = token["expires_at_ms"]
    return token["revoked_at_ms"] is None and (ends_ms is None or ends_ms > now_ms)
