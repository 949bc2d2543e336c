"""Leases: when they end on this host's clock; every rounding is to the safe side."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_queue import leasing
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import Lease

_S = 1_000_000_000
_TTLS = st.floats(0.001, 1e6)
_FRACTIONS = st.floats(0, 1, exclude_max=True)
_ANSWERED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@given(_TTLS, st.integers(0, 2**60), st.floats(0, 1e5))
def test_deadline_lies_before_the_end_of_the_lease(ttl_s: float, sent_ns: int, margin_s: float) -> None:
    """The deadline counts from the sending, less a margin: never after the lease's end, never before the sending."""
    lease = leasing.lease(ttl_s, sent_ns, margin_s, "boot")
    left_s = (lease.deadline_boottime_ns - sent_ns) / _S
    assert left_s <= ttl_s - min(margin_s, ttl_s / 4) + 1e-6
    assert left_s >= ttl_s * 0.75 - 1e-6
    assert (lease.ttl_s, lease.boot_id) == (ttl_s, "boot")


def test_deadline_of_an_ordinary_lease() -> None:
    """300 s asked for at 1000 s with a margin of 10 s end at 1290 s."""
    assert leasing.lease(300, 1000 * _S, 10, "b").deadline_boottime_ns == 1290 * _S


def test_margin_of_a_short_lease() -> None:
    """A margin takes at most a quarter of a lease."""
    assert [leasing.margin_s(ttl_s, 10) for ttl_s in (300, 40, 20, 1)] == [10, 10, 5, 0.25]


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, math.nan])
def test_no_lease_without_time(ttl_s: float) -> None:
    """A lease that is over, or no number, is a mistake of the caller."""
    with pytest.raises(ValueError, match="positive"):
        leasing.lease(ttl_s, 0, 0, "b")


@pytest.mark.parametrize("ttl_s", [math.inf, 1e300])
def test_endless_lease_is_cut(ttl_s: float) -> None:
    """A lease that no clock can hold is cut to the bound of all durations."""
    assert leasing.lease(ttl_s, 0, 0, "b").deadline_boottime_ns == round(limits.TIMEOUT_MAX_S * _S)


@given(st.floats(0, 0.999999), st.integers(-100, 10_000))
def test_ttl_until_is_never_too_long(cut_off_s: float, left_s: int) -> None:
    """The Date header is cut to whole seconds: what is left is never more than it truly was at that moment."""
    written_at = _ANSWERED + timedelta(seconds=cut_off_s)
    expires_at = _ANSWERED + timedelta(seconds=left_s)
    ttl_s = leasing.ttl_until(expires_at, _ANSWERED)
    assert ttl_s is not None
    assert ttl_s <= (expires_at - written_at).total_seconds()


def test_ttl_until_needs_both_times() -> None:
    """Without the expiry, or without the plane's own clock, nothing is known: wall clocks are never compared."""
    assert leasing.ttl_until(None, _ANSWERED) is None
    assert leasing.ttl_until(_ANSWERED, None) is None


def test_ttl_until_across_time_zones() -> None:
    """The same moment in another zone is the same moment."""
    expires_at = datetime.fromisoformat("2026-01-02T05:05:05+02:00")
    assert leasing.ttl_until(expires_at, _ANSWERED) == 59.0


_FIRST_NS = 1_000 * _S
_LAST_NS = 1_040 * _S
"""The claim was repeated 40 s after it had been sent first."""


def _claimed(ttl_s: float | None, expires_in_s: float | None, assigned_ago_s: float | None) -> Lease:
    def at(seconds: float | None) -> datetime | None:
        return None if seconds is None else _ANSWERED + timedelta(seconds=seconds)

    assigned_at = None if assigned_ago_s is None else at(-assigned_ago_s)
    return leasing.claimed(
        leasing.Terms(ttl_s, at(expires_in_s), assigned_at, _ANSWERED),
        first_sent_ns=_FIRST_NS,
        last_sent_ns=_LAST_NS,
        default_ttl_s=300.0,
        configured_margin_s=0.0,
        boot_id="b",
    )


@pytest.mark.parametrize(
    ("ttl_s", "expires_in_s", "assigned_ago_s", "ends_s"),
    [
        (60.0, None, None, 1_000 + 60),
        (60.0, 21.0, None, 1_000 + 60),
        (60.0, 61.0, None, 1_040 + 60),
        (60.0, 7200.0, None, 1_040 + 60),
        (60.0, -5.0, None, 1_000 + 60),
        (None, 61.0, None, 1_040 + 60),
        (None, None, None, 1_000 + 300),
        (None, None, 10.0, 1_040 + 289),
        (None, None, 299.5, 1_040),
        (None, None, 28_800.0, 1_000 + 300),
        (None, None, -28_800.0, 1_000 + 300),
    ],
    ids=[
        "stated: from the first sending",
        "as little is left as is stated",
        "more is left: it was given to the repeat",
        "a Date of somebody else's clock",
        "stated, and over",
        "only an expiry: from the last sending",
        "nothing: the default from the first sending",
        "assigned before, and told again",
        "assigned a lease ago",
        "assigned by another time zone",
        "assigned in the future",
    ],
)
def test_lease_of_a_claim(
    ttl_s: float | None, expires_in_s: float | None, assigned_ago_s: float | None, ends_s: float
) -> None:
    """Stated ttl or default count from the first sending, what is left from the last; the later one counts."""
    lease = _claimed(ttl_s, expires_in_s, assigned_ago_s)
    assert lease.deadline_boottime_ns == pytest.approx(ends_s * _S, abs=0.01 * _S)
    assert lease.ttl_s == (ttl_s or lease.ttl_s)


def test_a_claimed_lease_that_had_ended_is_over() -> None:
    """By the plane's own clocks: it ends with the sending."""
    assert _claimed(None, -1.0, None).deadline_boottime_ns == pytest.approx(_LAST_NS, abs=0.01 * _S)


@given(_TTLS, st.floats(0.1, 1e5), _FRACTIONS)
def test_renewal_comes_three_times_in_a_lease(ttl_s: float, interval_s: float, fraction: float) -> None:
    """Renewals are at most a third of the lease and the interval apart, and at least 80 % of that."""
    pause_s = leasing.renew_after_s(ttl_s, interval_s, fraction)
    assert 0.8 * min(interval_s, ttl_s / 3) <= pause_s * 1.000001
    assert pause_s <= min(interval_s, ttl_s / 3)


@given(_TTLS, st.integers(0, 10_000), _FRACTIONS)
def test_failed_renewal_is_tried_often_but_not_without_pause(ttl_s: float, failures: int, fraction: float) -> None:
    """However long the outage: at least 50 ms, at most 15 s and, above half a second, a tenth of the lease."""
    pause_s = leasing.renew_again_after_s(ttl_s, failures, fraction)
    assert 0.05 <= pause_s <= 15.0
    assert pause_s <= max(0.05, ttl_s / 10)


@given(st.floats(0, 1e5), _TTLS)
def test_grace_is_at_most_a_third_of_the_lease(grace_s: float, ttl_s: float) -> None:
    """A task's own grace period is kept as far as it takes no more than a third of its lease."""
    assert leasing.lease_grace_s(grace_s, ttl_s) == min(grace_s, ttl_s / 3)


@given(st.floats(1e-3, 1e5), st.floats(0, 1e5), _TTLS)
def test_nobody_is_warned_of_a_lease_that_is_renewed_in_time(warn_s: float, grace_s: float, ttl_s: float) -> None:
    """The warning lies behind the first renewal (after a third at most) and one more try, as late as it may be."""
    lead_s = leasing.lease_grace_s(grace_s, ttl_s) + leasing.lease_warn_s(warn_s, ttl_s)
    warned_after_s = ttl_s - leasing.margin_s(ttl_s, min(5.0, ttl_s / 60)) - lead_s
    assert warned_after_s > leasing.renew_after_s(ttl_s, 1e9, 0.0)
    assert leasing.lease_warn_s(warn_s, ttl_s) <= warn_s


@given(_TTLS, st.floats(0, 1e5), st.floats(0, 1e5))
def test_a_lease_leaves_time_to_work(ttl_s: float, margin_s: float, grace_s: float) -> None:
    """Margin and grace period together leave at least five twelfths of every lease."""
    left_s = ttl_s - leasing.margin_s(ttl_s, margin_s) - leasing.lease_grace_s(grace_s, ttl_s)
    assert left_s >= ttl_s * 5 / 12 * 0.999999
