"""Messages of the control plane (protocol.md, section 1) and every dialect of the planes that are deployed.

Nothing behind this module sees a dialect: times are aware datetimes or None, texts are clean UTF-8, a claimed task
is a `Task`, and an answer is one `Verdict` with its data. Pure: no I/O, no clock.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.errors import Code
from remotegpu_schemas.task import PRIORITY_DEFAULT, PRIORITY_LEAST_URGENT, PRIORITY_MOST_URGENT, Task, TaskId
from remotegpu_schemas.taskfile import TaskForm, task_from_mapping, to_task

JsonObject = dict[str, Any]


# --- answers -------------------------------------------------------------------------------------------------------


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
    """One answer, freed from its dialect. `data` is empty unless the verdict is OK."""

    verdict: Verdict
    message: str
    data: JsonObject = field(default_factory=dict)
    http_status: int = 0
    code: int | None = None
    retry_after_s: float | None = None
    date: datetime | None = None


_BY_CODE: Final = {
    Code.ATTEMPT_MISMATCH: Verdict.SUPERSEDED,
    Code.TASK_NOT_FOUND: Verdict.SUPERSEDED,
    Code.TASK_FINISHED: Verdict.FINISHED,
    Code.LEASE_EXPIRED: Verdict.LEASE_EXPIRED,
    Code.INVALID_PARAMETERS: Verdict.INVALID,
    Code.INTERNAL: Verdict.RETRY,
}
_RETRY_STATUS: Final = frozenset({408, 425, 429})
_AMBIGUOUS_STATUS: Final = frozenset({404, 409, 410})


def _by_status(status: int) -> Verdict:
    if status in {401, 403}:
        return Verdict.UNAUTHORIZED
    if status in _AMBIGUOUS_STATUS:
        return Verdict.AMBIGUOUS
    if status in _RETRY_STATUS or status >= 500 or status < 400:
        return Verdict.RETRY
    return Verdict.INVALID


def parse_answer(status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    """Read one HTTP answer. Never raises: what cannot be understood is RETRY, with the reason in `message`.

    `headers` is looked up by `Date` and `Retry-After` (any case-insensitive mapping will do).
    """
    date = parse_http_date(headers.get("Date"))
    retry_after_s = parse_retry_after(headers.get("Retry-After"), date)
    envelope = _envelope_of(body)
    if envelope is None:
        if status in {404, 405}:
            verdict = Verdict.ROUTE_MISSING
        else:
            verdict = _by_status(status)
        return Answer(
            verdict, f"HTTP {status} without an envelope: {_excerpt(body)}", {}, status, None, retry_after_s, date
        )
    code = envelope["code"]
    message = str(envelope.get("message") or envelope.get("msg") or "")[: limits.WIRE_MESSAGE_MAX_CHARS]
    if code == 0 and status < 400:
        data = envelope.get("data")
        return Answer(Verdict.OK, message, data if isinstance(data, dict) else {}, status, 0, retry_after_s, date)
    if code in _BY_CODE:
        verdict = _BY_CODE[Code(code)]
    elif 400 <= code <= 599:
        verdict = _by_status(code)
    else:
        verdict = _by_status(status)
    return Answer(verdict, message or f"code {code}", {}, status, code, retry_after_s, date)


def _envelope_of(body: bytes) -> JsonObject | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    code = value.get("code")
    if isinstance(code, str) and re.fullmatch(r"\d{1,6}", code):
        code = int(code)
    if not isinstance(code, int) or isinstance(code, bool):
        return None
    return {**value, "code": code}


def _excerpt(body: bytes) -> str:
    text = " ".join(body[:200].decode("utf-8", "replace").split())
    return repr(text[:120]) if text else "empty body"


# --- times and texts -----------------------------------------------------------------------------------------------

_TIME: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,12}))?\s*([Zz]|[+-]\d\d:?\d\d)?", re.ASCII
)
_ZERO_YEAR: Final = 1


def parse_time(value: object) -> datetime | None:
    """RFC 3339 with up to picoseconds or an offset; None for what means "not set" or cannot be read."""
    if not isinstance(value, str):
        return None
    match = _TIME.fullmatch(value.strip())
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    if year <= _ZERO_YEAR:
        return None
    microsecond = int((match[7] or "0").ljust(6, "0")[:6])
    zone = match[8]
    tz: timezone = UTC
    if zone not in {None, "Z", "z"}:
        sign = -1 if zone[0] == "-" else 1
        digits = zone[1:].replace(":", "")
        offset = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
        if offset >= timedelta(hours=24):
            return None
        tz = timezone(sign * offset)
    try:
        return datetime(year, month, day, hour, minute, min(second, 59), microsecond, tzinfo=tz).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def format_time(epoch_s: float) -> str:
    """RFC 3339 UTC with milliseconds and `Z`."""
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_http_date(value: str | None) -> datetime | None:
    """The `Date` header (RFC 9110, IMF-fixdate), or None."""
    if not value:
        return None
    try:
        return datetime.strptime(value.strip(), "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC)
    except ValueError:
        return None


def parse_retry_after(value: str | None, date: datetime | None) -> float | None:
    """Seconds from `Retry-After`, a number or a date against the answer's own `Date`; bounded."""
    if not value:
        return None
    text = value.strip()
    if re.fullmatch(r"\d{1,9}", text, re.ASCII):
        seconds = float(text)
    else:
        until = parse_http_date(text)
        if until is None or date is None:
            return None
        seconds = (until - date).total_seconds()
    return min(max(seconds, 0.0), limits.RETRY_AFTER_MAX_S)


def clean_text(data: bytes | str) -> str:
    """Text that every peer can store: invalid UTF-8, lone surrogates and NUL become U+FFFD."""
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return raw.decode("utf-8", "replace").replace("\0", "\ufffd")


def inline_output(head: bytes, tail: bytes, total_bytes: int, limit_bytes: int) -> tuple[str, bool]:
    """The inline form of an output of `total_bytes`: whole if it fits, else head, marker line and tail.

    `head` is the output's beginning (all of it when it fits), `tail` its end. Returns the text and whether it was cut;
    the text is at most `limit_bytes` long as UTF-8.
    """
    if total_bytes <= len(head):
        text = clean_text(head)
        if len(text.encode()) <= limit_bytes:
            return text, False
    marker = f"\n... [remotegpu: output of {total_bytes} bytes cut here] ...\n"
    room = max(limit_bytes - len(marker.encode()), 0) // 2
    return _fit(clean_text(head), room) + marker + _fit(clean_text(tail or head), room, from_end=True), True


def _fit(text: str, limit_bytes: int, *, from_end: bool = False) -> str:
    raw = text.encode()
    if len(raw) <= limit_bytes:
        return text
    cut = raw[len(raw) - limit_bytes :] if from_end else raw[:limit_bytes]
    return cut.decode("utf-8", "ignore")


# --- claims --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """One claimed task. The lease is relative: `lease_ttl_s` from the plane, or the expiry on the plane's clock."""

    task: Task
    attempt_id: AttemptId
    machine_id: str | None
    retries_used: int
    lease_ttl_s: float | None
    lease_expires_at: datetime | None
    renew_interval_s: float | None


@dataclass(frozen=True)
class RefusedClaim:
    """A task that this agent can never run; it is completed as `policy_refused` with the reason."""

    task_id: TaskId
    attempt_id: AttemptId
    reason: str


@dataclass(frozen=True)
class UnusableClaim:
    """An item that cannot even be answered for (no usable ids); logged and left to lapse."""

    reason: str


ClaimItem = Claim | RefusedClaim | UnusableClaim

_ID: Final = re.compile(limits.ID_PATTERN, re.ASCII)
_JSON_KEYS: Final = ("args", "env", "depends_on", "labels", "resources")
_UNSET_IF_FALSY: Final = (
    "timeout", "workdir", "max_retries", "retry_delay", "grace_period_sec", "lease_ttl_sec", "renew_interval_sec",
    "group_id", "parent_id", "machine_id", "type", "name", "priority", "stop_signal", "interpreter", "script",
)  # fmt: skip


def parse_claims(data: Mapping[str, Any]) -> list[ClaimItem]:
    """The tasks of a claim answer, each on its own: one bad item never hurts another."""
    items = data.get("tasks")
    if not isinstance(items, list):
        return []
    return [_parse_claim(item) for item in items[: limits.CLAIM_MAX_TASKS]]


def _parse_claim(item: object) -> ClaimItem:
    if not isinstance(item, dict):
        return UnusableClaim(f"a claimed task is {type(item).__name__}, not an object")
    task_id, attempt_id = _id_of(item.get("id")), _id_of(item.get("attempt_id"))
    if task_id is None or attempt_id is None:
        return UnusableClaim(
            f"a claimed task has unusable ids: id {_shown(item.get('id'))}, attempt_id {_shown(item.get('attempt_id'))}"
        )
    try:
        raw = _plain_task(item)
        form = task_from_mapping(raw, ignore_unknown=True)
        task = to_task(form, TaskId(task_id))
    except ValidationError as error:
        return RefusedClaim(TaskId(task_id), AttemptId(attempt_id), _readable(error))
    except ValueError as error:
        return RefusedClaim(TaskId(task_id), AttemptId(attempt_id), str(error))
    machine_id = item.get("machine_id")
    return Claim(
        task=task,
        attempt_id=AttemptId(attempt_id),
        machine_id=str(machine_id) if machine_id not in {None, ""} else None,
        retries_used=_count(item.get("retry_count")),
        lease_ttl_s=_positive(item.get("lease_ttl_sec")),
        lease_expires_at=parse_time(item.get("lease_expires_at")),
        renew_interval_s=_positive(item.get("renew_interval_sec")),
    )


def _plain_task(item: Mapping[str, Any]) -> JsonObject:
    """The item as a task of taskfile.md: dialect names and encodings resolved, what means "not set" left out."""
    raw = dict(item)
    if not raw.get("env") and raw.get("env_vars"):
        raw["env"] = raw["env_vars"]
    for key in _JSON_KEYS:
        value = raw.get(key)
        if isinstance(value, str):
            raw[key] = _json_inside(key, value)
        if raw.get(key) is None:
            raw.pop(key, None)
    for key in _UNSET_IF_FALSY:
        if not raw.get(key):
            raw.pop(key, None)
    if isinstance(raw.get("env"), dict):
        raw["env"] = {str(name): _text_of(value) for name, value in raw["env"].items()}
    if isinstance(raw.get("args"), list):
        raw["args"] = [_text_of(value) for value in raw["args"]]
        if not raw["args"]:  # deployed planes send [] for "no arguments given"; the command is then a shell string
            raw.pop("args")
    if "priority" in raw:
        raw["priority"] = _priority(raw["priority"])
    raw.pop("machine_id", None)
    return {key: value for key, value in raw.items() if key in TaskForm.model_fields or key in {"env", "args"}}


def _json_inside(key: str, text: str) -> object:
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{key} is a string that holds no JSON document: {text[:80]!r}") from None


def _text_of(value: object) -> object:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case None:
            return ""
        case _:
            return value


def _priority(value: object) -> object:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return min(max(int(value), PRIORITY_MOST_URGENT), PRIORITY_LEAST_URGENT)
    return value if isinstance(value, str) else PRIORITY_DEFAULT


def _id_of(value: object) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        value = str(value)
    return value if isinstance(value, str) and _ID.fullmatch(value) else None


def _shown(value: object) -> str:
    return repr(value)[:60]


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return min(max(value, 0), limits.RETRIES_MAX)
    return 0


def _positive(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= limits.TIMEOUT_MAX_S:
        return float(value)
    return None


def _readable(error: ValidationError) -> str:
    parts = []
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in detail["loc"])
        parts.append(f"{where}: {detail['msg']}" if where else str(detail["msg"]))
    return "; ".join(parts)[: limits.WIRE_MESSAGE_MAX_CHARS]


# --- other answers -------------------------------------------------------------------------------------------------


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
    for item in items if isinstance(items, list) else []:
        if isinstance(item, dict):
            task_id, attempt_id = _id_of(item.get("task_id")), _id_of(item.get("attempt_id"))
            if task_id is not None and attempt_id is not None:
                cancelled.append((TaskId(task_id), AttemptId(attempt_id)))
    return HeartbeatAnswer(tuple(cancelled), data.get("drain") is True, data.get("needs_collect") is True)


def parse_features(data: Mapping[str, Any]) -> frozenset[str]:
    """The optional calls that the plane named in its register answer."""
    items = data.get("features")
    return frozenset(item for item in items if isinstance(item, str)) if isinstance(items, list) else frozenset()


# --- requests ------------------------------------------------------------------------------------------------------


class Request(BaseModel):
    """A request body; None means "left out"."""

    model_config = ConfigDict(frozen=True)

    def body(self) -> JsonObject:
        """The JSON object to send."""
        return self.model_dump(mode="json", exclude_none=True)


class RegisterRequest(Request):
    """POST /register."""

    agent_id: str
    machine_id: str
    version: str
    hostname: str
    ip_address: str
    agent_port: int
    max_workers: int
    features: list[str] = []
    labels: dict[str, str] = {}
    hardware: JsonObject | None = None


class HeartbeatRequest(Request):
    """POST /heartbeat. Integers in `metrics` must be integers: a deployed plane refuses the whole otherwise."""

    agent_id: str
    machine_id: str
    metrics: JsonObject
    sidecars: list[JsonObject] = []
    state: str
    reasons: list[str] = []


class ClaimRequest(Request):
    """POST /tasks/claim. `limit` is never 0: deployed planes read 0 as 10."""

    agent_id: str
    machine_id: str
    limit: int
    request_id: str
    wait_sec: int | None = None
    capacity: JsonObject | None = None


class StartReport(Request):
    """POST /tasks/{id}/start."""

    agent_id: str
    attempt_id: str
    process_id: int
    gpu_uuids: list[str] = []
    run_no: int


class RenewRequest(Request):
    """POST /tasks/{id}/lease/renew."""

    agent_id: str
    attempt_id: str
    extend_sec: int


class ProgressReport(Request):
    """POST /tasks/{id}/progress; the message is at most 500 characters."""

    agent_id: str
    attempt_id: str
    percent: float
    message: str


class CompleteReport(Request):
    """POST /tasks/{id}/complete. `exit_code` is 0 only for success; older planes derive success from it."""

    agent_id: str
    attempt_id: str
    exit_code: int
    stdout: str
    stderr: str
    error: str
    status: str
    cause: str
    signal: int | None = None
    started_at: str | None = None
    ended_at: str
    runs: int
    truncated: bool = False
    usage: JsonObject | None = None


class ReleaseReport(Request):
    """POST /tasks/{id}/release: a claimed task goes back unstarted."""

    agent_id: str
    attempt_id: str
    reason: str
