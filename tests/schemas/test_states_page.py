"""The document of the states is the one that the tables give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from remotegpu_schemas.states import CAUSE_RULES, RUN_TRANSITIONS, TASK_TRANSITIONS, Cause
from remotegpu_schemas.states_page import page

DOCUMENT = Path(__file__).parents[2] / "docs" / "states.md"


def test_document_is_current() -> None:
    """If not: `python -m remotegpu_schemas.states_page docs/states.md`."""
    assert DOCUMENT.read_text("utf-8") == page()


def test_command_writes_the_document(tmp_path: Path) -> None:
    """What the document says about its own making is true."""
    target = tmp_path / "states.md"
    subprocess.run([sys.executable, "-m", "remotegpu_schemas.states_page", str(target)], check=True)
    assert target.read_text("utf-8") == page()


def test_every_arrow_is_drawn() -> None:
    """Each transition of the tables is in one of the diagrams, with its event."""
    expected = [
        {(f"{source} --> {target}", event.value) for (source, event), target in TASK_TRANSITIONS.items()},
        {(f"{source} --> {target}", event.value) for (source, event), target in RUN_TRANSITIONS.items()},
    ]
    blocks = [block.split("```")[0] for block in page().split("```mermaid\nstateDiagram-v2\n")[1:]]
    assert [_arrows(block) for block in blocks] == expected


def _arrows(diagram: str) -> set[tuple[str, str]]:
    arrows: set[tuple[str, str]] = set()
    for line in diagram.strip().split("\n"):
        arrow, _, events = line.strip().partition(": ")
        arrows |= {(arrow, event) for event in events.split(", ") if event}
    return arrows


def test_every_cause_has_a_row() -> None:
    """In the order of the list, with the state that it ends in."""
    table = page().partition("## Why a run ended")[2]
    rows = [
        line.split(" | ") for line in table.split("\n") if line.startswith(tuple(f"| {cause} |" for cause in Cause))
    ]
    assert [(row[0][2:], row[3]) for row in rows] == [(cause, rule.final_state) for cause, rule in CAUSE_RULES.items()]


def test_document_fits_its_width() -> None:
    """Prose stays within 120 columns, as everything else does."""
    assert all(len(line) <= 120 for line in page().split("\n") if not line.startswith("|"))
