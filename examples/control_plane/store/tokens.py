"""Tokens that agents got beside the one of their machine's enrolment: issued, listed, rotated, revoked.

Only digests are kept. A token is looked up by its id, which is no secret, so that the comparison of the secret is
the caller's, in constant time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    ForeignKey,
    String,
    Table,
    Text,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from control_plane.settings import DEAD_TOKENS_KEPT_MS, TOKENS_PER_MACHINE_MAX
from control_plane.store.outcomes import Refusal
from control_plane.store.tables import ID_CHARS, machines, metadata
from remotegpu_schemas.errors import Code

agent_tokens = Table(
    "agent_tokens",
    metadata,
    Column("token_id", String(ID_CHARS), primary_key=True),
    Column("machine_id", String(ID_CHARS), ForeignKey("machines.machine_id"), nullable=False, index=True),
    Column("agent_id", String(ID_CHARS)),
    Column("name", Text, nullable=False),
    Column("token_sha256", String(64), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger),
    Column("revoked_at_ms", BigInteger),
    Column("replaced_by", String(ID_CHARS)),
)
"""`agent_id` null: any agent of the machine. `expires_at_ms` null: until it is revoked."""


@dataclass(frozen=True)
class NewToken:
    """A token to be kept; its secret is known to the caller only."""

    token_id: str
    token_sha256: str
    machine_id: str
    agent_id: str | None
    name: str
    expires_at_ms: int | None


@dataclass(frozen=True)
class Known:
    """A token as it is kept."""

    token_sha256: str
    machine_id: str
    agent_id: str | None
    expires_at_ms: int | None


_GOOD: Final = select(
    agent_tokens.c.token_sha256, agent_tokens.c.machine_id, agent_tokens.c.agent_id, agent_tokens.c.expires_at_ms
).where(agent_tokens.c.token_id == bindparam("b_id"), agent_tokens.c.revoked_at_ms.is_(None))
_SHOWN: Final = tuple(column for column in agent_tokens.c if column.name != "token_sha256")


def good(db: Connection, token_id: str, now_ms: int) -> Known | None:
    """The token of this id, unless it has expired or was revoked."""
    row = db.execute(_GOOD, {"b_id": token_id}).mappings().one_or_none()
    if row is None or (row["expires_at_ms"] is not None and row["expires_at_ms"] <= now_ms):
        return None
    return Known(**row)


def issue(db: Connection, new: NewToken, now_ms: int) -> Refusal | None:
    """Keep a new token. Of the machine's dead ones those go that are dead for DEAD_TOKENS_KEPT_MS."""
    machine = select(machines.c.machine_id).where(machines.c.machine_id == new.machine_id).with_for_update()
    if db.execute(machine).scalar() is None:
        return Refusal(Code.INVALID_PARAMETERS, f"machine_id: there is no machine {new.machine_id}; enrol it first")
    own = agent_tokens.c.machine_id == new.machine_id
    db.execute(delete(agent_tokens).where(own, _is_dead(now_ms - DEAD_TOKENS_KEPT_MS)))
    kept: int = db.execute(select(func.count()).select_from(agent_tokens).where(own)).scalar_one()
    if kept >= TOKENS_PER_MACHINE_MAX:
        return Refusal(
            Code.STATE_CONFLICT,
            f"machine {new.machine_id} has {kept} tokens, dead ones of the last days included; more are not kept",
        )
    db.execute(
        insert(agent_tokens),
        {
            "token_id": new.token_id,
            "machine_id": new.machine_id,
            "agent_id": new.agent_id,
            "name": new.name,
            "token_sha256": new.token_sha256,
            "created_at_ms": now_ms,
            "expires_at_ms": new.expires_at_ms,
        },
    )
    return None


def listed(db: Connection, machine_id: str) -> list[dict[str, Any]]:
    """The machine's tokens without secret and digest, oldest first."""
    found = select(*_SHOWN).where(agent_tokens.c.machine_id == machine_id)
    order = (agent_tokens.c.created_at_ms, agent_tokens.c.token_id)
    return [dict(row) for row in db.execute(found.order_by(*order)).mappings()]


def rotate(
    db: Connection, old_id: str, new_id: str, digest: str, expires_at_ms: int | None, overlap_ms: int, now_ms: int
) -> NewToken | Refusal:
    """Put a new token beside an old one, for the same machine and agent; the old one is good for `overlap_ms` more.

    It never becomes good for longer than it was. A token is rotated once: a second time would leave the first
    successor without anybody who knows of it.
    """
    found = db.execute(select(agent_tokens).where(agent_tokens.c.token_id == old_id).with_for_update()).mappings()
    old = found.one_or_none()
    if old is None:
        return _unknown(old_id)
    if old["revoked_at_ms"] is not None or (old["expires_at_ms"] is not None and old["expires_at_ms"] <= now_ms):
        return Refusal(Code.STATE_CONFLICT, f"token {old_id} is expired or revoked; issue a new one instead")
    if old["replaced_by"] is not None:
        return Refusal(Code.STATE_CONFLICT, f"token {old_id} was rotated already, to {old['replaced_by']}")
    new = NewToken(new_id, digest, old["machine_id"], old["agent_id"], old["name"], expires_at_ms)
    refusal = issue(db, new, now_ms)
    if refusal is not None:
        return refusal
    ends_ms = now_ms + overlap_ms
    if old["expires_at_ms"] is not None:
        ends_ms = min(ends_ms, old["expires_at_ms"])
    values = {"expires_at_ms": ends_ms, "replaced_by": new_id}
    db.execute(update(agent_tokens).where(agent_tokens.c.token_id == old_id).values(values))
    return new


def revoke(db: Connection, token_id: str, now_ms: int) -> int | Refusal:
    """End a token now; gives the time of its end in milliseconds. Twice is the same as once."""
    found = select(agent_tokens.c.revoked_at_ms, agent_tokens.c.token_id).where(agent_tokens.c.token_id == token_id)
    row = db.execute(found.with_for_update()).one_or_none()
    if row is None:
        return _unknown(token_id)
    if row.revoked_at_ms is not None:
        return int(row.revoked_at_ms)
    db.execute(update(agent_tokens).where(agent_tokens.c.token_id == token_id).values(revoked_at_ms=now_ms))
    return now_ms


def _is_dead(at_ms: int) -> ColumnElement[bool]:
    return or_(
        and_(agent_tokens.c.revoked_at_ms.is_not(None), agent_tokens.c.revoked_at_ms <= at_ms),
        and_(agent_tokens.c.expires_at_ms.is_not(None), agent_tokens.c.expires_at_ms <= at_ms),
    )


def _unknown(token_id: str) -> Refusal:
    return Refusal(Code.INVALID_PARAMETERS, f"token_id: there is no token {token_id}")
