"""Every answer of the API: the envelope, on success and on error alike (protocol.md, section 2)."""

from __future__ import annotations

import datetime
import http
from typing import Final

from aiohttp import web
from pydantic import SerializeAsAny

from remotegpu_schemas.api import Envelope, Message
from remotegpu_schemas.errors import CODES, Code

HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Server": "remotegpu-agent"}
"""What every answer says: nothing here is for a cache, or to be guessed at, and the program is named, no more."""

MESSAGE_MAX_CHARS: Final = 64 * 1024
"""A refused task file's whole report fits."""

_AnyEnvelope = Envelope[SerializeAsAny[Message]]


def rfc3339(wall_s: float) -> str:
    """A time since the epoch as RFC 3339 in UTC, to the millisecond."""
    moment = datetime.datetime.fromtimestamp(wall_s, datetime.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def success(data: Message, now: float) -> web.Response:
    """HTTP 200 with the data in an envelope."""
    text = _AnyEnvelope(success=True, code=Code.OK, message="ok", data=data, timestamp=rfc3339(now)).model_dump_json()
    return _json(text, CODES[Code.OK].http_status)


def bare(data: Message) -> web.Response:
    """HTTP 200 with the data at the top level."""
    return _json(data.model_dump_json(), CODES[Code.OK].http_status)


def failure(code: Code, message: str, now: float) -> web.Response:
    """An error, with the HTTP status of its code."""
    return _json(failure_text(code, message, now), CODES[code].http_status)


def failure_bytes(code: Code, message: str, now: float, retry_after_s: int | None = None) -> bytes:
    """The same as raw HTTP, for where there is no request to answer; the connection is to be closed after it."""
    body = failure_text(code, message, now).encode("utf-8")
    status = http.HTTPStatus(CODES[code].http_status)
    headers = {
        "Content-Type": "application/json; charset=utf-8",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **HEADERS,
    }
    if retry_after_s is not None:
        headers["Retry-After"] = str(retry_after_s)
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join((*lines, "", "")).encode("ascii") + body


def failure_text(code: Code, message: str, now: float) -> str:
    """The error's envelope as one line of JSON."""
    shown = message if len(message) <= MESSAGE_MAX_CHARS else message[:MESSAGE_MAX_CHARS] + "…"
    sendable = shown.encode("utf-8", "replace").decode("utf-8")
    envelope = _AnyEnvelope(success=False, code=code, message=sendable, data=None, timestamp=rfc3339(now))
    return envelope.model_dump_json()


def _json(text: str, status: int) -> web.Response:
    return web.Response(body=text.encode("utf-8"), status=status, content_type="application/json")
