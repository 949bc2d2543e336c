"""What is wrong with what a person wrote: where, what, and the nearest valid choice.

Renders mistakes with the line and a caret. Knows neither YAML (`strict_yaml` says where a path lies) nor pydantic
(`explain` makes sentences of its errors), so that it loads fast.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from remotegpu_schemas.errors import AgentError

Path: TypeAlias = tuple[str | int, ...]
"""The way from a document's top to a value: keys of mappings and indexes of lists."""

PROBLEMS_SHOWN_MAX: Final = 50
"""A file with more mistakes than this is the wrong file."""
_EXCERPT_MAX_CHARS: Final = 160
_EXCERPT_BEFORE_CHARS: Final = 60
_MASK_BEFORE_CHARS: Final = 4096
"""A secret whose name stands further in front of the excerpt is longer than any."""
_SHOWN_MAX_CHARS: Final = 40
_SECRET: Final = re.compile(
    r"(?i)((?:token|secret|passw(?:or)?d|api[_-]?key|authorization|credentials?)[\"']?\s*[:=]\s*)(\S[^,}\]]*)"
)


@dataclass(frozen=True)
class Problem:
    """One mistake. `line` and `column` count characters from 1; line 0 means that `file` is no file with lines.

    `source` is the text of the line; `length` is how much of it from `column` is meant.
    """

    file: str
    line: int
    column: int
    length: int
    message: str
    source: str = ""

    def render(self) -> str:
        """`file:line:column: message`, the line, and a caret under what is meant."""
        if self.line == 0:
            return f"{printable(self.file)}: {printable(self.message)}"
        head = f"{printable(self.file)}:{self.line}:{self.column}: {printable(self.message)}"
        if not self.source.strip():
            return head
        before, meant, after = self._excerpt()
        caret = "^" * max(width(meant), 1)
        return f"{head}\n{self.line:>5} | {before}{meant}{after}\n{'':>5} | {' ' * width(before)}{caret}"

    def _excerpt(self) -> tuple[str, str, str]:
        """The line in three parts, cut around the place if it is long; secrets and control characters are hidden."""
        source, start = self.source, self.column - 1
        first = 0 if len(source) <= _EXCERPT_MAX_CHARS else max(0, start - _EXCERPT_BEFORE_CHARS)
        last = min(len(source), first + _EXCERPT_MAX_CHARS)
        unmasked = max(0, first - _MASK_BEFORE_CHARS)
        source = source[:unmasked] + _SECRET.sub(_mask, source[unmasked:last]) + source[last:]
        end = min(start + self.length, last)
        return (
            ("…" if first else "") + printable(source[first:start]),
            printable(source[start:end]),
            printable(source[end:last]) + ("…" if last < len(source) else ""),
        )


class InvalidFile(AgentError):
    """A file that a person wrote cannot be used; the message is the whole report, every problem in file order."""

    def __init__(self, problems: Sequence[Problem], consequence: str = "nothing was done") -> None:
        super().__init__(render_report(problems, consequence))
        self.problems = tuple(sorted(problems, key=_file_order))


def render_report(problems: Sequence[Problem], consequence: str) -> str:
    """All problems in file order, and a last line that counts them and says what follows."""
    ordered = sorted(problems, key=_file_order)
    parts = [problem.render() for problem in ordered[:PROBLEMS_SHOWN_MAX]]
    if len(ordered) > PROBLEMS_SHOWN_MAX:
        parts.append(f"... and {len(ordered) - PROBLEMS_SHOWN_MAX} more")
    parts.append(f"{len(ordered)} problem{'' if len(ordered) == 1 else 's'}; {consequence}.")
    return "\n".join(parts)


def _file_order(problem: Problem) -> tuple[str, int, int]:
    return problem.file, problem.line, problem.column


@dataclass(frozen=True)
class Finding:
    """A mistake by its path. `at_key`: the key itself is meant, not its value."""

    path: Path
    message: str
    at_key: bool = False


# --- words ---------------------------------------------------------------------------------------------------------


def nearest(word: str, choices: Sequence[str]) -> str | None:
    """The choice that `word` was probably meant to be, if one is near enough."""
    plain = {re.sub(r"[\W_]", "", choice).lower(): choice for choice in choices}
    exact = plain.get(re.sub(r"[\W_]", "", word).lower())
    if exact is not None:
        return exact
    found = difflib.get_close_matches(word.lower()[:_SHOWN_MAX_CHARS], choices, n=1, cutoff=0.66)
    return found[0] if found else None


def did_you_mean(word: str, choices: Sequence[str]) -> str:
    """The tail of a message: `; did you mean 'x'?`, or nothing."""
    near = nearest(word, choices)
    return f"; did you mean '{near}'?" if near is not None else ""


def shown(value: object) -> str:
    """A value in words: `the text 'x'`, `the number 3`, `a list`."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {number(value)}"
        case str():
            return f"the text {quoted(value)}"
        case list() | tuple():
            return "a list"
        case dict():
            return "a mapping"
        case _:
            return f"a value of type {type(value).__name__}"


def number(value: object) -> str:
    """A number without loss (1.0 is not 1 where a whole number is asked for), cut to what a message can show."""
    return str(value)[:_SHOWN_MAX_CHARS]


def dotted(path: Path) -> str:
    """`retry.max`, `args[2]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += ("." if text else "") + part[:_SHOWN_MAX_CHARS]
    return text


# --- text for terminals --------------------------------------------------------------------------------------------


def quoted(text: str) -> str:
    """The text in quotes, cut to what a message can show, and without secrets that their names give away."""
    masked = _SECRET.sub(_mask, text[:_MASK_BEFORE_CHARS])
    return repr(masked if len(masked) <= _SHOWN_MAX_CHARS else masked[:_SHOWN_MAX_CHARS] + "…")


def _mask(match: re.Match[str]) -> str:
    return match[1] + "*" * len(match[2])


def printable(text: str) -> str:
    """One character for each: nothing that a terminal would obey, and tabs as blanks so that the caret fits."""
    return "".join(
        " " if char == "\t" else char if char.isprintable() or char == "\u00a0" else "\ufffd" for char in text
    )


def width(text: str) -> int:
    """Columns of a terminal (Unicode Standard Annex 11: wide and full-width characters take two)."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
