"""The named statements of `sql/queries.sql`."""

from __future__ import annotations

import re
from importlib import resources
from types import MappingProxyType
from typing import Final

_NAME: Final = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def parse_queries(text: str) -> dict[str, str]:
    """Split a script into its named statements. Raises ValueError for a name given twice."""
    parts = _NAME.split(text)
    names, bodies = parts[1::2], parts[2::2]
    if len(set(names)) != len(names):
        raise ValueError("a query name is given twice")
    return {name: body.strip() for name, body in zip(names, bodies, strict=True)}


SQL: Final = MappingProxyType(
    parse_queries((resources.files("remotegpu_queue") / "sql" / "queries.sql").read_text("utf-8"))
)
