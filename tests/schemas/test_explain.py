"""Pydantic's errors as sentences; each kind that the forms can give is covered by its own words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, ValidationError

from remotegpu_schemas.explain import Wording, explain, model_at, sentences
from remotegpu_schemas.forms import Form, Text
from remotegpu_schemas.problems import Finding


class Inner(Form):
    """A mapping inside."""

    count: Annotated[int, Field(gt=0, le=1_000_000)] = 1
    share: Annotated[float, Field(lt=2)] = 1.0


class Outer(Form):
    """The whole document."""

    inner: Inner | None = None
    required: bool
    choice: Literal["one", "two"] = "one"
    names: list[Text] = Field(default=[], max_length=2)
    by_name: dict[str, int] = Field(default={})


def findings(**values: Any) -> list[Finding]:
    """What is wrong with a document."""
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"required": True, **values})
    return explain(caught.value, Outer, Wording())


@pytest.mark.parametrize(
    ("values", "finding"),
    [
        ({"required": "yes"}, Finding(("required",), "'required' must be true or false, not the text 'yes'")),
        (
            {"choice": "tow"},
            Finding(("choice",), "'choice' must be one or two, not the text 'tow'; did you mean 'two'?"),
        ),
        ({"names": "a"}, Finding(("names",), "'names' must be a list, not the text 'a'")),
        ({"names": ["a", "b", "c"]}, Finding(("names",), "'names' has more than 2 entries")),
        (
            {"names": [None]},
            Finding(("names", 0), "'names[0]' must be text, not nothing; write \"\" for an empty text"),
        ),
        ({"inner": 3}, Finding(("inner",), "'inner' must be a mapping (key: value), not the number 3")),
        ({"inner": {"count": 0}}, Finding(("inner", "count"), "'inner.count' must be more than 0, not 0")),
        (
            {"inner": {"count": 2_000_000}},
            Finding(("inner", "count"), "'inner.count' must be at most 1000000, not 2000000"),
        ),
        (
            {"inner": {"count": 1.0}},
            Finding(("inner", "count"), "'inner.count' must be a whole number, not the number 1.0"),
        ),
        (
            {"inner": {"cuont": 1}},
            Finding(("inner", "cuont"), "unknown key 'cuont' in 'inner'; did you mean 'count'?", at_key=True),
        ),
        (
            {"inner": {"zz": 1}},
            Finding(("inner", "zz"), "unknown key 'zz' in 'inner'; known keys: count, share", at_key=True),
        ),
        ({"share": 1}, Finding(("share",), "unknown key 'share'; did you mean 'inner.share'?", at_key=True)),
        ({"by_name": {"a": "b"}}, Finding(("by_name", "a"), "'by_name.a' must be a whole number, not the text 'b'")),
        (
            {"inner": {"share": 3.0}},
            Finding(("inner", "share"), "'inner.share' is not valid: Input should be less than 2"),
        ),
    ],
)
def test_sentence(values: dict[str, Any], finding: Finding) -> None:
    """One sentence with the name of the value, what is expected, and what is there."""
    assert findings(**values) == [finding]


def test_missing_key() -> None:
    """It is said of the mapping that lacks it."""
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({})
    assert explain(caught.value, Outer, Wording()) == [Finding((), "'required' is missing", at_key=True)]


def test_wording_of_a_kind_of_file() -> None:
    """Places, names, keys that exist but are not supported, and values that are refused are the file's to say."""
    wording = Wording(
        place=lambda path: f"over there {len(path)}",
        name=lambda path: f"<{path[-1]}>",
        other_keys=lambda path: {"later"},
        refuse_key=lambda path: f"{path[-1]} comes later",
        refuse_value=lambda path, value: "no lists" if isinstance(value, list) else None,
    )
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"required": 3, "later": 1, "odd": 2, "inner": []})
    assert [finding.message for finding in explain(caught.value, Outer, wording)] == [
        "no lists",
        "<required> must be true or false, not the number 3",
        "later comes later",
        "unknown key 'odd' over there 0; known keys: inner, required, choice, names, by_name",
    ]


def test_sentences_without_a_place() -> None:
    """For what nobody wrote down: names inside, no "Value error"."""
    from remotegpu_schemas.task import Task

    with pytest.raises(ValidationError) as caught:
        Task(id="t")
    assert sentences(caught.value) == ["a task needs a command or a script"]
    with pytest.raises(ValidationError) as caught:
        Task(id="t", command="x", priority=11)
    assert sentences(caught.value) == ["'priority' must be at most 10, not 11"]


def test_model_at() -> None:
    """The model of a mapping inside, through `| None`; nothing for what is no model."""
    assert model_at(Outer, ()) is Outer
    assert model_at(Outer, ("inner",)) is Inner
    for path in (("required",), ("inner", "count"), ("bogus",), ("names", 0)):
        assert model_at(Outer, path) is None


def test_forms_are_frozen_and_strict() -> None:
    """A number is no text and no flag."""
    assert issubclass(Form, BaseModel)
    for values in ({"required": 1}, {"required": "true"}, {"required": True, "by_name": {"a": "1"}}):
        with pytest.raises(ValidationError):
            Outer.model_validate(values)
