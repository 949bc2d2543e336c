"""Which proxy the environment names."""

from __future__ import annotations

import pytest

from remotegpu_agent.proxies import Proxy, proxy_for
from remotegpu_schemas.errors import Misconfigured

URL = "https://plane.example:8443/base"


def test_by_the_scheme_of_the_url() -> None:
    """HTTPS_PROXY is for https, HTTP_PROXY for http; the lower-case name counts first, and empty is none."""
    environ = {"HTTPS_PROXY": "http://a:1", "HTTP_PROXY": "http://b:2"}
    assert proxy_for(URL, environ) == Proxy("http://a:1", "a:1")
    assert proxy_for("http://plane.example", environ) == Proxy("http://b:2", "b:2")
    assert proxy_for(URL, {**environ, "https_proxy": "c:3"}) == Proxy("http://c:3", "c:3")
    assert proxy_for(URL, {**environ, "https_proxy": ""}) is None
    assert proxy_for(URL, {"ALL_PROXY": "http://d:4"}) is None


def test_user_and_password_are_apart_and_never_shown() -> None:
    """Percent-encoded as in a URL; neither the address nor the repr has the password."""
    proxy = proxy_for(URL, {"HTTPS_PROXY": "http://gpu%40host:s%2Fecret@[2001:db8::1]"})
    assert proxy is not None
    assert (proxy.user, proxy.password, proxy.url, proxy.name) == (
        "gpu@host",
        "s/ecret",
        "http://[2001:db8::1]:80",
        "[2001:db8::1]:80",
    )
    assert "ecret" not in f"{proxy} {proxy!r}"


@pytest.mark.parametrize(
    ("url", "no_proxy", "is_direct"),
    [
        (URL, "*", True),
        (URL, "plane.example", True),
        (URL, "other.example, plane.example", True),
        (URL, ".example", True),
        (URL, "*.example", True),
        (URL, "EXAMPLE", True),
        (URL, "plane.example:8443", True),
        (URL, "plane.example:443", False),
        (URL, "lane.example", False),
        (URL, "plane.example.org", False),
        (URL, "", False),
        (URL, "10.0.0.0/8", False),
        ("https://10.1.2.3", "10.0.0.0/8", True),
        ("https://10.1.2.3", "10.1.2.3", True),
        ("https://10.1.2.3", "10.1.2.3:443", True),
        ("https://10.1.2.3", "10.1.2.3:80", False),
        ("https://11.1.2.3", "10.0.0.0/8", False),
        ("https://[2001:db8::7]", "2001:db8::/32", True),
        ("https://[2001:db8::7]", "[2001:db8::7]:443", True),
        ("https://[2001:db8::7]", "2001:db8::8", False),
        ("https://127.0.0.1:9", "", True),
        ("https://[::1]:9", "", True),
        ("http://localhost:9", "", True),
    ],
)
def test_no_proxy(url: str, no_proxy: str, is_direct: bool) -> None:
    """A name with all below it, an address, a network, each with or without a port; loopback needs no entry."""
    environ = {"HTTPS_PROXY": "http://a:1", "HTTP_PROXY": "http://a:1", "NO_PROXY": no_proxy}
    assert (proxy_for(url, environ) is None) == is_direct


@pytest.mark.parametrize("value", ["socks5://u:secret@a:1", "http://u:secret@a:x", "http://", "http://u:secret@a b"])
def test_what_cannot_be_used_is_refused_without_its_secret(value: str) -> None:
    """The message names the variable and how to write it."""
    with pytest.raises(Misconfigured, match=r"^HTTPS_PROXY .*USER:PASSWORD@") as refused:
        proxy_for(URL, {"HTTPS_PROXY": value})
    assert "secret" not in str(refused.value)
