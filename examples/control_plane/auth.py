"""Tokens: only digests are kept, and a comparison takes the same time whatever is compared."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from control_plane.answers import Bare

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


class Gate:
    """Recognises callers. `look_up` finds the machine of a token's digest in the store; what it found is remembered."""

    def __init__(self, admin_token: str, look_up: Callable[[str], Awaitable[str | None]]) -> None:
        self._admin_digest = digest_of(admin_token)
        self._look_up = look_up
        self._known: dict[str, str] = {}

    def check_admin(self, headers: Mapping[str, str]) -> None:
        """Raises Bare (401) unless the request carries the operator's token."""
        if not any(hmac.compare_digest(digest_of(token), self._admin_digest) for token in tokens_of(headers)):
            raise Bare(401, "the operator's token is missing or wrong")

    async def machine_of(self, headers: Mapping[str, str]) -> str:
        """The machine that the request's token was given to. Raises Bare (401)."""
        for token in dict.fromkeys(tokens_of(headers)):
            digest = digest_of(token)
            machine_id = self._known.get(digest) or await self._look_up(digest)
            if machine_id is not None:
                if len(self._known) < _KNOWN_MAX:
                    self._known[digest] = machine_id
                return machine_id
        raise Bare(401, "the agent's token is missing or wrong")

    def forget(self) -> None:
        """A machine got a new token: its old one must not be remembered."""
        self._known.clear()
