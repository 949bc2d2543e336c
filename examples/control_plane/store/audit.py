"""The audit log: who did what when. An entry is written in the transaction of what it tells.

It goes by age, and by number. Entries hold names, ids and counts; never a token, nor anything of a task's environment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import BigInteger, Column, Connection, Index, String, Table, Text, delete, func, insert, select

from control_plane.store.tables import ID_CHARS, Serial, metadata
from remotegpu_schemas.wire import clean_text

ACTION_CHARS: Final = 32
SUBJECT_CHARS: Final = ID_CHARS
ACTOR_CHARS: Final = 2 * ID_CHARS + 16
"""`agent:` with an agent id and a machine id."""
_ADDRESS_CHARS: Final = 64
_DETAIL_CHARS: Final = 500

audit = Table(
    "audit",
    metadata,
    Column("seq", Serial, primary_key=True),
    Column("at_ms", BigInteger, nullable=False, index=True),
    Column("actor", String(ACTOR_CHARS), nullable=False),
    Column("address", String(_ADDRESS_CHARS)),
    Column("action", String(ACTION_CHARS), nullable=False),
    Column("subject", String(SUBJECT_CHARS), nullable=False),
    Column("detail", Text, nullable=False),
    Index("ix_audit_actor", "actor", "seq"),
    Index("ix_audit_action", "action", "seq"),
    Index("ix_audit_subject", "subject", "seq"),
)


@dataclass(frozen=True)
class Actor:
    """Who asked, and from where (None: from inside the plane's own process)."""

    name: str
    address: str | None = None


IN_PROCESS: Final = Actor("in-process")


@dataclass(frozen=True)
class Filter:
    """Which entries are wanted; None is any. Times are milliseconds, `since` included, `until` not."""

    actor: str | None = None
    action: str | None = None
    subject: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None


def record(db: Connection, now_ms: int, by: Actor, action: str, subject: str, detail: str = "") -> None:
    """Write one entry; what is too long is cut, and what no database can hold is replaced."""
    db.execute(
        insert(audit),
        {
            "at_ms": now_ms,
            "actor": clean_text(by.name)[:ACTOR_CHARS],
            "address": None if by.address is None else by.address[:_ADDRESS_CHARS],
            "action": action,
            "subject": clean_text(subject)[:SUBJECT_CHARS],
            "detail": clean_text(detail)[:_DETAIL_CHARS],
        },
    )


def page(db: Connection, wanted: Filter, before_seq: int | None, limit: int) -> list[dict[str, Any]]:
    """The newest entries first; with `before_seq` those that are older than that one."""
    conditions = [
        column == value
        for column, value in (
            (audit.c.actor, wanted.actor),
            (audit.c.action, wanted.action),
            (audit.c.subject, wanted.subject),
        )
        if value is not None
    ]
    if wanted.since_ms is not None:
        conditions.append(audit.c.at_ms >= wanted.since_ms)
    if wanted.until_ms is not None:
        conditions.append(audit.c.at_ms < wanted.until_ms)
    if before_seq is not None:
        conditions.append(audit.c.seq < before_seq)
    found = select(audit).where(*conditions).order_by(audit.c.seq.desc()).limit(limit)
    return [dict(row) for row in db.execute(found).mappings()]


def prune(db: Connection, older_than_ms: int, rows_max: int) -> int:
    """Remove what is older, and the oldest above `rows_max`; gives how many went.

    The number is counted by `seq`, which may have gaps: never more than `rows_max` stay.
    """
    newest: int = db.execute(select(func.max(audit.c.seq))).scalar() or 0
    gone = delete(audit).where((audit.c.at_ms < older_than_ms) | (audit.c.seq <= newest - rows_max))
    return db.execute(gone).rowcount
