"""What verbs print: tables and records for people, JSON for programs. Results on standard output, nothing else.

On a terminal rich draws; piped, or with --no-color, the same columns come aligned and plain.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from remotegpu_agent.cli.context import Globals

STATE_COLOURS = {
    "running": "cyan",
    "completed": "green",
    "failed": "red",
    "cancelled": "yellow",
    "suspended": "magenta",
    "preempted": "magenta",
    "ok": "green",
    "warning": "yellow",
    "problem": "red",
    "ready": "green",
    "degraded": "yellow",
    "draining": "yellow",
}


@dataclass(frozen=True)
class Column:
    """A heading; `is_wide` columns take what room is left on a terminal."""

    title: str
    is_right: bool = False
    is_wide: bool = False


def print_json(value: object) -> None:
    """One JSON document; in escapes where standard output is not UTF-8, as JSON must be (RFC 8259, 8.1)."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, indent=2, ensure_ascii=not is_utf8))


def is_fancy(options: Globals) -> bool:
    """Whether colours and boxes are welcome (https://no-color.org)."""
    if options.is_plain or options.environ.get("NO_COLOR") or options.environ.get("TERM") == "dumb":
        return False
    return sys.stdout.isatty()


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], options: Globals) -> None:
    """Rows under headings; control characters in the cells do not reach the terminal."""
    cells = [[clean(cell) for cell in row] for row in rows]
    if is_fancy(options):
        _print_rich(columns, cells)
        return
    table = [[column.title.upper() for column in columns], *cells]
    widths = [max(_width(row[index]) for row in table) for index in range(len(columns))]
    for row in table:
        print("  ".join(_pad(cell, widths[index], columns[index]) for index, cell in enumerate(row)).rstrip())


def print_record(pairs: Sequence[tuple[str, str]], options: Globals) -> None:
    """`name  value` lines; values of several lines are indented under their first."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        lines = [clean(line) for line in value.splitlines()] or [""]
        coloured = [_coloured(line) for line in lines] if is_fancy(options) else lines
        print(f"{name:<{width}}  {coloured[0]}".rstrip())
        for line in coloured[1:]:
            print(f"{'':<{width}}  {line}".rstrip())


def clean(text: str) -> str:
    """The text without what a terminal would obey."""
    return "".join(char if char.isprintable() else " " if char in "\t\n\r" else "\ufffd" for char in text)


def age(moment: str | None, until: str | None = None) -> str:
    """How long ago, or how long until another moment: `42s`, `3m05s`, `2h10m`, `5d03h`; empty for none."""
    start = parse_time(moment)
    if start is None:
        return ""
    end = parse_time(until) or datetime.now(UTC)
    return span(max(0.0, (end - start).total_seconds()))


def span(seconds: float) -> str:
    """A span of time in its two largest units."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def local_time(moment: str | None) -> str:
    """A moment in the reader's time zone; empty for none."""
    parsed = parse_time(moment)
    return parsed.astimezone().strftime("%Y-%m-%d %H:%M:%S") if parsed is not None else ""


def parse_time(moment: str | None) -> datetime | None:
    """RFC 3339, or None for what is none."""
    if not moment:
        return None
    try:
        parsed = datetime.fromisoformat(moment)
    except ValueError:
        return None
    return parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)


def _print_rich(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.is_right else "left",
            no_wrap=not column.is_wide,
            overflow="fold",
            ratio=1 if column.is_wide else None,
        )
    for row in rows:
        table.add_row(*(Text(cell, style=STATE_COLOURS.get(cell.split(" ")[0], "")) for cell in row))
    Console().print(table)


def _coloured(line: str) -> str:
    codes = {"green": 32, "yellow": 33, "red": 31, "cyan": 36, "magenta": 35}
    word = line.split(" ", maxsplit=1)[0].rstrip(",:;")
    colour = STATE_COLOURS.get(word)
    return f"\033[{codes[colour]}m{word}\033[0m{line[len(word) :]}" if colour is not None else line


def _pad(cell: str, width: int, column: Column) -> str:
    blanks = " " * (width - _width(cell))
    return blanks + cell if column.is_right else cell + blanks


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
