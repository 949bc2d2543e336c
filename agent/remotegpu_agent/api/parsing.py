"""From query strings, path parts and bodies to typed values; what does not fit is INVALID_PARAMETERS with its field."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Final, Literal, TypeVar

from aiohttp import web
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, WithJsonSchema

from remotegpu_schemas import limits
from remotegpu_schemas.api import Message
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.states import TaskState

MessageT = TypeVar("MessageT", bound=Message)

_ID: Final = re.compile(limits.ID_PATTERN)
OFFSET_MAX: Final = 2**53
"""The largest integer that every JSON reader holds exactly."""
_SHOWN_MAX_CHARS: Final = 40


def _split(values: list[str]) -> list[str]:
    """An empty name is no state: a script whose variable is empty must not be shown the tasks of all states."""
    return [part for value in values for part in value.split(",")]


def _check_label(value: str) -> str:
    if not value.partition("=")[0] or "=" not in value:
        raise ValueError("a label filter is NAME=VALUE")
    return value


def _check_directory(value: str) -> str:
    if not value.startswith("/") or "\0" in value or len(value) > limits.PATH_MAX_CHARS:
        raise ValueError(f"must be an absolute path of at most {limits.PATH_MAX_CHARS} characters")
    return value


def _clamp_wait(value: float) -> float:
    return min(value, limits.API_WAIT_MAX_S)


Label = Annotated[str, AfterValidator(_check_label), Field(json_schema_extra={"pattern": "^[^=]+="})]
Limit = Annotated[int, Field(ge=1, le=limits.API_LIST_MAX, description="Entries on this page, at most.")]
Offset = Annotated[int, Field(ge=0, le=OFFSET_MAX, description="Entries in front of this page.")]


class ListQuery(Message):
    """GET /tasks: `state` and `label` may be repeated; `state` also takes a list with commas."""

    state: Annotated[tuple[TaskState, ...], BeforeValidator(_split)] = Field(
        default=(), description="Only tasks in one of these states; may be repeated, or a list with commas."
    )
    label: tuple[Label, ...] = Field(
        default=(),
        max_length=limits.LABELS_MAX_COUNT,
        description="NAME=VALUE: only tasks with this label; may be repeated, and then all of them must fit.",
    )
    limit: Limit = limits.API_LIST_DEFAULT
    offset: Offset = 0

    @property
    def labels(self) -> dict[str, str]:
        """All of them must fit."""
        return {name: value for name, _, value in (label.partition("=") for label in self.label)}


class SubmitQuery(Message):
    """POST /tasks: where the caller is. Where tasks run as their submitter, relative work directories begin there."""

    directory: (
        Annotated[
            str,
            AfterValidator(_check_directory),
            WithJsonSchema({"type": "string", "pattern": r"^/[^\u0000]*$", "maxLength": limits.PATH_MAX_CHARS}),
        ]
        | None
    ) = Field(
        default=None,
        description="Where the caller is, an absolute path. Where tasks run as their submitter, those that name no "
        "directory run there, and a relative one begins there; elsewhere it says nothing.",
    )


class ShowQuery(Message):
    """GET /tasks/{id}: seconds to wait for its end; more than API_WAIT_MAX_S counts as that."""

    wait: Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_clamp_wait)] = Field(
        default=0.0,
        description=f"Seconds to wait for the end; more than {limits.API_WAIT_MAX_S:g} counts as that.",
    )


class LogQuery(Message):
    """GET /tasks/{id}/logs."""

    stream: Literal["stdout", "stderr"] = Field(default="stdout", description="Which of the two.")
    offset: Annotated[int, Field(ge=-OFFSET_MAX, le=OFFSET_MAX)] = Field(
        default=0, description="The first byte; negative: so many before the end."
    )
    limit: Annotated[int, Field(ge=1, le=limits.OUTPUT_READ_MAX_BYTES)] = Field(
        default=limits.OUTPUT_READ_MAX_BYTES, description="Bytes at most. No bound of a stream of events."
    )
    run: Annotated[int, Field(ge=1, le=OFFSET_MAX)] | None = Field(
        default=None, description="The number of the run, from 1; without it the last one."
    )
    follow: bool = Field(default=False, description="Answer as a stream of events until the output ends.")


_LIST_FIELDS: Final = frozenset({"state", "label"})


def parse_query(model: type[MessageT], request: web.Request) -> MessageT:
    """The query string as `model`; a repeated single value counts by its first."""
    query = request.query
    values: Mapping[str, object] = {
        name: query.getall(name) if name in _LIST_FIELDS else query[name]
        for name in model.model_fields
        if name in query
    }
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise invalid(error, "query") from error


async def parse_body(model: type[MessageT], request: web.Request) -> MessageT:
    """The JSON body as `model`, whatever content type it claims: deployed planes are not careful there."""
    try:
        return model.model_validate_json(await request.read())
    except ValidationError as error:
        raise invalid(error, "body") from error


def task_id_of(request: web.Request) -> str:
    """The id (or a prefix of one) in the path: refused here unless it is one that the agent could have made."""
    task_id = request.match_info["task_id"]
    if not _ID.fullmatch(task_id):
        raise Refused(
            Code.INVALID_PARAMETERS,
            f"task id: {task_id[:_SHOWN_MAX_CHARS]!r} is no id; letters, digits and ._:- only, at most "
            f"{limits.ID_MAX_CHARS} characters",
        )
    return task_id


def invalid(error: ValidationError, whole: str) -> Refused:
    """The refusal that names each field that does not fit; the values themselves may be secrets and stay out."""
    problems = [
        f"{'.'.join(map(str, problem['loc'])) or whole}: {problem['msg'].removeprefix('Value error, ')}"
        for problem in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    return Refused(Code.INVALID_PARAMETERS, "; ".join(problems)[: limits.WIRE_MESSAGE_MAX_CHARS])
