"""The agent's HTTP API for the verbs, over http.client: Unix socket or TCP, the envelope, and streams of output.

Loads neither pydantic nor aiohttp: answers are plain data. Retries nothing by itself.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import urllib.parse
from collections.abc import Generator, Iterator, Sequence
from typing import IO, Any, Final

from remotegpu_agent import VERSION
from remotegpu_agent.cli.endpoints import Endpoint
from remotegpu_agent.cli.exits import UNAUTHORIZED, Broken, Exit, RefusedByAgent, Stop, Unreachable
from remotegpu_schemas import limits

Json = dict[str, Any]

_BASE_PATH: Final = "/api/v1"
_CONNECT_TIMEOUT_S: Final = 5.0
_ANSWER_TIMEOUT_S: Final = 60.0
_STREAM_SILENCE_S: Final = 120.0
"""The agent sends a comment every 15 s; a stream that is silent for so long is dead."""
_ANSWER_MAX_BYTES: Final = 64 * 1024 * 1024
_EVENT_MAX_BYTES: Final = 16 * 1024 * 1024


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket (unix(7))."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Open the socket instead of a TCP connection."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._path)
        except BaseException:
            self.sock.close()
            raise


class Client:
    """Calls the first of `endpoints` that accepts a connection, and stays with it."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._endpoints = tuple(endpoints)

    def get(self, path: str, query: Sequence[tuple[str, object]] = (), *, wait_s: float = 0.0) -> Json:
        """The data of an answer. `wait_s` is how much longer than usual it may take. Raises Stop."""
        return self._call("GET", path, query, None, None, wait_s)

    def post(
        self,
        path: str,
        body: bytes = b"",
        content_type: str = "application/json",
        query: Sequence[tuple[str, object]] = (),
    ) -> Json:
        """As `get`; not repeated, so it happens at most once."""
        return self._call("POST", path, query, body, content_type, 0.0)

    def delete(self, path: str) -> Json:
        """As `post`."""
        return self._call("DELETE", path, (), None, None, 0.0)

    @contextlib.contextmanager
    def follow(self, path: str, query: Sequence[tuple[str, object]]) -> Generator[Iterator[Json]]:
        """An open stream: the data of each Server-Sent Event, until it ends. Raises Stop."""
        connection, endpoint = self._connect(_STREAM_SILENCE_S)
        with contextlib.closing(connection):
            with _readable_errors(endpoint):
                response = _send(connection, endpoint, "GET", path, query, None, None)
                if response.status != http.client.OK or "event-stream" not in (response.headers["Content-Type"] or ""):
                    _data_of(response, endpoint)
                    raise Stop(Exit.FAILED, f"{endpoint.name} sent no stream; is it a remotegpu-agent of this version?")
            yield _events(response, endpoint)

    def _call(
        self,
        method: str,
        path: str,
        query: Sequence[tuple[str, object]],
        body: bytes | None,
        content_type: str | None,
        wait_s: float,
    ) -> Json:
        connection, endpoint = self._connect(_ANSWER_TIMEOUT_S + wait_s)
        with contextlib.closing(connection), _readable_errors(endpoint):
            return _data_of(_send(connection, endpoint, method, path, query, body, content_type), endpoint)

    def _connect(self, answer_timeout_s: float) -> tuple[http.client.HTTPConnection, Endpoint]:
        failures = []
        for endpoint in self._endpoints:
            connection = _connection_to(endpoint)
            try:
                connection.connect()
            except (OSError, UnicodeError) as error:  # UnicodeError: a host name that cannot be one
                connection.close()
                failures.append(f"{endpoint.name} ({endpoint.origin}): {_reason(error)}")
                continue
            connection.sock.settimeout(answer_timeout_s)
            return connection, endpoint
        tried = "; ".join(failures) or "neither api.socket nor api.listen is set in the config"
        raise Unreachable(f"the agent cannot be reached at {tried}. {_mend(failures)}")


def _mend(failures: Sequence[str]) -> str:
    if any("Permission denied" in failure for failure in failures):
        return "Run this as root or as a member of the group 'remotegpu' (or what api.socket_group says)"
    return "Is it running (systemctl status remotegpu-agent)? Else name it by --config, REMOTEGPU_AGENT_SOCKET or --url"


def _connection_to(endpoint: Endpoint) -> http.client.HTTPConnection:
    if endpoint.socket is not None:
        return _UnixConnection(endpoint.socket, _CONNECT_TIMEOUT_S)
    parts = urllib.parse.urlsplit(endpoint.url or "")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname or "", parts.port, timeout=_CONNECT_TIMEOUT_S)


def _send(
    connection: http.client.HTTPConnection,
    endpoint: Endpoint,
    method: str,
    path: str,
    query: Sequence[tuple[str, object]],
    body: bytes | None,
    content_type: str | None,
) -> http.client.HTTPResponse:
    base = urllib.parse.urlsplit(endpoint.url).path.rstrip("/") if endpoint.url else ""
    target = base + _BASE_PATH + path + (f"?{urllib.parse.urlencode(query)}" if query else "")
    headers = {"User-Agent": f"remotegpu-agent-cli/{VERSION}", "Accept": "*/*"}
    if content_type is not None:
        headers["Content-Type"] = content_type
    if endpoint.token is not None:
        headers["Authorization"] = f"Bearer {endpoint.token}"
    connection.request(method, target, body=body, headers=headers)
    return connection.getresponse()


def task_path(task_id: str, call: str = "") -> str:
    """The path of a task, of which a person typed the id or a prefix, or of a call on it. Raises Stop."""
    if not re.fullmatch(limits.ID_PATTERN, task_id):
        raise Stop(
            Exit.USAGE,
            f"{task_id[:40]!r} is no id of a task: letters, digits and . _ : - only; see remotegpu-agent list",
        )
    return f"/tasks/{urllib.parse.quote(task_id, safe='')}" + (f"/{call}" if call else "")


@contextlib.contextmanager
def _readable_errors(endpoint: Endpoint) -> Generator[None]:
    try:
        yield
    except TimeoutError:
        raise Broken(f"the agent at {endpoint.name} took the call but did not answer in time; is it hung?") from None
    except (OSError, http.client.HTTPException) as error:
        raise Broken(f"the connection to the agent at {endpoint.name} broke: {_reason(error)}") from None


def _data_of(response: http.client.HTTPResponse, endpoint: Endpoint) -> Json:
    body = response.read(_ANSWER_MAX_BYTES + 1)
    if response.length and len(body) <= _ANSWER_MAX_BYTES:  # `read` of so many bytes does not mind that fewer come
        raise http.client.IncompleteRead(body, response.length)
    if len(body) > _ANSWER_MAX_BYTES:
        raise Stop(Exit.FAILED, f"the answer of {endpoint.name} is larger than {_ANSWER_MAX_BYTES} bytes")
    envelope = _json_object(body)
    if envelope is None or not isinstance(envelope.get("code"), int):
        what = body[:80].decode("utf-8", "replace")
        raise Stop(
            Exit.FAILED,
            f"{endpoint.name} answered HTTP {response.status} with something that is no answer of a remotegpu-agent: "
            f"{what!r}. Does --url name the agent?",
        )
    if envelope["code"] != 0 or envelope.get("success") is False:
        raise _refusal(envelope["code"], str(envelope.get("message") or f"HTTP {response.status}"), endpoint)
    data = envelope.get("data")
    return data if isinstance(data, dict) else {}


def _refusal(code: int, message: str, endpoint: Endpoint) -> RefusedByAgent:
    if code == UNAUTHORIZED:
        how = "give a token of the agent's api.tokens_file by --token-file"
        return RefusedByAgent(code, f"{endpoint.name} wants another token: {message}; {how}")
    return RefusedByAgent(code, message)


def _events(response: IO[bytes], endpoint: Endpoint) -> Iterator[Json]:
    """The events of a stream (WHATWG HTML, 9.2): data lines until an empty one; comments are skipped."""
    name, data = "", ""
    while True:
        with _readable_errors(endpoint):
            line = response.readline(_EVENT_MAX_BYTES)
        if not line:
            return
        field, _, value = line.decode("utf-8", "replace").rstrip("\r\n").partition(":")
        match field:
            case "event":
                name = value.strip()
            case "data":
                data += value.removeprefix(" ")
            case "" if not value and data:
                yield _event(name, data, endpoint)
                name, data = "", ""
            case _:
                pass


def _event(name: str, data: str, endpoint: Endpoint) -> Json:
    value = _json_object(data)
    if value is None:
        raise Stop(Exit.FAILED, f"{endpoint.name} sent an event that is not JSON: {data[:80]!r}")
    if name == "error":
        code = value.get("code")
        raise _refusal(code if isinstance(code, int) else 0, str(value.get("message")), endpoint)
    return value


def _json_object(text: str | bytes) -> Json | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "there is no such socket"
        case ConnectionRefusedError():
            return "nobody listens there"
        case TimeoutError():
            return "no connection in time"
        case OSError():
            return error.strerror or str(error) or type(error).__name__
        case http.client.IncompleteRead():
            return "the answer broke off"
        case _:
            return " ".join(repr(str(error)).split())[:100] if str(error) else type(error).__name__
