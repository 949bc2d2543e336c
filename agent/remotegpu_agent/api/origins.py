"""Protection from web pages: which Host names are ours, and whose pages may change state. Pure.

A page of a stranger can make a browser send requests here; DNS rebinding makes them look like the page's own.
"""

from __future__ import annotations

import ipaddress
import urllib.parse
from collections.abc import Collection

from remotegpu_schemas.errors import Code, Refused

_SHOWN_MAX_CHARS = 100


def own_names(host_name: str, allowed_hosts: Collection[str]) -> frozenset[str]:
    """The names by which this agent may be called, beside every IP literal."""
    names = {"localhost", host_name, host_name.partition(".")[0], *allowed_hosts}
    return frozenset(_plain(name) for name in names if name)


def check_host(host: str | None, names: Collection[str]) -> None:
    """Refuse a Host header that is no IP literal and not one of `names`. A request without one is no browser's.

    Raises Refused(FORBIDDEN).
    """
    if host is None:
        return
    name = _name_of(host)
    if name is not None and (_is_ip_literal(name) or _plain(name) in names):
        return
    raise Refused(
        Code.FORBIDDEN, f"Host {host[:_SHOWN_MAX_CHARS]!r} is not a name of this agent; add it to api.allowed_hosts"
    )


def check_origin(origin: str | None, host: str | None) -> None:
    """Refuse a change of state that a page of another origin asks for. Raises Refused(FORBIDDEN)."""
    if origin is None:
        return
    own = (host or "").lower()
    if own and origin.lower() in (f"http://{own}", f"https://{own}"):
        return
    raise Refused(Code.FORBIDDEN, f"a page of {origin[:_SHOWN_MAX_CHARS]!r} may not change anything here")


def check_site(fetch_site: str | None) -> None:
    """Refuse a change of state that a browser says another site asks for (Sec-Fetch-Site; W3C Fetch Metadata).

    Browsers say so where they send no Origin, too; who types an address himself is `none`. Raises Refused(FORBIDDEN).
    """
    if fetch_site is None or fetch_site.strip().lower() in {"same-origin", "none"}:
        return
    raise Refused(Code.FORBIDDEN, "a page of another site may not change anything here")


def _name_of(host: str) -> str | None:
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _plain(name: str) -> str:
    return name.lower().rstrip(".")


def _is_ip_literal(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
