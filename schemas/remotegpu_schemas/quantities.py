"""Quantities as people write them: durations. Knows nothing of YAML, tasks or settings."""

from __future__ import annotations

import math
import re
from typing import Annotated, Final

from pydantic import BeforeValidator, WithJsonSchema

from remotegpu_schemas import limits

_UNITS_S: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION: Final = re.compile(r"(0|[1-9][0-9]{0,11})(\.[0-9]{1,9})?(|s|m|h|d)", re.ASCII)
_HOW: Final = "write seconds, or a number with s, m, h or d, such as 90s, 10m, 24h, 7d"
_SHOWN_MAX_CHARS: Final = 40


def parse_duration(value: object) -> float:
    """Seconds, from a number or from text such as `90s`, `1.5h`, `7d`; text without a unit is seconds.

    Between 0 and `limits.TIMEOUT_MAX_S`. Raises ValueError with a predicate for people: "must be a duration, ...".
    """
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        if match is None:
            raise ValueError(f"must be a duration, not {value[:_SHOWN_MAX_CHARS]!r}: {_HOW}")
        seconds = float(match[1] + (match[2] or "")) * _UNITS_S[match[3]]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = _as_float(value)
    else:
        raise ValueError(f"must be a duration: {_HOW}")  # noqa: TRY004 - pydantic reports ValueError only
    if not math.isfinite(seconds):
        raise ValueError("must be a finite duration; 0 means none")
    if seconds < 0:
        raise ValueError(f"must not be negative: {_HOW}")
    if seconds > limits.TIMEOUT_MAX_S:
        raise ValueError(f"must be at most {format_duration(limits.TIMEOUT_MAX_S)}")
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads back as the same number (to the nanosecond): `90s`, `1.5s`."""
    for unit in ("d", "h", "m"):
        count = seconds / _UNITS_S[unit]
        if count >= 1 and count == int(count):
            return f"{int(count)}{unit}"
    return f"{seconds:.9f}".rstrip("0").rstrip(".") + "s"


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


_JSON_SCHEMA: Final = {
    "description": "Seconds, or a number with s, m, h or d: `90s`, `10m`, `24h`, `7d`; at most 366 days.",
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": limits.TIMEOUT_MAX_S},
        # Whatever fits here is within the bound too: a schema cannot compute.
        {
            "type": "string",
            "pattern": r"^((0|[1-9][0-9]{0,6})(\.[0-9]{1,9})?s?|(0|[1-9][0-9]{0,4})(\.[0-9]{1,9})?m"
            r"|(0|[1-9][0-9]{0,2}|[1-7][0-9]{3})(\.[0-9]{1,9})?h|(0|[1-9][0-9]?|[12][0-9]{2}|3[0-5][0-9])(\.[0-9]{1,9})?d)$",
        },
    ],
}

Duration = Annotated[float, BeforeValidator(parse_duration), WithJsonSchema(_JSON_SCHEMA)]
"""A field in seconds that is written as a duration."""
