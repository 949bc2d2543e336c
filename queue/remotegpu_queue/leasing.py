"""Pure arithmetic of leases: when they end on this host's clock, when to renew, how long a stop may take.

A deadline counts from before the request was sent, on CLOCK_BOOTTIME; wall clocks of two machines are never compared:
an expiry is only read against the `Date` header of the same answer.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from remotegpu_queue.backoff import full_jitter
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import Lease

_NS: Final = 1_000_000_000
_MARGIN_MAX_SHARE: Final = 0.25
_RENEW_JITTER: Final = 0.2


def margin_s(ttl_s: float, configured_s: float) -> float:
    """The safety margin: as configured, but at most a quarter of a short lease."""
    return min(configured_s, ttl_s * _MARGIN_MAX_SHARE)


def ttl_until(expires_at: datetime | None, answered_at: datetime | None) -> float | None:
    """Seconds from the answer's own `Date` to the expiry on the same clock; None when either is missing.

    Zero or less means that the lease had ended when the answer was written.
    """
    if expires_at is None or answered_at is None:
        return None
    # The Date header has whole seconds, cut off: the true answer was up to a second later, the lease that much shorter.
    return (expires_at - answered_at).total_seconds() - 1.0


def lease(ttl_s: float, sent_boottime_ns: int, configured_margin_s: float, boot_id: str) -> Lease:
    """A lease of `ttl_s` that was asked for at `sent_boottime_ns`; a longer one than the bound is cut to it.

    Raises ValueError for a ttl that is not positive.
    """
    if not ttl_s > 0:
        raise ValueError("a lease needs a positive ttl")
    ttl_s = min(ttl_s, limits.TIMEOUT_MAX_S)
    deadline_ns = sent_boottime_ns + round((ttl_s - margin_s(ttl_s, configured_margin_s)) * _NS)
    return Lease(ttl_s=ttl_s, deadline_boottime_ns=deadline_ns, boot_id=boot_id)


def claimed_ttl_s(
    stated_ttl_s: float | None, expires_at: datetime | None, answered_at: datetime | None, default_ttl_s: float
) -> tuple[float, bool]:
    """The ttl of a claim, and whether it counts from the *first* sending of the request.

    A repeated claim gets the same answer again: a stated ttl or the default then counts from the first time, what is
    left until an expiry counts from the last.
    """
    if stated_ttl_s is not None:
        return stated_ttl_s, True
    until = ttl_until(expires_at, answered_at)
    return (default_ttl_s, True) if until is None else (until, False)


def renew_after_s(ttl_s: float, interval_s: float, fraction: float) -> float:
    """Seconds until the next renewal: a third of the lease or the interval, less up to 20 % by chance.

    `fraction` is uniform in [0, 1).
    """
    return min(interval_s, ttl_s / 3) * (1 - _RENEW_JITTER * fraction)


def renew_again_after_s(ttl_s: float, failures: int, fraction: float) -> float:
    """Seconds until a failed renewal is tried again: with full jitter, at most a tenth of the lease or 15 s."""
    return max(0.05, full_jitter(failures, base_s=0.5, cap_s=min(15.0, ttl_s / 10), fraction=fraction))


def lease_grace_s(grace_period_s: float, ttl_s: float) -> float:
    """How long a task may take to stop when its lease ends; it lies before the deadline."""
    return min(grace_period_s, ttl_s / 3)


def lease_warn_s(warn_before_s: float, ttl_s: float) -> float:
    """How long before that stop a task is warned: with the grace at most half of a lease.

    A lease is renewed after a third of it, and once more before that: who is warned has missed a renewal.
    """
    return min(warn_before_s, ttl_s / 6)
