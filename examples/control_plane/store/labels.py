"""Labels of machines, and sets of labels that tasks ask for: which machines a set matches, and which sets a machine.

A task for any machine with some labels has a selector's id in `tasks.machine_id`, so that claims find it by the same
index as a task for one machine. A selector's id begins with a character that no machine's can begin with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Index,
    Integer,
    String,
    Table,
    and_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
)
from sqlalchemy.exc import IntegrityError

from control_plane.settings import SELECTORS_MAX
from control_plane.store.outcomes import Refusal
from control_plane.store.tables import ID_CHARS, Status, machines, metadata, tasks
from remotegpu_schemas import limits
from remotegpu_schemas.errors import Code

_SELECTOR_MARK: Final = "?"

machine_labels = Table(
    "machine_labels",
    metadata,
    Column("machine_id", String(ID_CHARS), primary_key=True),
    Column("name", String(limits.LABEL_MAX_CHARS), primary_key=True),
    Column("value", String(limits.LABEL_MAX_CHARS), nullable=False),
    Index("ix_machine_labels_label", "name", "value"),
)

selectors = Table(
    "selectors",
    metadata,
    Column("selector_id", String(ID_CHARS), primary_key=True),
    Column("labels", JSON, nullable=False),
    Column("size", Integer, nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
)

selector_labels = Table(
    "selector_labels",
    metadata,
    Column("selector_id", String(ID_CHARS), primary_key=True),
    Column("name", String(limits.LABEL_MAX_CHARS), primary_key=True),
    Column("value", String(limits.LABEL_MAX_CHARS), nullable=False),
    Index("ix_selector_labels_label", "name", "value"),
)

_FOR_MACHINE: Final = (
    select(selectors.c.selector_id)
    .join_from(selectors, selector_labels, selector_labels.c.selector_id == selectors.c.selector_id)
    .join(
        machine_labels,
        and_(machine_labels.c.name == selector_labels.c.name, machine_labels.c.value == selector_labels.c.value),
    )
    .where(
        machine_labels.c.machine_id == bindparam("b_machine"),
        exists().where(tasks.c.status == Status.PENDING, tasks.c.machine_id == selectors.c.selector_id),
    )
    .group_by(selectors.c.selector_id, selectors.c.size)
    .having(func.count() == selectors.c.size)
)


def keep(db: Connection, machine_id: str, labels: Mapping[str, str]) -> None:
    """A machine's labels are those of the last registration on it."""
    locked = select(machines.c.machine_id).where(machines.c.machine_id == machine_id).with_for_update()
    db.execute(locked).scalar()  # two registrations at once would both insert
    db.execute(delete(machine_labels).where(machine_labels.c.machine_id == machine_id))
    if labels:
        rows = [{"machine_id": machine_id, "name": name, "value": value} for name, value in labels.items()]
        db.execute(insert(machine_labels), rows)


def of_machines(db: Connection) -> dict[str, dict[str, str]]:
    """Every machine's labels; machines without any are left out."""
    found: dict[str, dict[str, str]] = {}
    for row in db.execute(select(machine_labels).order_by(machine_labels.c.machine_id, machine_labels.c.name)):
        found.setdefault(row.machine_id, {})[row.name] = row.value
    return found


def matching(db: Connection, labels: Mapping[str, str]) -> list[str]:
    """The machines that have all of these labels, in the order of their ids; without labels all that are enrolled."""
    found = select(machines.c.machine_id)
    if labels:
        one_of = [
            and_(machine_labels.c.name == name, machine_labels.c.value == value) for name, value in labels.items()
        ]
        found = (
            found.join_from(machines, machine_labels, machine_labels.c.machine_id == machines.c.machine_id)
            .where(or_(*one_of))
            .group_by(machines.c.machine_id)
            .having(func.count() == len(labels))
        )
    return list(db.execute(found.order_by(machines.c.machine_id)).scalars())


def selector(db: Connection, labels: Mapping[str, str], now_ms: int) -> str | Refusal:
    """The id of the set, made when it is asked for the first time. Sets stay, and there are SELECTORS_MAX at most."""
    text = json.dumps(labels, sort_keys=True)
    selector_id = _SELECTOR_MARK + hashlib.sha256(text.encode()).hexdigest()
    known = select(selectors.c.selector_id).where(selectors.c.selector_id == selector_id)
    if db.execute(known).scalar() is not None:
        return selector_id
    if db.execute(select(func.count()).select_from(selectors)).scalar_one() >= SELECTORS_MAX:
        return Refusal(
            Code.STATE_CONFLICT,
            f"to.labels: tasks have asked for {SELECTORS_MAX} different sets of labels; use one of those",
        )
    row = {"selector_id": selector_id, "labels": dict(labels), "size": len(labels), "created_at_ms": now_ms}
    try:
        with db.begin_nested():
            db.execute(insert(selectors), row)
            rows = [{"selector_id": selector_id, "name": name, "value": value} for name, value in labels.items()]
            db.execute(insert(selector_labels), rows)
    except IntegrityError:
        pass  # another instance was first: the set is there
    return selector_id


def selectors_for(db: Connection, machine_id: str) -> list[str]:
    """The sets that the machine matches and that some claimable task asks for."""
    return list(db.execute(_FOR_MACHINE, {"b_machine": machine_id}).scalars())
