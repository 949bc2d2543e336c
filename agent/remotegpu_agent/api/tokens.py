"""The tokens of the API: one file, a token a line. Only digests stay in memory; no token is ever logged."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import hmac
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from remotegpu_schemas.errors import Misconfigured
from remotegpu_schemas.limits import TOKEN_ADVISED_MIN_CHARS, TOKENS_FILE_MAX_BYTES

DEFAULT_TOKEN_NAME: Final = "operator"

log: structlog.typing.FilteringBoundLogger = structlog.get_logger(__name__)


class Role(enum.StrEnum):
    """What a token may do: `read` may only GET."""

    READ = "read"
    OPERATE = "operate"


@dataclasses.dataclass(frozen=True)
class Token:
    """A token that is accepted, by the SHA-256 of its bytes."""

    name: str
    role: Role
    digest: bytes = dataclasses.field(repr=False)
    is_short: bool = False
    """So short that it could be guessed: who guesses is slowed down by nothing but the length of tokens."""


class TokenSet:
    """The accepted tokens."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self._tokens = tuple(tokens)

    def find(self, candidate: str) -> Token | None:
        """The token that equals `candidate`. The time does not depend on which one, nor on how much of it fits."""
        digest = digest_of(candidate)
        found: Token | None = None
        for token in self._tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found


def digest_of(token: str) -> bytes:
    """The digest by which a token is kept and compared; header bytes that are no UTF-8 arrive as surrogates."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def load_tokens(path: Path) -> TokenSet:
    """Read a tokens file: `name:role:token` a line, or a bare token for an operator; `#` starts a comment line.

    Raises Misconfigured with the line's number, never with its content.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(TOKENS_FILE_MAX_BYTES + 1)
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise Misconfigured(
            f"api.tokens_file: cannot read {path}: {error.strerror or error}; make it with `remotegpu-agent token new`"
        ) from error
    if len(raw) > TOKENS_FILE_MAX_BYTES:
        raise Misconfigured(
            f"api.tokens_file: {path} is larger than {TOKENS_FILE_MAX_BYTES} bytes; is it the right file?"
        )
    if mode & 0o077:
        log.warning("tokens_file_open_to_others", path=str(path), mode=f"{mode & 0o777:04o}", mend=f"chmod 600 {path}")
    lines = raw.decode("utf-8", "surrogateescape").splitlines()
    tokens = [
        _parse_line(path, number, line.strip())
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not tokens:
        raise Misconfigured(f"api.tokens_file: {path} has no token; write one a line, as name:role:token")
    short = sorted({token.name for token in tokens if token.is_short})
    if short:
        log.warning("tokens_short", path=str(path), names=short, mend="make longer ones by `remotegpu-agent token new`")
    return TokenSet(tokens)


def make_token_file(path: Path) -> None:
    """Write a file with one new operator token, 0600, unless there is one; whole or not at all."""
    if path.exists():
        return
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{DEFAULT_TOKEN_NAME}:{Role.OPERATE}:{secrets.token_urlsafe(32)}\n")
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise Misconfigured(
            f"agent.state_dir: cannot write {path}: {error.strerror or error}; let the agent write there"
        ) from error


def _parse_line(path: Path, number: int, line: str) -> Token:
    where = f"api.tokens_file: {path}, line {number}"
    if ":" not in line:
        return _token(DEFAULT_TOKEN_NAME, Role.OPERATE, line)
    parts = line.split(":", 2)
    if len(parts) != 3 or not parts[0] or not parts[2]:
        raise Misconfigured(f"{where}: not name:role:token, and not a bare token without a colon")
    try:
        role = Role(parts[1])
    except ValueError as error:
        raise Misconfigured(f"{where}: the role between the colons must be 'read' or 'operate'") from error
    return _token(parts[0], role, parts[2])


def _token(name: str, role: Role, text: str) -> Token:
    return Token(name, role, digest_of(text), is_short=len(text) < TOKEN_ADVISED_MIN_CHARS)
