"""What the agent sends to the control plane. A body that breaks a rule of protocol.md cannot be made."""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from remotegpu_schemas import limits
from remotegpu_schemas.states import Cause, TaskState
from remotegpu_schemas.wire.text import clean_text
from remotegpu_schemas.wire.values import JsonObject


def _message(limit_chars: int) -> BeforeValidator:
    return BeforeValidator(lambda value: clean_text(value[:limit_chars]) if isinstance(value, str) else value)


def _metrics(value: JsonObject) -> JsonObject:
    return {key: _metric(key, item) for key, item in value.items() if not _is_missing(item)}


def _metric(key: str, value: Any) -> Any:
    match value:
        case dict():
            return _metrics(value)
        case list():
            return [_metric(key, item) for item in value if not _is_missing(item)]
        case float() if key.endswith(("_gb", "_mb")) or key in {"index", "temperature_c"}:
            return round(value)
        case _:
            return value


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _without_none(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_none(item) for key, item in value.items() if item is not None}
        case list():
            return [_without_none(item) for item in value]
        case _:
            return value


class Request(BaseModel):
    """A request body; None means "left out"."""

    model_config = ConfigDict(frozen=True)

    def body(self) -> JsonObject:
        """The JSON object to send."""
        body: JsonObject = _without_none(self.model_dump(mode="json"))
        return body


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
    """POST /heartbeat.

    In `metrics`, `*_gb`, `*_mb`, `index` and `temperature_c` are sent as integers (a deployed plane refuses the whole
    heartbeat otherwise), and what could not be had (None, not finite) is left out.
    """

    agent_id: str
    machine_id: str
    metrics: Annotated[JsonObject, AfterValidator(_metrics)]
    sidecars: list[JsonObject] = []
    state: str
    reasons: list[str] = []


class ClaimRequest(Request):
    """POST /tasks/claim. `limit` is never 0: deployed planes read 0 as 10."""

    agent_id: str
    machine_id: str
    limit: Annotated[int, Field(ge=1, le=limits.CLAIM_MAX_TASKS)]
    request_id: str
    wait_sec: int | None = None
    capacity: JsonObject | None = None


class StartReport(Request):
    """POST /tasks/{id}/start. No `process_id`: under way, though its process could not be started yet."""

    agent_id: str
    attempt_id: str
    process_id: int | None = None
    gpu_uuids: list[str] = []
    run_no: int


class RenewRequest(Request):
    """POST /tasks/{id}/lease/renew."""

    agent_id: str
    attempt_id: str
    extend_sec: Annotated[int, Field(ge=1)]


class ProgressReport(Request):
    """POST /tasks/{id}/progress; a message longer than 500 characters is cut."""

    agent_id: str
    attempt_id: str
    percent: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
    message: Annotated[str, _message(limits.PROGRESS_MESSAGE_MAX_CHARS)]


class Artifact(BaseModel):
    """A file that was uploaded for an attempt; `key` names it in the object store."""

    model_config = ConfigDict(frozen=True)

    name: str
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: str
    key: str


class CompleteReport(Request):
    """POST /tasks/{id}/complete. `exit_code` is 0 only for success; older planes derive success from it.

    Some deployed planes read the sentence as `error`, some as `error_msg`; unknown fields are ignored there, so the
    body carries it under both names.
    """

    agent_id: str
    attempt_id: str
    exit_code: int
    stdout: str
    stderr: str
    error: Annotated[str, _message(limits.WIRE_MESSAGE_MAX_CHARS)]
    status: TaskState
    cause: Cause
    signal: int | None = None
    started_at: str | None = None
    ended_at: str
    runs: int
    truncated: bool = False
    artifacts: list[Artifact] | None = None
    usage: JsonObject | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if not self.status.is_final:
            raise ValueError(f"an attempt cannot be completed as {self.status}")
        if (self.exit_code == 0) != (self.status is TaskState.COMPLETED):
            raise ValueError(f"exit code {self.exit_code} does not go with the status {self.status}")
        return self

    def body(self) -> JsonObject:
        """The JSON object to send."""
        return {**super().body(), "error_msg": self.error}


class ReleaseReport(Request):
    """POST /tasks/{id}/release: a claimed task goes back unstarted."""

    agent_id: str
    attempt_id: str
    reason: str


class UploadUrlRequest(Request):
    """POST /tasks/{id}/result/upload-url: asks where one artifact goes."""

    agent_id: str
    attempt_id: str
    name: Annotated[str, Field(min_length=1, max_length=limits.UPLOAD_FIELD_MAX_CHARS)]
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
