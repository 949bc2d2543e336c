"""Templates: typed variables, and a task or a group whose texts name them. Pure: knows no database and no HTTP.

Values go into names, paths, single arguments, environment values and labels (taskfile.md). In a shell string or a
script they would be code: refused there, and everywhere else.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Self, TypeAlias

from pydantic import Field, StringConstraints, model_validator

from control_plane.requests import OperatorBody, Text
from control_plane.settings import TEMPLATE_OPTIONS_MAX, TEMPLATE_VALUE_MAX_CHARS, TEMPLATE_VARIABLES_MAX
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.forms import no_nul
from remotegpu_schemas.problems import did_you_mean, shown
from remotegpu_schemas.wire import JsonObject

Value: TypeAlias = str | int | bool
_NAME: Final = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
_REFERENCE: Final = re.compile(r"\{\{\s*(?:vars\.)?([^{}\s]*)\s*\}\}")
_WHOLE_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,19}", re.ASCII)
_BOOLEANS: Final[Mapping[str, bool]] = {"true": True, "false": False}
_INT64: Final = 2**63
_SUBSTITUTED: Final = frozenset({"name", "workdir", "args", "env", "labels"})
"""Keys of a task; `command` too, where it is a program and no shell string."""
_ValueText = Annotated[Text, Field(max_length=TEMPLATE_VALUE_MAX_CHARS)]


class Kind(enum.StrEnum):
    """What values a variable takes."""

    STRING = "string"
    INT = "int"
    BOOL = "bool"
    SELECT = "select"


class Problem(str):
    """Why something is no value."""

    __slots__ = ()


class Variable(OperatorBody):
    """One variable. It is required, or it has a default."""

    name: Annotated[str, StringConstraints(pattern=rf"^{_NAME}$")]
    type: Annotated[Kind, Field(strict=False)] = Kind.STRING
    required: bool = False
    default: _ValueText | bool | int | None = None
    options: list[_ValueText] = Field(default=[], max_length=TEMPLATE_OPTIONS_MAX)
    description: _ValueText = ""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if (self.type is Kind.SELECT) != bool(self.options):
            raise ValueError(f"variable '{self.name}': options belong to type select, and to no other")
        if self.required == (self.default is not None):
            which = "required with a default" if self.required else "neither required nor has a default"
            raise ValueError(f"variable '{self.name}' is {which}; it needs one of the two")
        if self.default is not None and isinstance(reason := self.read(self.default), Problem):
            raise ValueError(f"variable '{self.name}': default: {reason}")
        return self

    def read(self, given: object) -> Value | Problem:
        """The value of the variable's type; numbers and booleans may also be written as text."""
        match self.type:
            case Kind.INT:
                return _whole_number(given)
            case Kind.BOOL:
                return _boolean(given)
            case Kind.STRING:
                return _text(given)
            case Kind.SELECT:
                if isinstance(given, str) and given in self.options:
                    return given
                near = did_you_mean(given, self.options) if isinstance(given, str) else ""
                return Problem(f"must be one of {', '.join(self.options)}, not {shown(given)}{near}")

    @property
    def sample(self) -> Value:
        """A value that it takes, to try the template with."""
        if self.default is not None:
            return self.default
        match self.type:
            case Kind.INT:
                return 1
            case Kind.BOOL:
                return True
            case Kind.STRING:
                return "x"
            case Kind.SELECT:
                return self.options[0]


class TemplateBody(OperatorBody):
    """A template as it is stored: its variables, and either a task or a group."""

    description: _ValueText = ""
    variables: list[Variable] = Field(default=[], max_length=TEMPLATE_VARIABLES_MAX)
    task: dict[str, Any] | None = None
    group: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_one_subject(self) -> Self:
        if (self.task is None) == (self.group is None):
            raise ValueError("a template has either a task or a group")
        names = [variable.name for variable in self.variables]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"variable '{twice}' stands there twice")
        return self

    @property
    def samples(self) -> dict[str, Value]:
        """A value for each variable, to try the template with."""
        return {variable.name: variable.sample for variable in self.variables}


def read_values(variables: Sequence[Variable], given: Mapping[str, object]) -> dict[str, Value]:
    """The value of each variable. Raises Refused (30005) that names every variable with which something is wrong."""
    names = [variable.name for variable in variables]
    problems = [
        f"variable '{name[:64]}' is none of this template's{did_you_mean(name, names)}"
        for name in given
        if name not in names
    ]
    values: dict[str, Value] = {}
    for variable in variables:
        told = given.get(variable.name)
        if told is None and variable.default is None:
            problems.append(f"variable '{variable.name}' is required")
            continue
        value = variable.read(variable.default if told is None else told)
        if isinstance(value, Problem):
            problems.append(f"variable '{variable.name}' {value}")
        else:
            values[variable.name] = value
    if problems:
        raise Refused(Code.INVALID_PARAMETERS, "; ".join(problems))
    return values


def fill_task(task: Mapping[str, Any], values: Mapping[str, Value], where: str) -> JsonObject:
    """The task with values in place of variables. Raises Refused (30005) for a name that is none, or a wrong place."""
    texts = {name: _as_text(value) for name, value in values.items()}
    takes = _SUBSTITUTED | ({"command"} if task.get("args") is not None else frozenset())
    filled: JsonObject = {}
    for key, value in task.items():
        place = f"{where}.{key}"
        if key in takes:
            filled[key] = _mapped(value, place, lambda text, at: _substituted(text, texts, at))
        else:
            filled[key] = _mapped(value, place, _without_reference)
    return filled


def fill_group(group: Mapping[str, Any], values: Mapping[str, Value], where: str) -> JsonObject:
    """The group with values in its name, its tasks and their defaults. Raises Refused (30005)."""
    texts = {name: _as_text(value) for name, value in values.items()}
    filled: JsonObject = {}
    for key, value in group.items():
        place = f"{where}.{key}"
        if key == "tasks" and isinstance(value, list):
            filled[key] = [
                fill_task(task, values, f"{place}[{index}]") if isinstance(task, dict) else task
                for index, task in enumerate(value)
            ]
        elif key == "defaults" and isinstance(value, dict):
            filled[key] = fill_task(value, values, place)
        elif key == "name" and isinstance(value, str):
            filled[key] = _substituted(value, texts, place)
        else:
            filled[key] = _mapped(value, place, _without_reference)
    return filled


def _mapped(value: Any, place: str, change: Callable[[str, str], str]) -> Any:
    """Every text in it changed; keys of mappings are left as they are."""
    match value:
        case str():
            return change(value, place)
        case list():
            return [_mapped(item, f"{place}[{index}]", change) for index, item in enumerate(value)]
        case dict():
            return {key: _mapped(item, f"{place}.{key}", change) for key, item in value.items()}
        case _:
            return value


def _substituted(text: str, texts: Mapping[str, str], place: str) -> str:
    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        if name not in texts:
            near = did_you_mean(name, list(texts))
            raise Refused(Code.INVALID_PARAMETERS, f"{place}: {match[0][:80]} is no variable of this template{near}")
        return texts[name]

    return _REFERENCE.sub(value_of, text)


def _without_reference(text: str, place: str) -> str:
    found = _REFERENCE.search(text)
    if found is not None:
        raise Refused(
            Code.INVALID_PARAMETERS,
            f"{place}: {found[0][:80]} cannot stand here; variables go into name, workdir, args, env and labels, and "
            "into a command that has args: hand the value to a shell string or a script in env",
        )
    return text


def _whole_number(given: object) -> Value | Problem:
    number = int(given) if isinstance(given, str) and _WHOLE_NUMBER.fullmatch(given) else given
    if isinstance(number, bool) or not isinstance(number, int) or not -_INT64 <= number < _INT64:
        return Problem(f"must be a whole number, not {shown(given)}")
    return number


def _boolean(given: object) -> Value | Problem:
    value = _BOOLEANS.get(given) if isinstance(given, str) else given
    return value if isinstance(value, bool) else Problem(f"must be true or false, not {shown(given)}")


def _text(given: object) -> Value | Problem:
    if not isinstance(given, str):
        return Problem(f"must be text, not {shown(given)}")
    try:
        no_nul(given)
    except ValueError as error:
        return Problem(str(error))
    if len(given) > TEMPLATE_VALUE_MAX_CHARS:
        return Problem(f"is {len(given)} characters long; at most {TEMPLATE_VALUE_MAX_CHARS} are taken")
    return given


def _as_text(value: Value) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case _:
            return str(value)
