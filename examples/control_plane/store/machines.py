"""Machines and the agents on them: enrolment, tokens, registrations, heartbeats."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, bindparam, delete, insert, select, update

from control_plane.store.tables import Status, agents, machines, tasks

_MACHINE_OF_TOKEN: Final = select(machines.c.machine_id).where(machines.c.token_sha256 == bindparam("b_digest"))
_HEARTBEAT: Final = (
    update(agents)
    .where(agents.c.agent_id == bindparam("b_agent"), agents.c.machine_id == bindparam("b_machine"))
    .values(heartbeat=bindparam("b_heartbeat", type_=agents.c.heartbeat.type), heartbeat_at_ms=bindparam("b_now"))
)
_TO_CANCEL: Final = select(tasks.c.id, tasks.c.attempt_id).where(
    tasks.c.agent_id == bindparam("b_agent"),
    tasks.c.status.in_([Status.ASSIGNED, Status.RUNNING]),
    tasks.c.cancel_requested,
)


def enrol(db: Connection, machine_id: str, name: str, token_sha256: str, now_ms: int) -> None:
    """Make the machine known under this token; one that is known gets the new token instead of its old one."""
    values = {"name": name, "token_sha256": token_sha256}
    changed = db.execute(update(machines).where(machines.c.machine_id == machine_id).values(values))
    if changed.rowcount == 0:
        db.execute(insert(machines).values({"machine_id": machine_id, "created_at_ms": now_ms} | values))


def machine_of_token(db: Connection, token_sha256: str) -> str | None:
    """The machine that this token was given to."""
    return db.execute(_MACHINE_OF_TOKEN, {"b_digest": token_sha256}).scalar()


def register(db: Connection, agent_id: str, machine_id: str, registration: dict[str, Any], now_ms: int) -> None:
    """Keep what the agent says about its host; the last registration counts."""
    db.execute(delete(agents).where(agents.c.agent_id == agent_id))
    db.execute(
        insert(agents).values(
            agent_id=agent_id, machine_id=machine_id, registration=registration, registered_at_ms=now_ms
        )
    )


def heartbeat(
    db: Connection, agent_id: str, machine_id: str, body: dict[str, Any], now_ms: int
) -> list[tuple[str, str]] | None:
    """Keep the heartbeat. Gives the (task, attempt) pairs that are to be cancelled; None if the agent is unknown."""
    names = {"b_agent": agent_id, "b_machine": machine_id}
    if db.execute(_HEARTBEAT, names | {"b_heartbeat": body, "b_now": now_ms}).rowcount == 0:
        return None
    return [(row.id, row.attempt_id) for row in db.execute(_TO_CANCEL, {"b_agent": agent_id})]


def list_machines(db: Connection) -> list[dict[str, Any]]:
    """Every machine with its agents, without tokens."""
    found: dict[str, dict[str, Any]] = {
        row["machine_id"]: {**row, "agents": []}
        for row in db.execute(
            select(machines.c.machine_id, machines.c.name, machines.c.created_at_ms).order_by(machines.c.machine_id)
        ).mappings()
    }
    for row in db.execute(select(agents).order_by(agents.c.agent_id)).mappings():
        found[row["machine_id"]]["agents"].append(dict(row))
    return list(found.values())
