"""Makes sentences of pydantic's errors, with the nearest valid key or value. Knows no model and no kind of file."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from remotegpu_schemas.problems import Finding, Path, did_you_mean, dotted, nearest, number, quoted, shown

_CHOICES_LISTED_MAX: Final = 12
_NEAREST_MAX: Final = 200
"""Looking for the nearest key costs a millisecond; a file of nothing but mistakes has 100,000."""


def _in_section(path: Path) -> str:
    return f"in '{dotted(path)}'" if path else ""


@dataclass(frozen=True)
class Wording:
    """How a kind of file speaks. All paths are from the document's top.

    `place` names a mapping ("in task 'report'", or nothing); `name` names a value; `other_keys` are the keys of a
    mapping that exist but are not supported, and `refuse_key` says so; `refuse_value` refuses a value of a known key.
    """

    place: Callable[[Path], str] = _in_section
    name: Callable[[Path], str] = lambda path: f"'{dotted(path)}'"
    other_keys: Callable[[Path], Collection[str]] = lambda _path: ()
    refuse_key: Callable[[Path], str] = lambda path: f"'{dotted(path)}' is not supported by this version"
    refuse_value: Callable[[Path, object], str | None] = lambda _path, _value: None


def explain(error: ValidationError, model: type[BaseModel], wording: Wording) -> list[Finding]:
    """The errors as sentences, in pydantic's order. `model` is what was validated, for the nearest valid keys."""
    details = error.errors(include_url=False)
    return [_finding(detail, model, wording, number <= _NEAREST_MAX) for number, detail in enumerate(details, start=1)]


def sentences(error: ValidationError) -> list[str]:
    """The errors as sentences, for what has no place of its own in what was written."""
    details = error.errors(include_url=False)
    return [_finding(detail, BaseModel, Wording(), False).message for detail in details]


def _finding(detail: Mapping[str, Any], model: type[BaseModel], wording: Wording, seeks_nearest: bool) -> Finding:
    path: Path = tuple(detail["loc"])
    kind: str = detail["type"]
    if kind == "extra_forbidden":
        if path[-1] in wording.other_keys(path[:-1]):
            return Finding(path, wording.refuse_key(path), at_key=True)
        return Finding(path, _unknown_key(path, model, wording, seeks_nearest), at_key=True)
    if kind == "missing":
        place = wording.place(path[:-1])
        return Finding(path[:-1], f"'{path[-1]}' is missing{' ' + place if place else ''}", at_key=True)
    if path and path[-1] == "[key]":
        return Finding(path[:-1], f"{wording.name(path[:-1])}: {_predicate(detail)}", at_key=True)
    refusal = wording.refuse_value(path, detail.get("input"))
    if refusal is not None:
        return Finding(path, refusal)
    if kind == "value_error" and not path:
        return Finding(path, _predicate(detail))
    return Finding(path, f"{wording.name(path) if path else 'the document'} {_predicate(detail)}")


def _unknown_key(path: Path, model: type[BaseModel], wording: Wording, seeks_nearest: bool) -> str:
    key = str(path[-1])
    place = wording.place(path[:-1])
    message = f"unknown key {quoted(key)}{' ' + place if place else ''}"
    if not seeks_nearest:
        return message
    owner = model_at(model, path[:-1])
    choices = list(owner.model_fields) if owner is not None else []
    near = nearest(key, [*choices, *wording.other_keys(path[:-1])]) or _nested(key, owner)
    if near is not None:
        return f"{message}; did you mean '{near}'?"
    if 0 < len(choices) <= _CHOICES_LISTED_MAX:
        return f"{message}; known keys: {', '.join(choices)}"
    return message


def _nested(key: str, owner: type[BaseModel] | None) -> str | None:
    """The key one level deeper: `gpus` in a task is `resources.gpus`."""
    if owner is None:
        return None
    for name in owner.model_fields:
        child = model_at(owner, (name,))
        if child is not None and key in child.model_fields:
            return f"{name}.{key}"
    return None


def model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The model of the mapping that `path` leads to, if that is a model."""
    found: type[BaseModel] | None = model
    for part in path:
        if found is None or not isinstance(part, str) or part not in found.model_fields:
            return None
        found = next(_models_in(found.model_fields[part].annotation), None)
    return found


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif typing.get_origin(annotation) in {typing.Union, types.UnionType, typing.Annotated}:
        for argument in typing.get_args(annotation):
            yield from _models_in(argument)


_TYPES: Final = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping (key: value)",
    "model_type": "a mapping (key: value)",
}


def _predicate(detail: Mapping[str, Any]) -> str:
    """What is wrong, to be put behind the name of the value."""
    kind: str = detail["type"]
    context: Mapping[str, Any] = detail.get("ctx", {})
    value = detail.get("input")
    if kind in _TYPES:
        return f"must be {_TYPES[kind]}, not {shown(value)}{_text_mend(value) if kind == 'string_type' else ''}"
    match kind:
        case "enum" | "literal_error":
            expected = str(context["expected"])
            choices = re.findall(r"'([^']*)'", expected) or [expected]
            near = did_you_mean(value, choices) if isinstance(value, str) else ""
            return f"must be {_one_of(choices)}, not {shown(value)}{near}"
        case "greater_than_equal":
            return f"must be at least {_bound(context['ge'])}, not {number(value)}"
        case "greater_than":
            return f"must be more than {_bound(context['gt'])}, not {number(value)}"
        case "less_than_equal":
            return f"must be at most {_bound(context['le'])}, not {number(value)}"
        case "string_too_long":
            return f"is longer than {context['max_length']} characters"
        case "too_long":
            return f"has more than {context['max_length']} entries"
        case "finite_number":
            return "must be a finite number"
        case "value_error":
            return str(context["error"])
        case _:
            return f"is not valid: {detail['msg']}"


def _bound(value: float) -> str:
    return number(int(value) if value == int(value) else value)


def _text_mend(value: object) -> str:
    if value is None:
        return '; write "" for an empty text'
    return "; put it in quotes" if isinstance(value, int | float) else ""


def _one_of(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
