"""Which proxy the environment names for a URL: HTTPS_PROXY, HTTP_PROXY and NO_PROXY, in either case. Pure.

A proxy's user and password are told to the proxy alone: no message, log or `repr` has them.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from remotegpu_schemas.errors import Misconfigured

_SCHEMES: Final = ("http", "https")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Proxy:
    """One HTTP proxy. `url` has no credentials; `user` None is a proxy that asks for none."""

    url: str
    name: str
    """Host and port, for people."""
    user: str | None = None
    password: str = field(default="", repr=False)

    @property
    def authorization(self) -> dict[str, str]:
        """The header that gives user and password to the proxy (RFC 7617, in UTF-8); empty if it asks for none."""
        if self.user is None:
            return {}
        pair = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return {"Proxy-Authorization": f"Basic {pair}"}


def proxy_for(url: str, environ: Mapping[str, str]) -> Proxy | None:
    """The proxy for this URL, or None. Loopback is never asked for by way of a proxy.

    The lower-case name counts before the upper-case one, as in curl(1). Raises Misconfigured for a proxy that cannot
    be used; the message names the variable, not its value.
    """
    parts = urllib.parse.urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
    name, value = _variable(f"{parts.scheme}_proxy", environ)
    if not value or not host or _is_loopback(host):
        return None
    if any(_bypasses(entry, host, port) for entry in re.split(r"[\s,]+", _variable("no_proxy", environ)[1]) if entry):
        return None
    return _parse(name, value)


def _variable(name: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """Its name as it is written there, and its value."""
    found = name if name in environ else name.upper()
    return found, environ.get(found, "").strip()


def _parse(name: str, value: str) -> Proxy:
    remedy = "write it as http://[USER:PASSWORD@]HOST:PORT"
    try:
        parts = urllib.parse.urlsplit(value if "://" in value else f"http://{value}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise Misconfigured(f"{name} is no address of a proxy; {remedy}") from None
    if parts.scheme not in _SCHEMES:
        raise Misconfigured(f"{name} names a proxy of the kind '{parts.scheme[:20]}', not http or https; {remedy}")
    if not host or re.search(r"[^\w.:%-]", host):
        raise Misconfigured(f"{name} is no address of a proxy; {remedy}")
    shown = f"[{host}]" if ":" in host else host
    place = f"{shown}:{port or _DEFAULT_PORTS[parts.scheme]}"
    user = urllib.parse.unquote(parts.username) if parts.username is not None else None
    return Proxy(f"{parts.scheme}://{place}", place, user, urllib.parse.unquote(parts.password or ""))


def _bypasses(entry: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY names this host: `*`, a name with all below it, an address or a network."""
    if entry == "*":
        return True
    for pattern, only_port in _readings(entry.lower()):
        if only_port is not None and only_port != port:
            continue
        address = _address(host)
        if address is not None:
            try:
                if address in ipaddress.ip_network(pattern.strip("[]"), strict=False):
                    return True
            except (ValueError, TypeError):
                continue
        elif pattern and (host.lower() == pattern or host.lower().endswith(f".{pattern}")):
            return True
    return False


def _readings(entry: str) -> Iterator[tuple[str, int | None]]:
    """An entry as a whole, and as host and port; the colons of an IPv6 address are not told from a port's."""
    name = entry.removeprefix("*").lstrip(".")
    yield name, None
    pattern, colon, port = name.rpartition(":")
    if colon and re.fullmatch(r"[0-9]{1,5}", port, re.ASCII):
        yield pattern, int(port)


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
