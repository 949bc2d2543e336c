"""Durations as people write them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_schemas import limits
from remotegpu_schemas.quantities import format_duration, parse_duration
from tests.schemas.support import json_values, property_test


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("90s", 90),
        ("10m", 600),
        ("24h", 86400),
        ("7d", 604800),
        ("45", 45),
        (90, 90),
        (1.5, 1.5),
        ("1.5h", 5400),
        ("0", 0.0),
        (0, 0),
        ("0.25s", 0.25),
        ("366d", limits.TIMEOUT_MAX_S),
    ],
)
def test_duration(value: object, seconds: float) -> None:
    """Seconds, or a number with a unit."""
    assert parse_duration(value) == seconds


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("5 minutes", "must be a duration, not '5 minutes': write seconds"),
        ("10M", "must be a duration, not '10M'"),
        ("1h30m", "must be a duration"),
        ("01s", "must be a duration"),
        ("-5s", "must be a duration"),
        ("", "must be a duration"),
        ("s", "must be a duration"),
        (" 5s", "must be a duration"),
        ("\u0665s", "must be a duration"),
        ("9" * 1000, "must be a duration"),
        ([], "must be a duration: write seconds"),
        (True, "must be a duration"),
        (None, "must be a duration"),
        (-1, "must not be negative"),
        (math.inf, "must be a finite duration"),
        (math.nan, "must be a finite duration"),
        (10**400, "must be a finite duration"),
        (-(10**400), "must be a finite duration"),
        ("367d", "must be at most 366d"),
        (1e300, "must be at most 366d"),
    ],
)
def test_no_duration(value: object, message: str) -> None:
    """The message says what to write."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        parse_duration(value)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 160


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (90, "90s"),
        (60, "1m"),
        (3600, "1h"),
        (86400, "1d"),
        (5400, "90m"),
        (1.5, "1.5s"),
        (1e-7, "0.0000001s"),
    ],
)
def test_format(seconds: float, text: str) -> None:
    """The biggest unit that leaves a whole number."""
    assert format_duration(seconds) == text


@property_test
@given(seconds=st.floats(0, limits.TIMEOUT_MAX_S) | st.integers(0, int(limits.TIMEOUT_MAX_S)).map(float))
def test_formatted_duration_is_read_back(seconds: float) -> None:
    """As the same number, to the nanosecond (to what a float can tell apart, for long ones)."""
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=1e-9, rel=1e-15)


@property_test
@given(value=json_values)
def test_any_value_is_a_duration_or_a_sentence(value: object) -> None:
    """Nothing but ValueError is raised; what is accepted is within the bounds."""
    parsed = _parsed(value)
    if isinstance(parsed, ValueError):
        assert str(parsed).startswith("must ")
    else:
        assert 0 <= parsed <= limits.TIMEOUT_MAX_S


def _parsed(value: object) -> float | ValueError:
    try:
        return parse_duration(value)
    except ValueError as error:
        return error
