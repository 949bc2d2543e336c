"""What an operator and the daemon set about the API, and where it listens in the end."""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
from pathlib import Path
from typing import Final, TypeAlias

from remotegpu_agent.api.credentials import TlsPair
from remotegpu_agent.api.places import Bounds
from remotegpu_schemas import limits

IpAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

BASE_PATH: Final = "/api/v1"

SOCKET_GROUP: Final = "remotegpu"
"""Members of this group may use the Unix socket."""

BODY_DEADLINE_S: Final = 10.0
"""A whole body arrives within this time: 4 MiB at 3.4 Mbit/s."""

KEEP_ALIVE_S: Final = 15.0
"""A silent event stream sends a comment this often, so that proxies keep it and dead clients are found."""

SLOW_READER_S: Final = 30.0
"""A client that takes next to nothing of what waits for it for this long loses its connection: its place is wanted."""

HEADERS_DEADLINE_S: Final = 10.0
"""The headers of a request arrive within this time of their first byte, and the first byte, or a TLS handshake, within
this time of the connection."""

IDLE_S: Final = 75.0
"""An idle connection is kept for another request for so long; clients' pools give theirs up before that as a rule."""

TCP_BOUNDS: Final = Bounds(limits.API_TCP_CONNECTIONS_MAX, limits.API_TCP_CONNECTIONS_PER_PEER_MAX)
UNIX_BOUNDS: Final = Bounds(limits.API_UNIX_CONNECTIONS_MAX, limits.API_UNIX_CONNECTIONS_PER_USER_MAX)

LOOK_AT_FILES_S: Final = 5.0
"""A token that was taken out of its file is refused at most this much later, and the time to read it."""

STOP_PATIENCE_S: Final = 1.0
"""How long requests that are being answered may take when the server stops."""


STOP_ANSWER_SLACK_S: Final = 1.0
"""`Operations.stop_process` answers within 8 s; this much later the API answers for it. Callers wait for 10 s."""


class LegacyCall(enum.StrEnum):
    """The calls that `legacy_callers` may open to callers without a token."""

    SYSTEM_INFO = "system_info"
    PROCESS_STOP = "process_stop"


@dataclasses.dataclass(frozen=True)
class LegacyCaller:
    """Callers in `network` may make the calls in `allow` without a token; each use is audited."""

    network: IpNetwork
    allow: frozenset[LegacyCall]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ApiSettings:
    """The `api` section of the config, with what the server needs to know beside it. Durations are seconds."""

    state_dir: Path
    machine_id: str
    listen: str | None = "127.0.0.1:8090"
    """`ADDRESS:PORT`, port 0 for a free one; None switches TCP off."""
    socket: Path | None = None
    """None switches the Unix socket off."""
    socket_group: str = SOCKET_GROUP
    tokens_file: Path | None = None
    """None means `<state_dir>/api-token`, made at the first start."""
    tls: TlsPair | None = None
    """None is HTTP without TLS; the Unix socket never has it."""
    allowed_hosts: tuple[str, ...] = ()
    legacy_callers: tuple[LegacyCaller, ...] = ()
    body_max_bytes: int = limits.API_BODY_MAX_BYTES
    body_deadline_s: float = BODY_DEADLINE_S
    headers_deadline_s: float = HEADERS_DEADLINE_S
    idle_s: float = IDLE_S
    look_at_files_s: float = LOOK_AT_FILES_S
    tcp_bounds: Bounds = TCP_BOUNDS
    unix_bounds: Bounds = UNIX_BOUNDS
    auth_failures_burst: int = limits.API_AUTH_FAILURES_BURST
    followers_max: int = limits.API_FOLLOWERS_MAX
    keep_alive_s: float = KEEP_ALIVE_S
    slow_reader_s: float = SLOW_READER_S
    stop_answer_s: float = limits.API_STOP_ANSWER_S + STOP_ANSWER_SLACK_S


@dataclasses.dataclass(frozen=True)
class Endpoints:
    """Where the server really listens; `url` has the port that was given out."""

    url: str | None
    socket: Path | None
