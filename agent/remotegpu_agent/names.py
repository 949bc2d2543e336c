"""Who this agent is: configured, or made at the first start and kept with the state."""

from __future__ import annotations

import socket
import sqlite3
import uuid
from dataclasses import dataclass
from typing import Final

from remotegpu_agent import host
from remotegpu_agent.config import AgentSection
from remotegpu_queue import units

_HOST_WORD_MAX_CHARS: Final = 40


@dataclass(frozen=True)
class Names:
    """Agent, machine, and this boot of the host."""

    agent_id: str
    machine_id: str
    boot_id: str


def name_agent(db: sqlite3.Connection, section: AgentSection, boot_id: str) -> Names:
    """The names; what is made up is stored. A unit of the store."""
    agent_id = section.id or units.meta(db, "agent_id", f"{_host_word()}-{uuid.uuid4().hex[:8]}")
    machine_id = section.machine_id or host.derived_machine_id()
    return Names(agent_id, machine_id or units.meta(db, "machine_id", host.random_machine_id()), boot_id)


def _host_word() -> str:
    word = "".join(char for char in socket.gethostname().lower() if char.isascii() and (char.isalnum() or char == "-"))
    return word.strip("-")[:_HOST_WORD_MAX_CHARS] or "agent"
