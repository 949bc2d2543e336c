"""What every part of the wire shares: JSON objects, and ids as peers write them."""

from __future__ import annotations

import re
from typing import Any, Final, TypeAlias

from remotegpu_schemas import limits

JsonObject: TypeAlias = dict[str, Any]

_ID: Final = re.compile(limits.ID_PATTERN, re.ASCII)


def id_of(value: object) -> str | None:
    """An id that may name a directory and a row, or None; peers with numeric ids send a positive integer."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**limits.ID_MAX_CHARS:
        value = str(value)
    return value if isinstance(value, str) and _ID.fullmatch(value) else None
