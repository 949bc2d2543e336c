"""A report shows the line, points at what is meant, and is safe to print."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_schemas.problems import (
    PROBLEMS_SHOWN_MAX,
    InvalidFile,
    Problem,
    did_you_mean,
    dotted,
    nearest,
    printable,
    quoted,
    render_report,
    shown,
    width,
)
from tests.schemas.support import property_test


def test_render_as_the_task_file_format_shows_it() -> None:
    """The example of taskfile.md, to the character."""
    problem = Problem(
        "nightly.yaml",
        14,
        11,
        9,
        "unknown key 'dependson' in task 'report'; did you mean 'depends_on'?",
        "          dependson: [eval]",
    )
    assert problem.render() == (
        "nightly.yaml:14:11: unknown key 'dependson' in task 'report'; did you mean 'depends_on'?\n"
        "   14 |           dependson: [eval]\n"
        "      |           ^^^^^^^^^"
    )


def test_problem_of_no_line() -> None:
    """A file that has no lines is named alone."""
    assert Problem("f.yaml", 0, 0, 0, "is a directory").render() == "f.yaml: is a directory"


def test_problem_on_an_empty_line() -> None:
    """There is nothing to point at."""
    assert Problem("f.yaml", 3, 1, 1, "ends here", "  ").render() == "f.yaml:3:1: ends here"


def test_caret_stands_under_wide_characters() -> None:
    """East Asian characters take two columns, combining ones none, and a tab is shown as one blank."""
    rendered = Problem("f", 1, 4, 2, "m", "\u540d\u524d\t\u540d\u0301x").render().split("\n")
    assert rendered[1] == "    1 | \u540d\u524d \u540d\u0301x"
    assert rendered[2] == "      | " + " " * 5 + "^^"


def test_long_line_is_cut_around_the_place() -> None:
    """A line of a megabyte is one line of a terminal, with the place in it."""
    source = "x" * 500_000 + "HERE" + "y" * 500_000
    rendered = Problem("f", 1, 500_001, 4, "m", source).render().split("\n")
    assert len(rendered[1]) < 200
    assert rendered[1].index("HERE") == rendered[2].index("^^^^")
    assert rendered[1].count("\u2026") == 2


@pytest.mark.parametrize(
    "source",
    [
        "token: hunter2",
        "  API_TOKEN: 'hunter2'",
        "{password: hunter2, a: 1}",
        "env: {AWS_SECRET: hunter2}",
        '"api_key": "hunter2"',
        "command: curl -H 'Authorization: hunter2'",
        "args: [--token=hunter2]",
        "db_passwd = hunter2",
    ],
)
def test_f49_secret_in_the_line_is_hidden(source: str) -> None:
    """The value behind a name that speaks of a secret is starred out."""
    rendered = Problem("f", 1, 1, 1, "m", source).render()
    assert "hunter2" not in rendered
    assert "*******" in rendered


def test_f49_secret_in_a_message_is_hidden() -> None:
    """A message that quotes such a text hides it as well."""
    assert "hunter2" not in shown("API_TOKEN=hunter2")
    assert "hunter2" not in quoted("password: hunter2")


def test_report_is_in_file_order_and_counts() -> None:
    """Whatever order the problems were found in."""
    found = [Problem("b", 1, 1, 1, "third"), Problem("a", 9, 1, 1, "second"), Problem("a", 2, 7, 1, "first")]
    assert render_report(found, "nothing was submitted") == (
        "a:2:7: first\na:9:1: second\nb:1:1: third\n3 problems; nothing was submitted."
    )
    assert [problem.message for problem in InvalidFile(found).problems] == ["first", "second", "third"]
    assert str(InvalidFile(found[:1])) == "b:1:1: third\n1 problem; nothing was done."


def test_report_is_bounded() -> None:
    """A file of nothing but mistakes gives fifty and a number."""
    lines = render_report([Problem("a", line, 1, 1, "m") for line in range(1, 1001)], "x").split("\n")
    assert len(lines) == PROBLEMS_SHOWN_MAX + 2
    assert lines[-2:] == ["... and 950 more", "1000 problems; x."]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dependson", "depends_on"),
        ("DependsOn", "depends_on"),
        ("depends-on", "depends_on"),
        ("timout", "timeout"),
        ("Time_Out", "timeout"),
        ("xyz", None),
        ("", None),
        ("t" * 100_000, None),
    ],
)
def test_nearest_key(word: str, expected: str | None) -> None:
    """Another spelling of the same word first, then a typing mistake; nothing if nothing is near."""
    assert nearest(word, ["depends_on", "timeout", "command"]) == expected
    assert did_you_mean(word, ["depends_on", "timeout", "command"]) == (
        f"; did you mean '{expected}'?" if expected else ""
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "nothing"),
        (True, "true"),
        (3, "the number 3"),
        (3.0, "the number 3.0"),
        ("a", "the text 'a'"),
        (["a"], "a list"),
        ({"a": 1}, "a mapping"),
        (b"x", "a value of type bytes"),
        (10**100, f"the number 1{'0' * 39}"),
    ],
)
def test_shown(value: object, expected: str) -> None:
    """A value in words, cut."""
    assert shown(value) == expected


def test_dotted() -> None:
    """A path as people write it."""
    assert dotted(("task", "args", 2)) == "task.args[2]"
    assert dotted((0, "a")) == "[0].a"


@property_test
@given(text=st.text(st.characters()))
def test_printable_is_safe_for_a_terminal(text: str) -> None:
    """Character for character, without anything that a terminal would obey."""
    shown_text = printable(text)
    assert len(shown_text) == len(text)
    assert all(char.isprintable() or char == "\u00a0" for char in shown_text)
    assert width(shown_text) >= 0


@property_test
@given(source=st.text(max_size=400), column=st.integers(1, 500), length=st.integers(0, 500))
def test_any_problem_can_be_rendered(source: str, column: int, length: int) -> None:
    """Even one whose place is not in its line: at most three short lines."""
    lines = Problem("f", 1, column, length, "m", source).render().split("\n")
    assert len(lines) in {1, 3}
    assert all(width(line) <= 400 for line in lines)
