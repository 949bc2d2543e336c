"""The bodies that agents and operators send, checked. Unknown fields are ignored: peers may be older or newer."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from aiohttp import web
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from control_plane.settings import LEASE_MAX_S, LIST_MAX
from control_plane.store.distribution import Destination, Mode
from remotegpu_schemas import limits
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.states import Cause
from remotegpu_schemas.wire import JsonObject, parse_time

M = TypeVar("M", bound=BaseModel)


def _storable(value: str) -> str:
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("must not contain half a surrogate pair") from None
    return value


def _inline(value: str) -> str:
    size = len(value.encode("utf-8", "surrogatepass"))
    if size > limits.INLINE_OUTPUT_MAX_BYTES:
        raise ValueError(f"is {size} bytes long; at most {limits.INLINE_OUTPUT_MAX_BYTES} are taken")
    return _storable(value)


def _time(value: str) -> str:
    if parse_time(value) is None:
        raise ValueError("must be a time as in RFC 3339, such as 2026-02-05T12:00:00Z")
    return value


Id = Annotated[str, StringConstraints(pattern=rf"^{limits.ID_PATTERN}$")]
Text = Annotated[str, AfterValidator(_storable)]
_Output = Annotated[str, AfterValidator(_inline)]
LabelText = Annotated[Text, Field(max_length=limits.LABEL_MAX_CHARS)]
Time = Annotated[str, AfterValidator(_time)]


class Body(BaseModel):
    """A request's body: types as they are written, unknown fields ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class OperatorBody(BaseModel):
    """What a person writes: types as they are written, unknown fields refused, since they are misspelt ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class AgentBody(Body):
    """What calls about the host begin with."""

    agent_id: Id
    machine_id: Id


class ClaimBody(AgentBody):
    """POST /tasks/claim."""

    limit: Annotated[int, Field(ge=1)]
    request_id: Id
    wait_sec: Annotated[float, Field(ge=0)] = 0
    capacity: dict[str, Any] = {}

    @property
    def count(self) -> int:
        """How many tasks the agent can take."""
        slots = self.capacity.get("slots")
        return min(self.limit, slots if isinstance(slots, int) else self.limit, limits.CLAIM_MAX_TASKS)


class AttemptBody(Body):
    """What every call about an attempt begins with."""

    agent_id: Id
    attempt_id: Id


class StartBody(AttemptBody):
    """POST /tasks/{id}/start."""

    process_id: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    gpu_uuids: list[Text] = []
    run_no: Annotated[int, Field(ge=1, lt=2**31)] = 1


class RenewBody(AttemptBody):
    """POST /tasks/{id}/lease/renew."""

    extend_sec: Annotated[int, Field(ge=1, le=LEASE_MAX_S)]


class ProgressBody(AttemptBody):
    """POST /tasks/{id}/progress."""

    percent: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
    message: Annotated[Text, Field(max_length=limits.PROGRESS_MESSAGE_MAX_CHARS)]


class ReleaseBody(AttemptBody):
    """POST /tasks/{id}/release."""

    reason: Annotated[Text, Field(max_length=limits.WIRE_MESSAGE_MAX_CHARS)]


class PlainCompletion(AttemptBody):
    """POST /tasks/{id}/complete as the oldest planes know it."""

    exit_code: Annotated[int, Field(ge=-(2**31), lt=2**31)]
    stdout: _Output = ""
    stderr: _Output = ""
    error: Text = ""


class Completion(PlainCompletion):
    """POST /tasks/{id}/complete, with its additions."""

    status: Literal["completed", "failed", "cancelled"] | None = None
    cause: Annotated[Cause, Field(strict=False)] | None = None
    signal: Annotated[int, Field(ge=1, le=64)] | None = None
    started_at: Time | None = None
    ended_at: Time | None = None
    runs: Annotated[int, Field(ge=0)] = 1
    truncated: bool = False
    artifacts: list[dict[str, Any]] = []
    usage: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.status is not None and (self.status == "completed") != (self.exit_code == 0):
            raise ValueError(f"exit_code: {self.exit_code} contradicts status {self.status}: 0 is for success only")
        return self


class MachineBody(Body):
    """POST /machines."""

    machine_id: Id | None = None
    name: Annotated[Text, Field(max_length=limits.NAME_MAX_CHARS)] = ""


class DestinationBody(OperatorBody):
    """`to` of what is submitted."""

    mode: Annotated[Mode, Field(strict=False)] = Mode.ANY
    labels: Annotated[dict[LabelText, LabelText], Field(max_length=limits.LABELS_MAX_COUNT)] = {}
    machine_ids: Annotated[list[Id], Field(max_length=LIST_MAX)] = []

    @property
    def destination(self) -> Destination:
        """As the store takes it."""
        return Destination(self.mode, self.labels, tuple(dict.fromkeys(self.machine_ids)))


class SubmissionBody(OperatorBody):
    """POST /tasks with a destination."""

    tasks: list[Any]
    to: DestinationBody = DestinationBody()


def usable_labels(value: object) -> dict[str, str]:
    """What a registration says about labels. What is none is left out: an agent is never refused for it."""
    items = value.items() if isinstance(value, dict) else ()
    found = {name: text for name, text in items if _is_label(name) and _is_label(text)}
    return dict(list(found.items())[: limits.LABELS_MAX_COUNT])


def _is_label(text: object) -> bool:
    try:
        return isinstance(text, str) and len(_storable(text)) <= limits.LABEL_MAX_CHARS
    except ValueError:
        return False


def parse(model: type[M], body: JsonObject) -> M:
    """The body as this model. Raises Refused (30005) that names the fields."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise Refused(Code.INVALID_PARAMETERS, _readable(error)) from None


async def read_json(request: web.Request) -> object:
    """The request's JSON. Raises Refused (30005)."""
    try:
        return json.loads(await request.read())
    except (ValueError, RecursionError):
        raise Refused(Code.INVALID_PARAMETERS, "the body is not JSON") from None


async def read_object(request: web.Request) -> JsonObject:
    """The request's JSON object. Raises Refused (30005)."""
    body = await read_json(request)
    if not isinstance(body, dict):
        raise Refused(Code.INVALID_PARAMETERS, f"the body must be a JSON object, not {type(body).__name__}")
    return body


def _readable(error: ValidationError) -> str:
    parts: list[str] = []
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        parts.append(f"{where}: {message}" if where else message)
    return "; ".join(parts)[: limits.WIRE_MESSAGE_MAX_CHARS]
