"""How the agent stands with its control plane, and why a call got no answer: in a kind and in a sentence.

Pure but for the exceptions of aiohttp that it reads. No sentence holds a token or a proxy's credentials.
"""

from __future__ import annotations

import enum
import os
import ssl
import urllib.parse
from dataclasses import dataclass

import aiohttp

from remotegpu_agent.proxies import Proxy
from remotegpu_agent.tls import tls_sentence
from remotegpu_schemas import limits
from remotegpu_schemas.wire import Answer, Verdict


class Problem(enum.StrEnum):
    """What is wrong between agent and control plane; a label of the metrics."""

    UNREACHABLE = "unreachable"
    """No address, no connection, or none that lasted until the answer."""
    TIMEOUT = "timeout"
    PROXY = "proxy"
    TLS = "tls"
    TOKEN_REFUSED = "token_refused"
    SERVER_ERROR = "server_error"
    BAD_ANSWER = "bad_answer"
    """What answers is not a control plane, or not one that can be understood."""


class BadAnswer(ValueError):
    """An answer that breaks a bound or a rule of HTTP; the message says which."""


@dataclass
class Contact:
    """How the agent stands with the control plane, for people."""

    is_connected: bool = False
    last_contact_ms: int | None = None
    error: str | None = "not contacted yet"
    problem: Problem | None = None


@dataclass(frozen=True)
class Peer:
    """Whom the agent calls, as far as messages name it."""

    url: str
    proxy: Proxy | None = None
    has_client_certificate: bool = False

    @property
    def is_tls(self) -> bool:
        """Whether it is called by https."""
        return self.url.startswith("https:")

    @property
    def host(self) -> str:
        """Its host, without a port."""
        return urllib.parse.urlsplit(self.url).hostname or ""

    @property
    def place(self) -> str:
        """Host and port."""
        parts = urllib.parse.urlsplit(self.url)
        return parts.netloc.rpartition("@")[2] if parts.port else f"{parts.netloc}:{443 if self.is_tls else 80}"


def problem_of(answer: Answer) -> Problem | None:
    """What an HTTP answer says about the contact as such; None when the plane can be worked with.

    Refusals of one call (a business code, 429, a route that does not exist) are no problem of the contact.
    """
    if answer.verdict is Verdict.UNAUTHORIZED:
        return Problem.TOKEN_REFUSED
    if answer.http_status >= 500:
        return Problem.SERVER_ERROR
    if answer.code is None and answer.verdict is Verdict.RETRY and answer.http_status not in {408, 425, 429}:
        return Problem.BAD_ANSWER
    return None


def failure_of(error: Exception, peer: Peer, *, had_contact: bool) -> tuple[Problem, str]:
    """Why a call got no answer. `had_contact`: the plane has answered before, so that its address is right."""
    problem, text = _failure(error, peer, had_contact=had_contact)
    return problem, text[: limits.WIRE_MESSAGE_MAX_CHARS]


def proxy_refusal(status: int, reason: str, peer: Peer) -> str:
    """The sentence for an answer that the proxy gave in the plane's place."""
    name = peer.proxy.name if peer.proxy is not None else ""
    what = f"the proxy {name} refuses to connect to {peer.place}: HTTP {status} {reason[:100]}".rstrip()
    variable = "HTTPS_PROXY" if peer.is_tls else "HTTP_PROXY"
    if status == 407:
        return f"{what}; give the agent user and password, as {variable}=http://USER:PASSWORD@HOST:PORT"
    return f"{what}; have it allow that, or name the host in NO_PROXY"


def _failure(error: Exception, peer: Peer, *, had_contact: bool) -> tuple[Problem, str]:
    secured = _ssl_error(error)
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return Problem.PROXY, proxy_refusal(error.status, error.message, peer)
    if isinstance(error, aiohttp.ClientProxyConnectionError) and peer.proxy is not None:
        return Problem.PROXY, f"the proxy {peer.proxy.name} cannot be reached: {_reason(error)}"
    if secured is not None:
        return Problem.TLS, tls_sentence(secured, peer.host)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Problem.UNREACHABLE, f"{peer.host} has no address: {_reason(error)}"
    if isinstance(error, aiohttp.ClientConnectorError):
        return Problem.UNREACHABLE, f"{peer.place} takes no connection: {_reason(error)}"
    if isinstance(error, BadAnswer):
        return Problem.BAD_ANSWER, str(error)
    if isinstance(error, aiohttp.ClientPayloadError):
        return Problem.BAD_ANSWER, "the answer ended before it was whole"
    if isinstance(error, aiohttp.ClientResponseError):
        what = " ".join(error.message.split())[:200]
        return Problem.BAD_ANSWER, f"{peer.place} does not answer in HTTP as it should: {what}"
    if isinstance(error, aiohttp.ClientConnectionError | ConnectionError):
        return Problem.UNREACHABLE, _closed(peer, had_contact=had_contact)
    return Problem.UNREACHABLE, f"{type(error).__name__}: {error}"


def _closed(peer: Peer, *, had_contact: bool) -> str:
    what = f"{peer.place} closed the connection before it answered"
    if peer.is_tls and (peer.has_client_certificate or not had_contact):
        return f"{what}; a refused or missing client certificate looks like this too"
    if not peer.is_tls and not had_contact:
        return f"{what}; if that port speaks TLS, control_plane.url must begin with https"
    return what


def _ssl_error(error: BaseException) -> ssl.SSLError | None:
    found: BaseException | None = error
    while found is not None:
        # aiohttp's own are called SSLError as well, but have nothing of one; what they wrap has.
        inner = getattr(found, "certificate_error", None) or getattr(found, "os_error", None) or found
        if isinstance(inner, ssl.SSLError) and not isinstance(inner, aiohttp.ClientError):
            return inner
        found = found.__cause__
    return None


def _reason(error: aiohttp.ClientConnectorError) -> str:
    """In the words of errno(3): asyncio's own repeat the address."""
    inner = error.os_error
    number = inner.errno
    return os.strerror(number) if number is not None and number > 0 else inner.strerror or str(inner)
