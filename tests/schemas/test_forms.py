"""Null means "not given", and text may look like a number."""

from __future__ import annotations

import pytest
from pydantic import Field, ValidationError

from remotegpu_schemas.forms import Form, Text, no_nul, scalar_text


class Example(Form):
    """A form with every kind of default."""

    text: Text = "default"
    maybe: Text | None = None
    names: list[Text] = Field(default=[])


def test_null_means_the_default() -> None:
    """Also where null is no value of its own."""
    assert Example.model_validate({"text": None, "maybe": None, "names": None}) == Example()


def test_null_under_an_unknown_key_is_still_unknown() -> None:
    """A key that does not exist is refused, whatever it holds."""
    with pytest.raises(ValidationError, match="Extra inputs"):
        Example.model_validate({"bogus": None})


@pytest.mark.parametrize(("value", "text"), [(True, "true"), (False, "false"), (3, "3"), (1.5, "1.5"), ("x", "x")])
def test_scalars_are_text(value: object, text: str) -> None:
    """As YAML writes them."""
    assert Example.model_validate({"text": value}).text == text


def test_lists_are_no_text() -> None:
    """Only scalars are turned."""
    assert scalar_text(["a"]) == ["a"]
    with pytest.raises(ValidationError):
        Example.model_validate({"text": ["a"]})


@pytest.mark.parametrize("bad", ["a\0b", "a\ud800b", "x\udc80"])
def test_text_that_nothing_can_hold(bad: str) -> None:
    """NUL, and halves of surrogate pairs, which neither a file nor a table nor a peer takes."""
    with pytest.raises(ValueError, match="must not contain"):
        no_nul(bad)


@pytest.mark.parametrize("good", ["", "a", "\U0001f600", "\n\t\x01", "\ufffd"])
def test_text_that_is_text(good: str) -> None:
    """Everything else passes as it is."""
    assert no_nul(good) == good
