"""The table of the fault rows is the one that the tree gives, and no row or test of a row is missing in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.docs.fault_rows import PROMISES, ROWS
from tests.docs.reliability import ROOT, page, rows_of

DOCUMENT: Final = ROOT / "docs" / "reliability.md"
_NAMED: Final = re.compile(r"`([\w/]+\.py)::(\w+)`")
_ROW_TEST: Final = re.compile(r"^ *(?:async )?def ((?:test|check)_(f\d\d_(?:f\d\d_)*)\w+)\(", re.MULTILINE)


def _lines() -> list[list[str]]:
    """The cells of each row of the document's table."""
    text = DOCUMENT.read_text("utf-8").partition("## Rows")[2]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| F")]


def test_document_is_current() -> None:
    """If not: `python -m tests.docs.reliability docs/reliability.md`."""
    assert DOCUMENT.read_text("utf-8") == page()


def test_command_writes_the_document(tmp_path: Path) -> None:
    """What the document says about its own making is true."""
    target = tmp_path / "reliability.md"
    subprocess.run([sys.executable, "-m", "tests.docs.reliability", str(target)], check=True, cwd=ROOT)
    assert target.read_text("utf-8") == page()


def test_each_row_is_there_once() -> None:
    """F01 to F55, in order, each with a fault, what must hold, a promise and a state."""
    rows = _lines()
    assert [row[0] for row in rows] == [f"F{number:02}" for number in range(1, 56)]
    assert all(len(row) == 6 and all(row[:5]) for row in rows)
    assert {promise for row in ROWS.values() for promise in row.promises} == set(PROMISES)


def test_each_named_test_exists() -> None:
    """By the text of the file that is named, not by what has written the table."""
    named = [found for row in _lines() for found in _NAMED.findall(row[5])]
    assert named
    missing = []
    for file, name in named:
        path = ROOT / "tests" / file
        if not path.is_file() or not re.search(rf"^ *(?:async )?def {name}\(", path.read_text("utf-8"), re.MULTILINE):
            missing.append(f"{file}::{name}")
    assert missing == []


def test_each_test_of_a_row_is_named_in_it() -> None:
    """Every `test_fNN_` and `check_fNN_` of the tree stands in the rows of its name."""
    cells = {row[0]: row[5] for row in _lines()}
    found = 0
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for name, rows in _ROW_TEST.findall(path.read_text("utf-8")):
            for row in re.findall(r"f\d\d", rows):
                found += 1
                assert f"`{path.relative_to(ROOT / 'tests')}::{name}`" in cells[row.upper()], (path, name)
    assert found > 100


def test_a_row_without_tests_is_open() -> None:
    """No row is called tested that nothing names."""
    assert all(row[4].startswith("open") for row in _lines() if not row[5])


@pytest.mark.parametrize(
    ("name", "docstring", "rows"),
    [
        ("test_f16_slow", "", ["F16"]),
        ("test_f14_f15_refused", "F12, F14: and so on.", ["F14", "F15", "F12"]),
        ("check_f08_killed", "F08: a new one.", ["F08"]),
        ("test_something", "F09 and F10: both.", ["F09", "F10"]),
        ("test_something", "In the middle: F09: no.", []),
        ("helper_f09_", "F09: no test.", []),
    ],
)
def test_rows_of_a_test(name: str, docstring: str, rows: list[str]) -> None:
    """By its name, or by the rows with which its docstring begins."""
    assert rows_of(name, docstring) == rows
