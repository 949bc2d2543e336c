"""How much garbage the parsers of task files and of the wire are given in `make test-long`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests import scale
from tests.schemas.garbage import fuzz

_HERE: Final = Path(__file__).parent
_FILES: Final = (_HERE / "test_taskfile_fuzz.py", _HERE / "wire" / "test_wire_fuzz.py")
_INPUTS_MIN: Final = 100_000


def _asked_for(path: Path) -> Iterator[int]:
    """The number in the `fuzz()` decorator of each test of a file that has one."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "fuzz":
                yield int(ast.literal_eval(decorator.args[0]))


def test_the_parsers_of_task_files_and_of_the_wire_get_100_000_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together, with the settings that their tests have in long mode; each of the two files has a good part of them."""
    monkeypatch.setattr(scale, "IS_LONG", True)
    inputs = [sum(fuzz(number).max_examples for number in _asked_for(path)) for path in _FILES]
    assert sum(inputs) >= _INPUTS_MIN, inputs
    assert min(inputs) >= _INPUTS_MIN / 4, inputs
