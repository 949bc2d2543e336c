"""Times as peers write them, and as the agent sends them. Wall clocks of two machines are never compared here."""

from __future__ import annotations

import functools
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Final

from remotegpu_schemas import limits

_TIME: Final = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,12}))?\s*([Zz]|[+-]\d\d:?[0-5]\d)?", re.ASCII
)
_ZERO_YEAR: Final = 1
"""Go's zero time is in year 1, in whatever zone it is written."""


def parse_time(value: object) -> datetime | None:
    """RFC 3339 with up to picoseconds or an offset; None for what means "not set" or cannot be read."""
    if not isinstance(value, str):
        return None
    match = _TIME.fullmatch(value.strip())
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    if year <= _ZERO_YEAR:
        return None
    microsecond = int((match[7] or "0").ljust(6, "0")[:6])
    zone = match[8]
    tz: timezone = UTC
    if zone not in {None, "Z", "z"}:
        sign = -1 if zone[0] == "-" else 1
        digits = zone[1:].replace(":", "")
        offset = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
        if offset >= timedelta(hours=24):
            return None
        tz = timezone(sign * offset)
    # A leap second (RFC 3339, section 5.7) is read as the second before it.
    second = 59 if second == 60 else second
    try:
        return datetime(year, month, day, hour, minute, second, microsecond, tzinfo=tz).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def format_time(epoch_s: float) -> str:
    """RFC 3339 UTC with milliseconds and `Z`."""
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@functools.lru_cache(maxsize=16)  # it changes once a second
def parse_http_date(value: str | None) -> datetime | None:
    """The `Date` header (RFC 9110, IMF-fixdate), or None."""
    if not value:
        return None
    try:
        return datetime.strptime(value.strip(), "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC)
    except ValueError:
        return None


def parse_retry_after(value: str | None, date: datetime | None) -> float | None:
    """Seconds from `Retry-After`, a number or a date against the answer's own `Date`; bounded."""
    if not value:
        return None
    text = value.strip()
    if re.fullmatch(r"\d+", text, re.ASCII):
        seconds = float(text)
    else:
        until = parse_http_date(text)
        if until is None or date is None:
            return None
        seconds = (until - date).total_seconds()
    return min(max(seconds, 0.0), limits.RETRY_AFTER_MAX_S)
