"""Tokens: only digests are kept, and a comparison takes the same time whatever is compared.

A machine's token of its enrolment is a secret alone; one that was issued is `<token id>.<secret>`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from control_plane.answers import Bare
from control_plane.settings import TOKEN_KNOWN_MS

_KNOWN_MAX: Final = 10_000


def digest_of(token: str) -> str:
    """The digest by which a token is kept; header bytes that are no UTF-8 arrive as surrogates."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


def new_token() -> str:
    """A token for a machine."""
    return secrets.token_urlsafe(32)


def tokens_of(headers: Mapping[str, str]) -> list[str]:
    """The tokens that a request carries, in both of its places."""
    scheme, _, bearer = headers.get("Authorization", "").partition(" ")
    found = [headers.get("X-Agent-Token", "").strip(), bearer.strip() if scheme.lower() == "bearer" else ""]
    return [token for token in found if token]


@dataclass(frozen=True)
class Caller:
    """Whom a token speaks for: a machine, and one agent on it or any (None). `expires_at_ms` None: it does not."""

    machine_id: str
    agent_id: str | None = None
    expires_at_ms: int | None = None

    def check_agent(self, agent_id: object) -> None:
        """Raises Bare (403) if the token was issued to another agent."""
        if self.agent_id is not None and agent_id != self.agent_id:
            raise Bare(403, f"this token was issued to agent {self.agent_id} of machine {self.machine_id}")


class Gate:
    """Recognises callers. `look_up` finds whom a token speaks for in the store.

    What it found is remembered for TOKEN_KNOWN_MS: so long a token may stay good that another instance revoked.
    """

    def __init__(
        self, admin_token: str, look_up: Callable[[str], Awaitable[Caller | None]], now_ms: Callable[[], int]
    ) -> None:
        self._admin_digest = digest_of(admin_token)
        self._look_up = look_up
        self._now_ms = now_ms
        self._known: dict[str, tuple[Caller, int]] = {}
        self._generation = 0

    def check_admin(self, headers: Mapping[str, str]) -> None:
        """Raises Bare (401) unless the request carries the operator's token."""
        if not any(hmac.compare_digest(digest_of(token), self._admin_digest) for token in tokens_of(headers)):
            raise Bare(401, "the operator's token is missing or wrong")

    async def caller_of(self, headers: Mapping[str, str]) -> Caller:
        """Whom the request's token speaks for. Raises Bare (401)."""
        for token in dict.fromkeys(tokens_of(headers)):
            digest = digest_of(token)
            caller = self._remembered(digest) or await self._find(token, digest)
            if caller is not None:
                return caller
        raise Bare(401, "the agent's token is missing, wrong, expired or revoked")

    def forget(self) -> None:
        """Tokens were replaced or revoked: nothing that was found before may be remembered."""
        self._known.clear()
        self._generation += 1

    def _remembered(self, digest: str) -> Caller | None:
        caller, found_ms = self._known.get(digest, (None, 0))
        now_ms = self._now_ms()
        if caller is None or not 0 <= now_ms - found_ms < TOKEN_KNOWN_MS:
            return None
        return None if caller.expires_at_ms is not None and caller.expires_at_ms <= now_ms else caller

    async def _find(self, token: str, digest: str) -> Caller | None:
        generation, found_ms = self._generation, self._now_ms()
        caller = await self._look_up(token)
        if caller is not None and generation == self._generation:
            if len(self._known) >= _KNOWN_MAX and digest not in self._known:
                self._known.clear()
            self._known[digest] = (caller, found_ms)
        return caller
