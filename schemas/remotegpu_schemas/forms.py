"""The base of everything that a person fills in: task files and the config; and what text may hold. Knows neither."""

from __future__ import annotations

import re
import typing
from typing import Annotated, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict

_SURROGATE: Final = re.compile("[\ud800-\udfff]")


def admit_null(schema: JsonDict, model: type[BaseModel]) -> None:
    """For the JSON Schema of a form: what may be left out may be null as well, and other keys are no keys of a map."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return
    for name, about in properties.items():
        field = model.model_fields[name]
        if isinstance(about, dict) and "patternProperties" in about:
            about["additionalProperties"] = False
        if not field.is_required() and type(None) not in typing.get_args(field.annotation):
            properties[name] = {"anyOf": [about, {"type": "null"}]}


class Form(BaseModel):
    """A mapping as a person writes it: values have the type that they look like, and unknown keys are refused.

    Null means "not given" wherever it is no value of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, json_schema_extra=admit_null)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        if not isinstance(value, dict) or None not in value.values():
            return value
        return {key: item for key, item in value.items() if item is not None or not cls._drops_null(key)}

    @classmethod
    def _drops_null(cls, key: object) -> bool:
        field = cls.model_fields.get(key) if isinstance(key, str) else None
        return field is not None and type(None) not in typing.get_args(field.annotation)


def scalar_text(value: object) -> object:
    """Numbers and booleans where text is meant; loaders of files hand numbers over as they were written."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case _:
            return value


def no_nul(value: str) -> str:
    """Refuse what no argument, name or path can hold: NUL, and what UTF-8 cannot write. Raises ValueError."""
    if "\0" in value:
        raise ValueError("must not contain a NUL character")
    if _SURROGATE.search(value):
        raise ValueError("must not contain half of a surrogate pair, which is no character")
    return value


NO_NUL_PATTERN: Final = r"^[^\u0000]*$"


def scalar_schema(**bounds: str | int) -> JsonDict:
    """The JSON Schema of what `scalar_text` takes; the bounds are those of text."""
    return {"anyOf": [{"type": "string", **bounds}, {"type": ["number", "boolean"]}]}


Text = Annotated[
    str,
    BeforeValidator(scalar_text),
    AfterValidator(no_nul),
    WithJsonSchema(scalar_schema(pattern=NO_NUL_PATTERN)),
]
"""Text that may look like a number or a boolean."""
