"""What the control plane answers: one verdict for every HTTP answer, and the data of the accepted ones."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from typing import Any, Final
from urllib.parse import urlsplit

from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.errors import Code, Permanent
from remotegpu_schemas.task import TaskId
from remotegpu_schemas.wire.text import clean_text
from remotegpu_schemas.wire.times import parse_http_date, parse_retry_after, parse_time
from remotegpu_schemas.wire.values import JsonObject, id_of


class Verdict(enum.StrEnum):
    """What an answer means for the agent; the table "Codes, and what the agent does" of protocol.md."""

    OK = "ok"
    SUPERSEDED = "superseded"
    """30001 or 30004: another attempt has the task, or the plane does not know it."""
    FINISHED = "finished"
    """30002: the task has ended there; on `complete` that counts as delivered."""
    LEASE_EXPIRED = "lease_expired"
    INVALID = "invalid"
    """30005 and other refusals of the request itself: kept as a dead letter, not repeated."""
    RETRY = "retry"
    UNAUTHORIZED = "unauthorized"
    AMBIGUOUS = "ambiguous"
    """A bare 404, 409 or 410: deployed planes answer so for a database hiccup too. Never kills."""
    ROUTE_MISSING = "route_missing"
    """404 or 405 that is no envelope: this plane does not have the call."""


@dataclass(frozen=True)
class Answer:
    """One answer, freed from its dialect. `data` is empty unless the verdict is OK.

    `has_odd_data`: accepted, but with something in the place of `data` that is no object. What the call needs of it
    counts as not given.
    """

    verdict: Verdict
    message: str
    data: JsonObject = field(default_factory=dict)
    http_status: int = 0
    code: int | None = None
    retry_after_s: float | None = None
    date: datetime | None = None
    has_odd_data: bool = False


_BY_CODE: Final = {
    Code.ATTEMPT_MISMATCH: Verdict.SUPERSEDED,
    Code.TASK_NOT_FOUND: Verdict.SUPERSEDED,
    Code.TASK_FINISHED: Verdict.FINISHED,
    Code.LEASE_EXPIRED: Verdict.LEASE_EXPIRED,
    Code.INVALID_PARAMETERS: Verdict.INVALID,
    Code.INTERNAL: Verdict.RETRY,
}
_MESSAGE_KEYS: Final = ("message", "msg", "error", "error_msg")


def parse_answer(status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    """Read one HTTP answer. Never raises: what cannot be understood is RETRY, with the reason in `message`.

    `headers` is looked up by `Date` and `Retry-After` (any case-insensitive mapping will do).
    """
    date = parse_http_date(headers.get("Date"))
    retry_after_s = parse_retry_after(headers.get("Retry-After"), date)
    envelope = _envelope_of(body)
    if envelope is None:
        message = f"HTTP {status} without an envelope: {_excerpt(body)}"
        return Answer(_without_envelope(status), message, {}, status, None, retry_after_s, date)
    code, message = envelope["code"], _message_of(envelope)
    if code == 0 and 200 <= status < 300:
        data = envelope.get("data")
        is_odd = bool(data) and not isinstance(data, dict)
        data = data if isinstance(data, dict) else {}
        return Answer(Verdict.OK, message, data, status, 0, retry_after_s, date, is_odd)
    if code in _BY_CODE:
        verdict = _BY_CODE[Code(code)]
    elif 400 <= code <= 599:
        verdict = _by_status(code)
    else:
        verdict = _by_status(status)
    return Answer(verdict, message or f"code {code}", {}, status, code, retry_after_s, date)


def _by_status(status: int) -> Verdict:
    match status:
        case 401 | 403:
            return Verdict.UNAUTHORIZED
        case 404 | 409 | 410:
            return Verdict.AMBIGUOUS
        case 408 | 425 | 429:
            return Verdict.RETRY
        case _:
            return Verdict.INVALID if 400 <= status < 500 else Verdict.RETRY


def _without_envelope(status: int) -> Verdict:
    """Something between us and the plane spoke, or the plane has no such call: no refusal of the request itself."""
    if status in {404, 405}:
        return Verdict.ROUTE_MISSING
    verdict = _by_status(status)
    return Verdict.RETRY if verdict is Verdict.INVALID else verdict


def _envelope_of(body: bytes) -> JsonObject | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    code = value.get("code")
    if isinstance(code, str) and re.fullmatch(r"\d{1,6}", code, re.ASCII):
        code = int(code)
    if not isinstance(code, int) or isinstance(code, bool):
        return None
    return {**value, "code": code}


def _message_of(envelope: Mapping[str, Any]) -> str:
    texts = (envelope.get(key) for key in _MESSAGE_KEYS)
    text = next((text for text in texts if isinstance(text, str) and text), "")
    return clean_text(text[: limits.WIRE_MESSAGE_MAX_CHARS])


def _excerpt(body: bytes) -> str:
    text = " ".join(body[:200].decode("utf-8", "replace").split())
    return repr(text[:120]) if text else "empty body"


# --- the data of accepted answers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Renewal:
    """A renew answer; without an expiry the lease counts from the sending of the request plus `extend_sec`."""

    lease_expires_at: datetime | None
    is_cancel_requested: bool


def parse_renewal(data: Mapping[str, Any]) -> Renewal:
    """Read the data of an accepted renewal."""
    return Renewal(parse_time(data.get("lease_expires_at")), data.get("cancel_requested") is True)


@dataclass(frozen=True)
class HeartbeatAnswer:
    """What the plane asks for by the way."""

    cancelled: tuple[tuple[TaskId, AttemptId], ...]
    wants_drain: bool
    needs_collect: bool


def parse_heartbeat(data: Mapping[str, Any]) -> HeartbeatAnswer:
    """Read the data of an accepted heartbeat; what is malformed is left out."""
    cancelled = []
    items = data.get("cancelled")
    for item in items[: limits.HEARTBEAT_CANCELLED_MAX] if isinstance(items, list) else []:
        if isinstance(item, dict):
            task_id, attempt_id = id_of(item.get("task_id")), id_of(item.get("attempt_id"))
            if task_id is not None and attempt_id is not None:
                cancelled.append((TaskId(task_id), AttemptId(attempt_id)))
    return HeartbeatAnswer(tuple(cancelled), data.get("drain") is True, data.get("needs_collect") is True)


def parse_features(data: Mapping[str, Any]) -> frozenset[str]:
    """The optional calls that the plane named in its register answer."""
    items = data.get("features")
    names = (item for item in items if isinstance(item, str) and id_of(item)) if isinstance(items, list) else ()
    return frozenset(islice(names, limits.FEATURES_MAX_COUNT))


@dataclass(frozen=True)
class UploadTarget:
    """Where one artifact goes: one HTTP request with these headers; `key` names it in the completion."""

    url: str
    method: str
    headers: dict[str, str]
    key: str


_UPLOAD_METHODS: Final = ("PUT", "POST")
_URL: Final = re.compile(r"[\x21-\x7e]+", re.ASCII)
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)  # RFC 9110, section 5.6.2
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e]*", re.ASCII)


def parse_upload_target(data: Mapping[str, Any]) -> UploadTarget:
    """Read the data of an accepted upload-url call; the method is PUT if none is named.

    Raises Permanent when it cannot be used: the result then goes without this upload.
    """
    url, key = data.get("url"), data.get("key")
    method = data.get("method") or "PUT"
    headers = data.get("headers") or {}
    if not isinstance(url, str) or not _is_http_url(url):
        raise Permanent("the control plane gave an upload URL that is no http or https URL; the file is not uploaded")
    if not isinstance(method, str) or method.upper() not in _UPLOAD_METHODS:
        raise Permanent(f"the control plane wants an upload by {str(method)[:20]!r}, not by PUT or POST")
    if not isinstance(headers, dict) or not _are_headers(headers):
        raise Permanent("the control plane gave headers for an upload that HTTP cannot carry")
    if not isinstance(key, str) or not key or len(key) > limits.UPLOAD_FIELD_MAX_CHARS:
        raise Permanent("the control plane gave an upload URL without a key, so that nobody could find the file")
    return UploadTarget(url, method.upper(), dict(headers), clean_text(key))


def _is_http_url(url: str) -> bool:
    if len(url) > limits.UPLOAD_FIELD_MAX_CHARS or not _URL.fullmatch(url):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _are_headers(headers: Mapping[object, object]) -> bool:
    return len(headers) <= limits.UPLOAD_HEADERS_MAX_COUNT and all(
        isinstance(name, str)
        and isinstance(value, str)
        and len(name) + len(value) <= limits.UPLOAD_FIELD_MAX_CHARS
        and _HEADER_NAME.fullmatch(name)
        and _HEADER_VALUE.fullmatch(value)
        for name, value in headers.items()
    )
