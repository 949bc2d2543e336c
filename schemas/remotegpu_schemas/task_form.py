"""The form of a task as people and peers write it: newer and older keys side by side, durations as text.

The task file and the control plane's claims both end here, and here they become a `Task`. Knows nothing of YAML and
of places in a file.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.config import JsonDict

from remotegpu_schemas import limits
from remotegpu_schemas.forms import NO_NUL_PATTERN, Form, Text, admit_null, no_nul, scalar_schema, scalar_text
from remotegpu_schemas.problems import Finding
from remotegpu_schemas.quantities import Duration
from remotegpu_schemas.task import (
    SIGNALS_WITHOUT_HANDLER,
    Argument,
    Backoff,
    EnvironmentName,
    LabelText,
    Priority,
    Resources,
    RetryOn,
    RetryPolicy,
    Task,
    TaskId,
    TaskType,
    Warn,
)

# --- values --------------------------------------------------------------------------------------------------------


def _signal_number(value: object) -> object:
    how = "write a name such as SIGINT, or a number from 1 to 64"
    if isinstance(value, int) and not isinstance(value, bool):
        if 1 <= value <= 64:
            return value
    elif isinstance(value, str):
        name = value.strip().upper()
        found = getattr(signal, name if name.startswith("SIG") else f"SIG{name}", None)
        if isinstance(found, signal.Signals):
            return int(found)
        if re.fullmatch(r"[1-9][0-9]?", value, re.ASCII) and int(value) <= 64:
            return int(value)
    raise ValueError(f"must be a signal: {how}")


def _audible_signal_number(value: object) -> object:
    number = _signal_number(value)
    if number in SIGNALS_WITHOUT_HANDLER:
        raise ValueError("must be a signal that a task can hear, such as SIGUSR1; SIGKILL and SIGSTOP are none")
    return number


def _duration_above_zero(value: float) -> float:
    if not value > 0:
        raise ValueError("must be more than 0, such as 5m")
    return value


def _identifier(value: str) -> str:
    if not re.fullmatch(limits.ID_PATTERN, value):
        raise ValueError(
            f"must begin with a letter or digit and have only letters, digits and . _ : - (at most "
            f"{limits.ID_MAX_CHARS} characters)"
        )
    return value


_ARGUMENT_MAX_CHARS = limits.ARGUMENT_MAX_BYTES - 1
_KEY_MAX_CHARS = 1000
"""With its quotes a key that stands without `?` has at most 1024 (YAML 1.2.2, section 7.4.2)."""
_VISIBLE_PATTERN = r"^[^\u0000]*[^\s\u0000-\u001f\u0085\ufeff][^\u0000]*$"


def _signal_schema(*inaudible: int) -> JsonDict:
    """The names that are usual; the form takes them in lower case too."""
    names = [name for name, number in signal.Signals.__members__.items() if number not in inaudible]
    numbers = [number for number in range(1, 65) if number not in inaudible]
    return {"enum": [*names, *(name.removeprefix("SIG") for name in names), *numbers, *map(str, numbers)]}


def _text_schema(pattern: str = NO_NUL_PATTERN) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "maxLength": _ARGUMENT_MAX_CHARS})


Name = Annotated[
    Text,
    Field(max_length=limits.NAME_MAX_CHARS),
    WithJsonSchema(scalar_schema(pattern=NO_NUL_PATTERN, maxLength=limits.NAME_MAX_CHARS)),
]
_Id = Annotated[
    str,
    BeforeValidator(scalar_text),
    AfterValidator(_identifier),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": f"^{limits.ID_PATTERN}$"},
                {"type": "number", "minimum": 0, "maximum": 10**15},  # beyond it text has an exponent
                {"type": "boolean"},
            ]
        }
    ),
]
_Word = Annotated[
    Argument,
    BeforeValidator(scalar_text),
    WithJsonSchema(scalar_schema(pattern=NO_NUL_PATTERN, maxLength=_ARGUMENT_MAX_CHARS)),
]
_LabelName = Annotated[
    LabelText,
    WithJsonSchema({"type": "string", "pattern": NO_NUL_PATTERN, "maxLength": limits.LABEL_MAX_CHARS}),
]
_LabelText = Annotated[
    LabelText,
    BeforeValidator(scalar_text),
    WithJsonSchema(scalar_schema(pattern=NO_NUL_PATTERN, maxLength=limits.LABEL_MAX_CHARS)),
]
Labels = Annotated[dict[_LabelName, _LabelText], Field(max_length=limits.LABELS_MAX_COUNT)]
_EnvironmentName = Annotated[
    EnvironmentName, WithJsonSchema({"type": "string", "pattern": r"^[^=\u0000]+$", "maxLength": _KEY_MAX_CHARS})
]
_Command = Annotated[Argument, _text_schema(_VISIBLE_PATTERN)]
_Path = Annotated[Argument, _text_schema()]
_Script = Annotated[str, AfterValidator(no_nul), WithJsonSchema({"type": "string", "pattern": _VISIBLE_PATTERN})]
_Signal = Annotated[int, BeforeValidator(_signal_number), WithJsonSchema(_signal_schema())]
_NO_TIME: JsonDict = {"anyOf": [{"const": 0}, {"type": "string", "pattern": r"^0(\.0+)?[smhd]?$"}]}
_AudibleSignal = Annotated[
    int, BeforeValidator(_audible_signal_number), WithJsonSchema(_signal_schema(*SIGNALS_WITHOUT_HANDLER))
]
_Retries = Annotated[int, Field(ge=0, le=limits.RETRIES_MAX)]
_Type = Annotated[
    TaskType,
    Field(strict=False),
    # What `container` means is known; a task file with it is refused by this version.
    WithJsonSchema({"enum": [str(kind) for kind in TaskType if kind is not TaskType.CONTAINER]}),
]
_Backoff = Annotated[Backoff, Field(strict=False)]
_RetryOn = Annotated[RetryOn, Field(strict=False)]


class ResourcesForm(Form):
    """`resources:`; what is left out is zero."""

    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    cpus: Annotated[float, Field(ge=0, le=4096, allow_inf_nan=False)] = 0.0
    memory_gb: Annotated[float, Field(ge=0, le=65536, allow_inf_nan=False)] = 0.0


class RetryForm(Form):
    """`retry:`; durations are seconds."""

    max: _Retries | None = None
    delay: Duration | None = None
    backoff: _Backoff | None = None
    max_delay: Duration | None = None
    on: Annotated[list[_RetryOn], Field(json_schema_extra={"minItems": 1})] | None = None
    exit_codes: list[Annotated[int, Field(ge=1, le=255)]] | None = None


class WarnForm(Form):
    """`warn:`; without a signal it is SIGUSR1."""

    signal: _AudibleSignal = int(signal.SIGUSR1)
    before: Annotated[Duration, AfterValidator(_duration_above_zero), Field(json_schema_extra={"not": _NO_TIME})]


class TargetsForm(Form):
    """`targets:`, the machines that a task is meant for; the agent refuses what is not meant for it."""

    machine_ids: list[Name] = Field(default=[])
    ips: list[Name] = Field(default=[])


def _need_one_thing_to_run(schema: JsonDict, model: type[BaseModel]) -> None:
    """For the JSON Schema: a task file that breaks this is refused."""
    admit_null(schema, model)
    text: JsonDict = {"type": "string"}
    nothing: JsonDict = {"type": "null"}
    schema["oneOf"] = [
        {"required": ["command"], "properties": {"command": text, "script": nothing, "interpreter": nothing}},
        {"required": ["script"], "properties": {"script": text, "command": nothing}},
    ]


class TaskForm(Form):
    """A task with the keys of the file, newer and older ones side by side. Durations are seconds.

    The lease keys matter for claimed tasks only: a local task has no lease.
    """

    model_config = ConfigDict(json_schema_extra=_need_one_thing_to_run)

    id: _Id | None = None
    name: Name | None = None
    type: _Type | None = None
    command: _Command | None = None
    args: Annotated[list[_Word], Field(max_length=limits.ARGUMENTS_MAX_COUNT)] | None = None
    script: _Script | None = None
    interpreter: _Path | None = None
    workdir: _Path | None = None
    env: dict[_EnvironmentName, _Word] = Field(default={}, max_length=limits.ENVIRONMENT_MAX_COUNT)
    resources: ResourcesForm | None = None
    timeout: Duration | None = None
    grace_period: Duration | None = None
    priority: Priority | None = None
    stop_signal: _Signal | None = None
    warn: WarnForm | None = None
    retry: RetryForm | None = None
    labels: Labels = Field(default={})
    group_id: _Id | None = None
    parent_id: _Id | None = None
    machine_id: Name | None = None
    targets: TargetsForm | None = None
    max_retries: _Retries | None = None
    retry_delay: Duration | None = None
    grace_period_sec: Duration | None = None
    lease_ttl_sec: Duration | None = None
    renew_interval_sec: Duration | None = None
    heartbeat_interval_sec: Duration | None = None


# --- a task --------------------------------------------------------------------------------------------------------


def task_from_mapping(raw: Mapping[str, object], *, ignore_unknown: bool) -> TaskForm:
    """A task from plain data. With `ignore_unknown` as a peer sent it: other keys are ignored, numbers may be text.

    Raises pydantic.ValidationError.
    """
    if ignore_unknown:
        return TaskForm.model_validate(raw, extra="ignore", strict=False)
    return TaskForm.model_validate(raw)


def to_task(form: TaskForm, task_id: TaskId, defaults: TaskForm | None = None) -> Task:
    """The task as the queue keeps it; what the form leaves out comes from `defaults`, labels and env key by key.

    Raises ValueError (pydantic.ValidationError is one) when the form has nothing to run or contradicts itself.
    """
    contradiction = next(contradictions(form), None)
    if contradiction is not None:
        raise ValueError(contradiction.message)
    if defaults is not None:
        form = _with_defaults(form, defaults)
    given: dict[str, Any] = {
        "name": form.name,
        "type": form.type,
        "resources": Resources(**form.resources.model_dump()) if form.resources is not None else None,
        "timeout_s": form.timeout,
        "priority": form.priority,
        "stop_signal": form.stop_signal,
        "warn": Warn(signal=form.warn.signal, before_s=form.warn.before) if form.warn is not None else None,
    }
    return Task(
        id=task_id,
        command=form.command,
        args=None if form.args is None else tuple(form.args),
        script=form.script,
        interpreter=form.interpreter,
        workdir=form.workdir,
        env=form.env,
        grace_period_s=_first(form.grace_period, form.grace_period_sec),
        retry=_retry_policy(form),
        labels=form.labels,
        group_id=form.group_id,
        parent_id=form.parent_id,
        **{name: value for name, value in given.items() if value is not None},
    )


def _first(newer: float | None, older: float | None) -> float | None:
    return older if newer is None else newer


def _retry_policy(form: TaskForm) -> RetryPolicy:
    retry = form.retry or RetryForm()
    given: dict[str, Any] = {
        "max": retry.max if retry.max is not None else form.max_retries,
        "delay_s": _first(retry.delay, form.retry_delay),
        "backoff": retry.backoff,
        "max_delay_s": retry.max_delay,
        "on": None if retry.on is None else frozenset(retry.on),
        "exit_codes": None if retry.exit_codes is None else frozenset(retry.exit_codes),
    }
    return RetryPolicy(**{name: value for name, value in given.items() if value is not None})


def _with_defaults(form: TaskForm, defaults: TaskForm) -> TaskForm:
    changes: dict[str, Any] = {
        name: getattr(defaults, name)
        for name in TaskForm.model_fields
        if getattr(form, name) is None and getattr(defaults, name) is not None
    }
    changes["env"] = {**defaults.env, **form.env}
    changes["labels"] = {**defaults.labels, **form.labels}
    return form.model_copy(update=changes)


def contradictions(form: TaskForm) -> Iterator[Finding]:
    """Old and new forms of one thing with different values, at the older key."""
    retry = form.retry or RetryForm()
    pairs = (
        ("max_retries", form.max_retries, "retry.max", retry.max),
        ("retry_delay", form.retry_delay, "retry.delay", retry.delay),
        ("grace_period_sec", form.grace_period_sec, "grace_period", form.grace_period),
    )
    for old, old_value, new, new_value in pairs:
        if old_value is not None and new_value is not None and old_value != new_value:
            both = f"'{old}' is {_seen(old_value)} and '{new}' is {_seen(new_value)}"
            yield Finding((old,), f"{both}: one thing, two values; keep one", True)


def _seen(value: float) -> str:
    """A number without loss: two that differ must not look alike."""
    return str(int(value)) if value == int(value) else str(value)
