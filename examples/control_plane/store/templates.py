"""Stored templates. A version never changes: storing a name again makes the next one."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Integer,
    String,
    Table,
    and_,
    bindparam,
    delete,
    func,
    insert,
    select,
)
from sqlalchemy.exc import IntegrityError

from control_plane.settings import TEMPLATE_VERSIONS_MAX, TEMPLATES_MAX
from control_plane.store.outcomes import Refusal
from control_plane.store.tables import ID_CHARS, metadata
from remotegpu_schemas.errors import Code

templates = Table(
    "templates",
    metadata,
    Column("name", String(ID_CHARS), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("body", JSON, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
)

_VERSIONS: Final = select(func.max(templates.c.version), func.count()).where(templates.c.name == bindparam("b_name"))
_NEWEST: Final = (
    select(templates.c.name, func.max(templates.c.version).label("version")).group_by(templates.c.name).subquery()
)


def add(db: Connection, name: str, body: dict[str, Any], now_ms: int) -> int | Refusal:
    """Store the next version of this name; gives its number, from 1."""
    newest, versions = db.execute(_VERSIONS, {"b_name": name}).one()
    if newest is None:
        names: int = db.execute(select(func.count()).select_from(_NEWEST)).scalar_one()
        if names >= TEMPLATES_MAX:
            return _conflict(f"there are {names} templates; delete one before you store another")
    if versions >= TEMPLATE_VERSIONS_MAX:
        return _conflict(f"template {name} has {versions} versions; delete it, or choose another name")
    version = (newest or 0) + 1
    try:
        with db.begin_nested():
            db.execute(insert(templates), {"name": name, "version": version, "body": body, "created_at_ms": now_ms})
    except IntegrityError:
        return _conflict(f"somebody else stored version {version} of template {name} just now; look, and store again")
    return version


def get(db: Connection, name: str, version: int | None) -> dict[str, Any] | Refusal:
    """One version, the newest if none is named."""
    found = select(templates).where(templates.c.name == name).order_by(templates.c.version.desc()).limit(1)
    if version is not None:
        found = found.where(templates.c.version == version)
    row = db.execute(found).mappings().one_or_none()
    if row is None:
        which = name if version is None else f"{name} with version {version}"
        return Refusal(Code.TASK_NOT_FOUND, f"there is no template {which}")
    return dict(row)


def listed(db: Connection, limit: int, offset: int) -> tuple[int, list[dict[str, Any]]]:
    """How many names there are, and a page of them in alphabetical order, each with its newest version."""
    total: int = db.execute(select(func.count()).select_from(_NEWEST)).scalar_one()
    page = (
        select(templates)
        .join_from(
            templates,
            _NEWEST,
            and_(_NEWEST.c.name == templates.c.name, _NEWEST.c.version == templates.c.version),
        )
        .order_by(templates.c.name)
        .limit(limit)
        .offset(offset)
    )
    return total, [dict(row) for row in db.execute(page).mappings()]


def versions_of(db: Connection, name: str) -> list[int]:
    """The numbers of its versions, oldest first; none if there is no such template."""
    found = select(templates.c.version).where(templates.c.name == name).order_by(templates.c.version)
    return list(db.execute(found).scalars())


def remove(db: Connection, name: str) -> int:
    """Remove all versions; gives how many there were. Tasks that were made from them are not touched."""
    return db.execute(delete(templates).where(templates.c.name == name)).rowcount


def _conflict(message: str) -> Refusal:
    return Refusal(Code.STATE_CONFLICT, message)
