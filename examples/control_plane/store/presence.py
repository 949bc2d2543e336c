"""Which planes look after the leases in a shared database, so that an outage of all of them costs no lease.

Every plane writes now and then that it is there. Where nobody did for a while nobody could renew a lease either,
whether the planes were gone or the database was.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, Column, Connection, String, Table, bindparam, delete, func, insert, select, update

from control_plane.settings import PRESENCE_GAP_MS, PRESENCE_KEPT_MS
from control_plane.store.tables import ID_CHARS, metadata

planes = Table(
    "planes",
    metadata,
    Column("plane_id", String(ID_CHARS), primary_key=True),
    Column("seen_at_ms", BigInteger, nullable=False),
)

_LAST_SEEN: Final = select(func.max(planes.c.seen_at_ms))
_SEEN: Final = update(planes).where(planes.c.plane_id == bindparam("b_plane")).values(seen_at_ms=bindparam("b_at"))
_FORGET: Final = delete(planes).where(planes.c.seen_at_ms < bindparam("b_before"))
_LEAVE: Final = delete(planes).where(planes.c.plane_id == bindparam("b_plane"))


def attend(db: Connection, plane_id: str, at_ms: int) -> bool:
    """This plane is there; false if until now nobody was, for PRESENCE_GAP_MS. `at_ms` is the database's time.

    Needs no lock: of two planes that both come back first, both find nobody.
    """
    last_ms: int | None = db.execute(_LAST_SEEN).scalar()
    if db.execute(_SEEN, {"b_plane": plane_id, "b_at": at_ms}).rowcount == 0:
        db.execute(_FORGET, {"b_before": at_ms - PRESENCE_KEPT_MS})
        db.execute(insert(planes), {"plane_id": plane_id, "seen_at_ms": at_ms})
    return last_ms is not None and at_ms - last_ms < PRESENCE_GAP_MS


def leave(db: Connection, plane_id: str) -> None:
    """This plane ends in good order."""
    db.execute(_LEAVE, {"b_plane": plane_id})
