"""The kinds of values in the config, each with the sentence that refuses what does not fit. Knows no key."""

from __future__ import annotations

import ipaddress
import re
import urllib.parse
from pathlib import Path
from typing import Annotated, Final, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from remotegpu_schemas import limits
from remotegpu_schemas import problems as report
from remotegpu_schemas.forms import Text, no_nul, scalar_text
from remotegpu_schemas.quantities import Duration
from remotegpu_schemas.task import EnvironmentName

IpNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
SUBMITTER: Final = "submitter"
"""In `tasks.run_as`: each task as the user who submitted it. No user of that name can be named there."""
_UNIX_PATH_MAX_BYTES: Final = 107
"""sun_path of unix(7), without its final NUL."""
_CPUS_MAX: Final = 8192
"""The most that Linux can be built for (NR_CPUS)."""


def _absolute_path(value: object) -> object:
    if isinstance(value, str):
        no_nul(value)
        if not value.startswith("/"):
            raise ValueError(f"must be an absolute path, beginning with '/', not {value[:60]!r}")
        return Path(value)
    if isinstance(value, Path) or value is None:
        return value
    raise ValueError("must be an absolute path, beginning with '/'")


def _socket_path(value: Path | None) -> Path | None:
    if value is not None and len(str(value).encode()) > _UNIX_PATH_MAX_BYTES:
        raise ValueError(f"is longer than {_UNIX_PATH_MAX_BYTES} bytes, the bound of Linux for a socket's path")
    return value


def _url(value: str) -> str:
    how = "write for example https://plane.example:8443"
    try:
        parts = urllib.parse.urlsplit(value)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"is not a URL ({error}); {how}") from None
    if parts.scheme not in {"http", "https"} or not parts.hostname or re.search(r"[\s\x00-\x1f]", value):
        raise ValueError(f"must be a URL with http or https and a host; {how}")
    if port == 0:
        raise ValueError(f"has the port 0, which nobody listens on; {how}")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user or a password; the token belongs into the file control_plane.token_file")
    if parts.path.rstrip("/").endswith("/api/v1/agent"):
        raise ValueError("must end before /api/v1/agent, which the agent adds itself")
    if parts.query or parts.fragment:
        raise ValueError(f"must not have a '?' or '#' part; {how}")
    return value.rstrip("/")


def _listen(value: str | None) -> str | None:
    if value is None:
        return None
    split_listen(value)
    return value


def split_listen(value: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    """Address and port of `127.0.0.1:8090` or `[::1]:0`; `localhost` is 127.0.0.1. Raises ValueError."""
    how = "write for example 127.0.0.1:8090 or [::1]:8090, or null to switch TCP off"
    host, _, port = value.rpartition(":")
    if not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) or int(port) > 65535:
        raise ValueError(f"must be ADDRESS:PORT with a port from 0 to 65535; {how}")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if ":" in bare and bare == host:
        raise ValueError(f"must have an IPv6 address in brackets; {how}")
    try:
        return ipaddress.ip_address("127.0.0.1" if bare == "localhost" else bare), int(port)
    except ValueError:
        raise ValueError(f"must be ADDRESS:PORT with an IP address of this host; {how}") from None


def _network(value: object) -> object:
    try:
        return ipaddress.ip_network(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"must be a network such as 10.0.0.0/8: {error}") from None


def _auto_count(value: object) -> object:
    if value is None or value == "auto":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        if 1 <= value <= 4096:
            return value
        raise ValueError("must be from 1 to 4096, or auto")
    raise ValueError(f"must be auto or a whole number, not {report.shown(value)}")


def _auto_amount(value: object) -> object:
    if value is None or value == "auto":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if 0 < value <= 65536:
            return float(value)
        raise ValueError("must be more than 0 and at most 65536, or auto")
    raise ValueError(f"must be auto or a number, not {report.shown(value)}")


def _user(value: str | None) -> str | None:
    return None if value is None else _account(value, "a user")


def _group(value: str) -> str:
    return _account(value, "a group")


def _account(value: str, what: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?", value, re.ASCII):
        raise ValueError(f"must be the name of {what}")
    return value


def _cpu_list(value: str | None) -> str | None:
    if value is None:
        return None
    how = "must be a list of CPUs such as 0-3,8"
    for part in value.split(","):
        first, dash, last = part.partition("-")
        if not all(re.fullmatch(r"[0-9]{1,4}", number, re.ASCII) for number in ([first, last] if dash else [first])):
            raise ValueError(f"{how}, not {value[:60]!r}")
        if dash and int(first) > int(last):
            raise ValueError(f"{how}: {part} ends before it begins")
        if int(last or first) >= _CPUS_MAX:
            raise ValueError(f"{how}, with numbers below {_CPUS_MAX}, not {part}")
    return value


def _positive(value: float) -> float:
    if value <= 0:
        raise ValueError("must be more than 0")
    return value


def _identifier(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(limits.ID_PATTERN, value):
        raise ValueError(
            f"must begin with a letter or digit and have only letters, digits and . _ : - (at most "
            f"{limits.ID_MAX_CHARS} characters)"
        )
    return value


Id = Annotated[str | None, BeforeValidator(scalar_text), AfterValidator(_identifier)]
AbsolutePath = Annotated[Path, BeforeValidator(_absolute_path)]
SocketPath = Annotated[Path | None, BeforeValidator(_absolute_path), AfterValidator(_socket_path)]
Url = Annotated[str, AfterValidator(_url)]
Listen = Annotated[str | None, AfterValidator(_listen)]
Network = Annotated[IpNetwork, BeforeValidator(_network)]
UserName = Annotated[str | None, AfterValidator(_user)]
GroupName = Annotated[str, AfterValidator(_group)]
AutoCount = Annotated[int | None, BeforeValidator(_auto_count)]
"""A whole number, or None for `auto`."""
AutoAmount = Annotated[float | None, BeforeValidator(_auto_amount)]
"""A number above zero, or None for `auto`."""
CpuList = Annotated[str | None, BeforeValidator(scalar_text), AfterValidator(_cpu_list)]
"""Numbers and ranges of CPUs (the list format of cpuset(7))."""
Span = Annotated[Duration, AfterValidator(_positive)]
"""A duration that cannot be nothing."""
Environment = Annotated[dict[EnvironmentName, Text], Field(max_length=limits.ENVIRONMENT_MAX_COUNT)]
