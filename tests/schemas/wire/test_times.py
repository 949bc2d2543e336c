"""Times of peers are read leniently, and never raise."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_schemas import limits
from remotegpu_schemas.wire import format_time, parse_http_date, parse_retry_after, parse_time
from tests.schemas.support import json_values, property_test


@pytest.mark.parametrize(
    "text",
    [
        "now",
        "2026-02-05",
        "12:00:00",
        "2026-02-05T12:00",
        "2026-13-01T00:00:00Z",
        "2026-02-30T00:00:00Z",
        "2026-02-05T24:00:00Z",
        "2026-02-05T12:60:00Z",
        "2026-02-05T12:00:61Z",
        "2026-02-05T12:00:99Z",
        "2026-02-05T12:00:00+24:00",
        "2026-02-05T12:00:00+01:60",
        "2026-02-05T12:00:00.Z",
        "0000-01-01T00:00:00Z",
        "9999-12-31T23:59:59-01:00",
        "\u0662\u0660\u0662\u0666-02-05T12:00:00Z",
        "2026-02-05T12:00:00ZZ",
        1770292800,
        1.5,
        True,
        [],
        {},
    ],
)
def test_what_is_no_time_is_not_set(text: object) -> None:
    """What cannot be read counts as not set."""
    assert parse_time(text) is None


def test_leap_second_is_the_second_before() -> None:
    """RFC 3339 allows a 60th second; datetime does not."""
    assert parse_time("2016-12-31T23:59:60Z") == datetime(2016, 12, 31, 23, 59, 59, tzinfo=UTC)


@pytest.mark.parametrize("text", ["2026-02-05t12:00:00z", "2026-02-05 12:00:00", " 2026-02-05T12:00:00Z\n"])
def test_spellings(text: str) -> None:
    """Lower case, a blank for the T, no zone (UTC), and white space around are read."""
    assert parse_time(text) == datetime(2026, 2, 5, 12, tzinfo=UTC)


offsets = st.timedeltas(timedelta(hours=-23, minutes=-59), timedelta(hours=23, minutes=59)).map(
    lambda delta: timezone(timedelta(minutes=delta // timedelta(minutes=1)))
)


FIRST, LAST = datetime.fromisoformat("0002-01-03"), datetime.fromisoformat("9999-12-29")


@property_test
@given(moment=st.datetimes(FIRST, LAST, timezones=offsets))
def test_any_moment_is_read_back(moment: datetime) -> None:
    """Every moment with an offset is read as the same moment, in UTC."""
    parsed = parse_time(moment.isoformat())
    assert parsed == moment
    assert parsed is not None
    assert parsed.tzinfo is UTC


@property_test
@given(value=json_values | st.from_regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", fullmatch=True))
def test_no_value_raises(value: object) -> None:
    """Any value is an aware time or nothing."""
    parsed = parse_time(value)
    assert parsed is None or parsed.tzinfo is UTC


@property_test
@given(epoch_ms=st.integers(0, 4_000_000_000_000))
def test_sent_time_is_rfc_3339_utc(epoch_ms: int) -> None:
    """With milliseconds and Z; read back it is the same to the millisecond."""
    text = format_time(epoch_ms / 1000)
    parsed = parse_time(text)
    assert text.endswith("Z")
    assert len(text) == len("2026-02-05T12:00:00.000Z")
    assert parsed is not None
    assert abs(parsed.timestamp() * 1000 - epoch_ms) <= 1


@property_test
@given(value=st.none() | st.text(max_size=40))
def test_any_header_is_read(value: str | None) -> None:
    """Headers that say nothing are nothing; what they say is bounded."""
    date = parse_http_date(value)
    assert date is None or date.tzinfo is UTC
    seconds = parse_retry_after(value, date)
    assert seconds is None or 0 <= seconds <= limits.RETRY_AFTER_MAX_S
