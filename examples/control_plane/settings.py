"""What a control plane is started with, and its bounds. Durations are seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from remotegpu_schemas.errors import AgentError

WAIT_MAX_S: Final = 300.0
"""A long poll is held no longer, whatever it asks for."""
LEASE_MAX_S: Final = 86_400
BODY_MAX_BYTES: Final = 16 * 1024 * 1024
"""A completion has 128 KiB of output, in JSON at most six times that; a submission has TASKS_PER_CALL_MAX tasks."""
TASKS_PER_CALL_MAX: Final = 10_000
LIST_MAX: Final = 1000
REJECTION_EVENTS_MAX: Final = 100
"""Further rejected calls for one task are only counted."""
AUDIT_REFUSALS_PER_MINUTE: Final = 120
"""Refused calls of agents in the audit log; further ones are only counted, since anybody may be refused."""
AUDIT_PRUNE_EVERY: Final = 200
"""So many changes and refusals come between two looks at the audit log's bounds."""
TOKENS_PER_MACHINE_MAX: Final = 64
DEAD_TOKENS_KEPT_MS: Final = 7 * 86_400_000
"""So long an expired or revoked token stays in the list, for whoever asks what became of it."""
TOKEN_TTL_MAX_S: Final = 10 * 366 * 86_400
TOKEN_OVERLAP_DEFAULT_S: Final = 3600
TOKEN_OVERLAP_MAX_S: Final = 30 * 86_400
"""A fleet's tokens are rolled out within days; for longer two tokens are two, and not one that is being rotated."""
TOKEN_KNOWN_MS: Final = 5000
"""So long an instance believes a token without asking the store again."""
SELECTORS_MAX: Final = 10_000
"""Different sets of labels that tasks ask for: as many as there may be machines, if each had a label of its own."""
GROUP_TASKS_MAX: Final = 1000
"""The end of each of a group's tasks looks at all of them."""
GROUP_DEPENDENCIES_MAX: Final = 20_000
CIRCLE_SHOWN_MAX: Final = 50
"""So many tasks of a circle are named in a message."""
TEMPLATES_MAX: Final = 1000
TEMPLATE_VERSIONS_MAX: Final = 1000
TEMPLATE_VARIABLES_MAX: Final = 64
TEMPLATE_OPTIONS_MAX: Final = 256
TEMPLATE_VALUE_MAX_CHARS: Final = 8192
"""A value is one argument or one environment value; much longer ones belong into a file."""
UPLOADS_AT_ONCE_MAX: Final = 64
"""Each holds two megabytes at most, and a thread while it writes one."""
UPLOAD_STALL_S: Final = 60.0
"""An upload of which nothing comes for so long is given up."""
STOP_PATIENCE_S: Final = 1.0
POSTGRES_CONNECTIONS: Final = 8
"""Of each plane, and one to listen; more do not make two cores faster, and PostgreSQL takes 100 by default."""
POSTGRES_TIMEOUT_S: Final = 10.0
"""So long a plane waits for PostgreSQL: to connect, for a free connection, for a statement."""
POSTGRES_LOCK_TIMEOUT_S: Final = 5.0
POSTGRES_IDLE_TIMEOUT_S: Final = 10.0
"""A plane that was frozen inside of a transaction loses it, and with it the locks that others wait for."""
POSTGRES_TRIES_MAX: Final = 6
"""A unit that met a deadlock or somebody else's row is run so often."""
POSTGRES_RETRY_MAX_S: Final = 2.0
"""Tries to reach a PostgreSQL that is away are never further apart."""
FALLBACK_POLL_S: Final = 5.0
"""What the notice of another plane would have told is looked up so often, since notices can be lost."""
REAP_LOOK_AGAIN_S: Final = 3.0
"""A lease that another plane gave and did not live to end is late by no more."""
REAP_LATE_MS: Final = 200
"""Planes on several hosts know the database's time to within half a round trip; so much later a lease is over for
all of them. An agent stops at the end of its lease by its own clock."""
PRESENCE_GAP_MS: Final = 10_000
"""Where no plane was there for so long, leases are given a grace."""
PRESENCE_KEPT_MS: Final = 3_600_000


class CannotServe(AgentError):
    """The plane cannot start; the message says why and what to do."""


@dataclass(frozen=True)
class Settings:
    """One plane. The fields that begin with `compat_` matter in compatibility mode only."""

    database: Path | str = field(repr=False)
    """A file of SQLite, or `postgresql://...` for any number of planes; a URL may hold a password."""
    admin_token: str = field(repr=False)
    host: str = "127.0.0.1"
    port: int = 0
    """0 takes a free one; a plane that is started again from its own settings takes the same."""
    lease_ttl_s: float = 60.0
    """For tasks that do not name their own `lease_ttl_sec`."""
    attempts_max: int = 10
    """A task fails when so many of its attempts have lapsed."""
    restart_grace_s: float | None = None
    """At a start every lease holds at least so long, since nobody could renew it while the plane was down; None is
    `lease_ttl_s`."""
    accepts_late_results: bool = True
    """A result that comes after its lease counts as long as nobody else has claimed the task; false answers 30003."""
    audit_retention_s: float = 90 * 86_400.0
    audit_rows_max: int = 200_000
    """The oldest entries of the audit log go above this; some 60 MB."""
    uploads_dir: Path | None = None
    """Where agents' files go; None: the feature `upload-url` is not offered. Instances share it."""
    upload_max_bytes: int = 16 * 1024**3
    """One file: a large checkpoint."""
    uploads_per_attempt_max: int = 1000
    uploads_total_max_bytes: int = 1024**4
    """All files together, also those that were asked for and have not come."""
    upload_url_ttl_s: float = 3600.0
    """An upload must have begun by then."""
    public_url: str | None = None
    """Where agents reach the plane, without a path; None: as the asking agent did. For proxies that end TLS."""
    compat: bool = False
    """Answer as deployed planes do (protocol.md, "Deployed peers")."""
    compat_errors: Literal["status", "body"] = "status"
    """An error is an HTTP status, or HTTP 200 with the code in the body alone."""
    compat_repeats_held: bool = True
    """A claim's answer begins with the tasks that the agent already holds."""
    compat_hides_lease: bool = False
    """A claimed task comes without `lease_expires_at`."""
    now: Callable[[], float] | None = None
    """Seconds since 1970; whoever moves it by hand calls `Plane.clock_moved`. None is the clock of the database, which
    all planes on it share."""

    @property
    def now_ms(self) -> int:
        """The time in milliseconds."""
        return int((self.now or time.time)() * 1000)

    @property
    def lease_ttl_ms(self) -> int:
        """The default lease in milliseconds."""
        return int(self.lease_ttl_s * 1000)
