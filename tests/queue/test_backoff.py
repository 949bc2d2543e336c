"""Delays: bounded, growing, and never zero for a peer that is down."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_queue.backoff import full_jitter, retry_delay_s
from remotegpu_schemas.task import Backoff, RetryPolicy

_FRACTIONS = st.floats(0, 1, exclude_max=True)


@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(0.01, 3600), _FRACTIONS)
def test_jitter_stays_between_a_tenth_and_the_ceiling(tries: int, base_s: float, cap_s: float, fraction: float) -> None:
    """However many tries there were, the pause lies between a tenth of the ceiling and the ceiling."""
    ceiling = min(cap_s, base_s * 2.0 ** min(tries, 32))
    assert ceiling * 0.0999 <= full_jitter(tries, base_s=base_s, cap_s=cap_s, fraction=fraction) <= ceiling


@pytest.mark.parametrize(("tries", "ceiling_s"), [(0, 1.0), (1, 2.0), (4, 16.0), (5, 30.0), (500, 30.0)])
def test_jitter_doubles_up_to_the_cap(tries: int, ceiling_s: float) -> None:
    """The ceiling doubles with each try until it meets the cap."""
    assert full_jitter(tries, base_s=1.0, cap_s=30.0, fraction=0.0) == pytest.approx(ceiling_s / 10)
    assert full_jitter(tries, base_s=1.0, cap_s=30.0, fraction=0.999999) == pytest.approx(ceiling_s, rel=1e-4)


@pytest.mark.parametrize(
    ("backoff", "max_delay_s", "delays_s"),
    [
        (Backoff.FIXED, 3600.0, [10.0, 10.0, 10.0, 10.0]),
        (Backoff.FIXED, 4.0, [4.0, 4.0, 4.0, 4.0]),
        (Backoff.EXPONENTIAL, 3600.0, [10.0, 20.0, 40.0, 80.0]),
        (Backoff.EXPONENTIAL, 35.0, [10.0, 20.0, 35.0, 35.0]),
        (Backoff.FIXED, 0.0, [0.0, 0.0, 0.0, 0.0]),
        (Backoff.EXPONENTIAL, 0.0, [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_delay_before_a_retry(backoff: Backoff, max_delay_s: float, delays_s: list[float]) -> None:
    """The n-th retry waits as the task's policy says, at most `max_delay_s` in either form."""
    policy = RetryPolicy(max=9, delay_s=10, backoff=backoff, max_delay_s=max_delay_s)
    assert [retry_delay_s(policy, number) for number in range(1, 5)] == delays_s


def test_delay_of_a_late_retry_is_finite() -> None:
    """The thousandth retry does not overflow."""
    policy = RetryPolicy(max=1000, delay_s=1, backoff=Backoff.EXPONENTIAL)
    assert retry_delay_s(policy, 1000) == 3600.0
