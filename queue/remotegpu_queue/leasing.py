"""Pure arithmetic of leases: when they end on this host's clock, when to renew, how long a stop may take.

A deadline counts from before the request was sent, on CLOCK_BOOTTIME; wall clocks of two machines are never compared:
an expiry is only read against the `Date` header of the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from remotegpu_queue.backoff import full_jitter
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import Lease

_NS: Final = 1_000_000_000
_MARGIN_MAX_SHARE: Final = 0.25
_RENEW_JITTER: Final = 0.2
JUST_ENDED_S: Final = 0.001


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


@dataclass(frozen=True)
class Terms:
    """What a claim's answer says of the lease; times are the plane's, `answered_at` is its `Date`."""

    ttl_s: float | None
    expires_at: datetime | None
    assigned_at: datetime | None
    answered_at: datetime | None


def claimed(
    terms: Terms,
    *,
    first_sent_ns: int,
    last_sent_ns: int,
    default_ttl_s: float,
    configured_margin_s: float,
    boot_id: str,
) -> Lease:
    """The lease of a claim that was sent once or more often (CLOCK_BOOTTIME ns) before it was answered.

    A stated ttl or the default counts from the *first* sending, since a repeated claim gets the same answer again; what
    is left until an expiry counts from the last. Neither is ever too long: the later end counts. A lease that had ended
    when the answer was written is given as one that has just ended.
    """
    ttl_s = default_ttl_s if terms.ttl_s is None else terms.ttl_s
    left_s = ttl_until(terms.expires_at or _presumed_expiry(terms, default_ttl_s), terms.answered_at)
    if left_s is None:
        return lease(ttl_s, first_sent_ns, configured_margin_s, boot_id)
    left_s = max(left_s, JUST_ENDED_S)
    if terms.ttl_s is None:
        return lease(left_s, last_sent_ns, configured_margin_s, boot_id)
    by_expiry = lease(min(left_s, ttl_s), last_sent_ns, configured_margin_s, boot_id)
    stated = lease(ttl_s, first_sent_ns, configured_margin_s, boot_id)
    later_ns = max(stated.deadline_boottime_ns, by_expiry.deadline_boottime_ns)
    return stated.model_copy(update={"deadline_boottime_ns": later_ns})


def _presumed_expiry(terms: Terms, default_ttl_s: float) -> datetime | None:
    """Of a plane that tells neither ttl nor expiry, and repeats in its answers what it gave away before.

    A time of assignment that lies in the future, or a whole lease back, is in some other time zone.
    """
    if terms.ttl_s is not None or terms.assigned_at is None or terms.answered_at is None:
        return None
    age_s = (terms.answered_at - terms.assigned_at).total_seconds()
    return terms.assigned_at + timedelta(seconds=default_ttl_s) if -1.0 <= age_s < default_ttl_s else None


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
