"""Writes `docs/reliability.md`: `python -m tests.docs.reliability docs/reliability.md`.

A test belongs to a row by its name (`test_f16_...`, and `check_f16_...` in the test bed) or by the rows with which its
docstring begins (`F16: ...`).
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.docs.fault_rows import PROMISES, ROWS, Row

ROOT: Final = Path(__file__).resolve().parents[2]

_IN_NAME: Final = re.compile(r"(?:test|check)_((?:f\d\d_)+)")
_IN_DOCSTRING: Final = re.compile(r"((?:F\d\d(?:, | and )?)+):")

_HEAD: Final = """\
# Reliability

What has been made to go wrong, what must hold then, and the tests that prove it. Generated from the tree; a test fails
when it is not current. To write it anew:

    python -m tests.docs.reliability docs/reliability.md

A test belongs to a row by its name (`test_f16_...`) or by the beginning of its docstring. Those in `tests/simulation/`
are whole agents on virtual time under random faults, those in `tests/system/` run in a virtual machine with a real
systemd (`make test-system`), those in `tests/end_to_end/` start agent and control plane as real processes. `make test`
runs all but `tests/system/`; `make test-long` tries the random ones for longer.

A row is **open** where a part that it needs is not built yet, or where no test names it. **Has tests** says that tests
name it and pass, not that nothing else could be tried. Figures were measured by the test that stands with them.
"""


def tests_of_rows() -> dict[str, list[str]]:
    """By row, the tests in the tree as FILE::NAME, in the order of files and lines."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for name, docstring in _functions(path):
            for row in rows_of(name, docstring):
                found.setdefault(row, []).append(f"{path.relative_to(ROOT / 'tests')}::{name}")
    return found


def rows_of(name: str, docstring: str) -> list[str]:
    """The rows that a test names, each once."""
    in_name, in_docstring = _IN_NAME.match(name), _IN_DOCSTRING.match(docstring)
    if not name.startswith(("test_", "check_")):
        return []
    rows = re.findall(r"f\d\d", in_name[1]) if in_name else []
    rows += re.findall(r"F\d\d", in_docstring[1]) if in_docstring else []
    return list(dict.fromkeys(row.upper() for row in rows))


def _functions(path: Path) -> Iterator[tuple[str, str]]:
    text = path.read_text("utf-8")
    if not re.search(r"[fF]\d\d", text):
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, ast.get_docstring(node) or ""


def page() -> str:
    """The whole document."""
    found = tests_of_rows()
    return "\n".join(
        [
            _HEAD,
            "## Promises",
            "",
            *(f"{number}. {sentence}" for number, sentence in PROMISES.items()),
            "",
            "## Rows",
            "",
            "| row | fault | what must hold | promise | state | tests |",
            "|---|---|---|---|---|---|",
            *(_line(name, row, found.get(name, [])) for name, row in ROWS.items()),
            "",
        ]
    )


def _line(name: str, row: Row, tests: list[str]) -> str:
    promises = ", ".join(map(str, row.promises))
    return f"| {name} | {row.fault} | {row.holds} | {promises} | {_state(row, tests)} | {_listed(tests)} |"


def _state(row: Row, tests: list[str]) -> str:
    parts = []
    if row.waits_for is not None:
        parts.append(f"open{' in part' if tests else ''}: needs {row.waits_for}")
    elif not tests:
        parts.append("open: no test yet")
    if row.figure:
        parts.append(row.figure)
    return "; ".join(parts) or "has tests"


def _listed(tests: list[str]) -> str:
    """Each file once, with the names of its tests."""
    by_file: dict[str, list[str]] = {}
    for test in tests:
        file, _, name = test.partition("::")
        by_file.setdefault(file, []).append(name)
    return "<br>".join(f"`{file}::{name}`" for file, names in by_file.items() for name in names)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
