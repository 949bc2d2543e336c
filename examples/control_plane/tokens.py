"""Agents' tokens behind the API: makes the secrets, and recognises who shows one."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection

from control_plane.auth import Caller, digest_of, new_token
from control_plane.store import audit, machines, tokens
from control_plane.store.audit import Actor
from control_plane.store.outcomes import Refusal
from control_plane.store.tokens import NewToken
from control_plane.work import Work

_NOBODY_SHA256: Final = "0" * 64
"""What the secret of an unknown token is compared with, so that it takes as long as a known one's."""


@dataclass(frozen=True)
class Issued:
    """A new token; the only time that it is told. `expires_at_ms` None: it does not expire."""

    token_id: str
    token: str
    machine_id: str
    agent_id: str | None
    expires_at_ms: int | None


class Tokens:
    """The tokens of one open plane. `on_change`: what was remembered of tokens is void."""

    def __init__(self, work: Work, on_change: Callable[[], None]) -> None:
        self._work = work
        self._on_change = on_change

    async def caller_of(self, token: str) -> Caller | None:
        """Whom a token speaks for now."""
        token_id, dot, _ = token.partition(".")
        if not dot:
            machine_id = await self._work.run(lambda db: machines.machine_of_token(db, digest_of(token)))
            return None if machine_id is None else Caller(machine_id)
        if not token_id.isalnum() or not token_id.isascii():
            return None
        now_ms = self._work.now_ms
        known = await self._work.run(lambda db: tokens.good(db, token_id, now_ms))
        is_it = hmac.compare_digest(digest_of(token), _NOBODY_SHA256 if known is None else known.token_sha256)
        return Caller(known.machine_id, known.agent_id, known.expires_at_ms) if known is not None and is_it else None

    async def issue(
        self, machine_id: str, *, agent_id: str | None, name: str, expires_at_ms: int | None, by: Actor
    ) -> Issued:
        """A further token for a machine, or for one agent on it."""
        now_ms = self._work.now_ms
        token_id, token = self._make()
        new = NewToken(token_id, digest_of(token), machine_id, agent_id, name, expires_at_ms)

        def unit(db: Connection) -> Refusal | None:
            refusal = tokens.issue(db, new, now_ms)
            if refusal is None:
                audit.record(db, now_ms, by, "token.issue", token_id, f"machine {machine_id}")
            return refusal

        await self._work.ask(unit)
        return Issued(token_id, token, machine_id, agent_id, expires_at_ms)

    async def listed(self, machine_id: str) -> list[dict[str, Any]]:
        """A machine's tokens, without their secrets."""
        return await self._work.run(lambda db: tokens.listed(db, machine_id))

    async def rotate(self, old_id: str, *, expires_at_ms: int | None, overlap_ms: int, by: Actor) -> Issued:
        """A new token beside the old one, which is good for the overlap only."""
        now_ms = self._work.now_ms
        token_id, token = self._make()

        def unit(db: Connection) -> NewToken | Refusal:
            new = tokens.rotate(db, old_id, token_id, digest_of(token), expires_at_ms, overlap_ms, now_ms)
            if isinstance(new, NewToken):
                audit.record(db, now_ms, by, "token.rotate", old_id, f"machine {new.machine_id}, to {token_id}")
            return new

        new = await self._work.ask(unit)
        self._on_change()
        return Issued(token_id, token, new.machine_id, new.agent_id, expires_at_ms)

    async def revoke(self, token_id: str, by: Actor) -> int:
        """End a token at once; gives when it ended, in milliseconds."""
        now_ms = self._work.now_ms

        def unit(db: Connection) -> int | Refusal:
            ended_ms = tokens.revoke(db, token_id, now_ms)
            if not isinstance(ended_ms, Refusal):
                audit.record(db, now_ms, by, "token.revoke", token_id)
            return ended_ms

        ended_ms = await self._work.ask(unit)
        self._on_change()
        return ended_ms

    def _make(self) -> tuple[str, str]:
        token_id = self._work.new_id()
        return token_id, f"{token_id}.{new_token()}"
