"""Which names are ours, and whose pages may change something."""

from __future__ import annotations

import pytest

from remotegpu_agent.api.origins import check_host, check_origin, check_site, own_names
from remotegpu_schemas.errors import Code, Refused

NAMES = own_names("gpu-1.fleet.example", ["Allowed.Example."])


@pytest.mark.parametrize(
    "host",
    [
        None,
        "127.0.0.1",
        "10.0.0.1:8090",
        "[::1]",
        "[::1]:8090",
        "localhost",
        "LocalHost:80",
        "gpu-1",
        "gpu-1.fleet.example",
        "GPU-1.fleet.example.:8090",
        "allowed.example",
    ],
)
def test_our_hosts(host: str | None) -> None:
    """IP literals, localhost, the own host name short and long, and what is allowed; in any case, with a port."""
    check_host(host, NAMES)


@pytest.mark.parametrize(
    "host", ["", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::1", "a b", "gpu-2", "x" * 9000]
)
def test_strange_hosts(host: str) -> None:
    """Everything else is refused, in a short sentence."""
    with pytest.raises(Refused) as caught:
        check_host(host, NAMES)
    assert caught.value.code is Code.FORBIDDEN
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (None, "localhost:8090"),
        ("http://localhost:8090", "localhost:8090"),
        ("https://gpu-1", "GPU-1"),
        ("http://[::1]:80", "[::1]:80"),
    ],
)
def test_our_pages(origin: str | None, host: str) -> None:
    """No page at all, and the page that this agent served."""
    check_origin(origin, host)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("null", "localhost:8090"),
        ("http://evil.example", "localhost:8090"),
        ("http://localhost:9999", "localhost:8090"),
        ("http://", None),
        ("", "localhost"),
    ],
)
def test_strange_pages(origin: str, host: str | None) -> None:
    """Another host, another port, a sandboxed frame."""
    with pytest.raises(Refused) as caught:
        check_origin(origin, host)
    assert caught.value.code is Code.FORBIDDEN


@pytest.mark.parametrize("site", [None, "same-origin", "none", " Same-Origin "])
def test_our_site(site: str | None) -> None:
    """No browser, the agent's own page, and who typed the address."""
    check_site(site)


@pytest.mark.parametrize("site", ["cross-site", "same-site", "", "nonsense"])
def test_strange_sites(site: str) -> None:
    """Another site, and another host of the same one."""
    with pytest.raises(Refused) as caught:
        check_site(site)
    assert caught.value.code is Code.FORBIDDEN
