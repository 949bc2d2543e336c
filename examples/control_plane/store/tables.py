"""The tables. Times are milliseconds since 1970 on the plane's clock; JSON columns hold what came over the wire."""

from __future__ import annotations

import enum
from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

ID_CHARS: Final = 128
ANY_MACHINE: Final = ""
"""`tasks.machine_id` of a task that any machine may claim; not null, so that one index serves both kinds."""

metadata = MetaData()

Serial = BigInteger().with_variant(Integer(), "sqlite")  # only INTEGER is a rowid there


class Status(enum.StrEnum):
    """A task's status; the last three are final."""

    WAITING = "waiting"
    """For other tasks of its group; not to be claimed yet."""
    PENDING = "pending"
    ASSIGNED = "assigned"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Nothing changes it any more."""
        return self in {Status.COMPLETED, Status.FAILED, Status.CANCELLED}


class AttemptState(enum.StrEnum):
    """Where an attempt is; the first two hold a lease."""

    CLAIMED = "claimed"
    STARTED = "started"
    COMPLETED = "completed"
    LAPSED = "lapsed"
    """Its lease ended before a completion came."""
    GIVEN_UP = "given_up"
    """Its agent reported that it lost the lease."""
    RELEASED = "released"

    @property
    def is_open(self) -> bool:
        """It may still be completed under its lease."""
        return self in {AttemptState.CLAIMED, AttemptState.STARTED}


class EventKind(enum.StrEnum):
    """What a task's history tells."""

    CREATED = "created"
    READY = "ready"
    """What it waited for in its group was met."""
    CLAIMED = "claimed"
    STARTED = "started"
    COMPLETED = "completed"
    REPEATED = "repeated"
    """A completion that was already counted came again."""
    LAPSED = "lapsed"
    GIVEN_UP = "given_up"
    RELEASED = "released"
    CANCEL_REQUESTED = "cancel_requested"
    CANCELLED = "cancelled"
    FAILED = "failed"
    """By the plane itself: too many attempts lapsed."""
    SKIPPED = "skipped"
    """By the rules of its group."""
    REJECTED = "rejected"


machines = Table(
    "machines",
    metadata,
    Column("machine_id", String(ID_CHARS), primary_key=True),
    Column("name", Text, nullable=False),
    Column("token_sha256", String(64), nullable=False, unique=True),
    Column("created_at_ms", BigInteger, nullable=False),
)

agents = Table(
    "agents",
    metadata,
    Column("agent_id", String(ID_CHARS), primary_key=True),
    Column("machine_id", String(ID_CHARS), nullable=False, index=True),
    Column("registration", JSON, nullable=False),
    Column("registered_at_ms", BigInteger, nullable=False),
    Column("heartbeat", JSON),
    Column("heartbeat_at_ms", BigInteger),
)

tasks = Table(
    "tasks",
    metadata,
    Column("seq", Serial, primary_key=True),
    Column("id", String(ID_CHARS), nullable=False, unique=True),
    Column("name", Text, nullable=False),
    Column("spec", JSON, nullable=False),
    Column("machine_id", String(ID_CHARS), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("ended_at_ms", BigInteger),
    Column("attempt_id", String(ID_CHARS)),
    Column("agent_id", String(ID_CHARS)),
    Column("lease_expires_ms", BigInteger),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("lapses", Integer, nullable=False, default=0),
    Column("progress_percent", Float),
    Column("progress_message", Text),
    Column("completions_accepted", Integer, nullable=False, default=0),
    Column("completions_repeated", Integer, nullable=False, default=0),
    Column("completions_rejected", Integer, nullable=False, default=0),
    Column("rejections", Integer, nullable=False, default=0),
    Column("error", Text),
    Index("ix_tasks_claimable", "status", "machine_id", "priority", "seq"),
    Index("ix_tasks_lease", "lease_expires_ms"),
    Index("ix_tasks_held", "agent_id", "status"),
)
"""`attempt_id` and `agent_id` are the latest attempt's; `lease_expires_ms` is set only while it holds a lease."""

attempts = Table(
    "attempts",
    metadata,
    Column("attempt_id", String(ID_CHARS), primary_key=True),
    Column("task_id", String(ID_CHARS), ForeignKey("tasks.id"), nullable=False, index=True),
    Column("attempt_no", Integer, nullable=False),
    Column("machine_id", String(ID_CHARS), nullable=False),
    Column("agent_id", String(ID_CHARS), nullable=False),
    Column("request_id", String(ID_CHARS), nullable=False),
    Column("state", String(16), nullable=False),
    Column("claimed_at_ms", BigInteger, nullable=False),
    Column("lease_ttl_ms", BigInteger, nullable=False),
    Column("renewals", Integer, nullable=False, default=0),
    Column("started_at_ms", BigInteger),
    Column("process_id", BigInteger),
    Column("run_no", Integer),
    Column("gpu_uuids", JSON),
    Column("ended_at_ms", BigInteger),
    Column("result", JSON),
    Index("ix_attempts_request", "agent_id", "request_id"),
)

events = Table(
    "events",
    metadata,
    Column("seq", Serial, primary_key=True),
    Column("task_id", String(ID_CHARS), ForeignKey("tasks.id"), nullable=False, index=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("attempt_id", String(ID_CHARS)),
    Column("detail", Text, nullable=False, default=""),
)
