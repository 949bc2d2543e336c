"""How long to wait before trying again. Pure: randomness comes in by parameter."""

from __future__ import annotations

from remotegpu_schemas.task import Backoff, RetryPolicy

_MAX_DOUBLINGS = 32


def full_jitter(tries: int, *, base_s: float, cap_s: float, fraction: float) -> float:
    """Exponential backoff with full jitter: uniform between a tenth and the whole of min(cap_s, base_s * 2**tries).

    `tries` counts from 0, `fraction` is uniform in [0, 1). (Source: "Exponential Backoff And Jitter", AWS
    Architecture Blog.) The floor of a tenth keeps a lucky draw from hammering a peer that is down.
    """
    ceiling = min(cap_s, base_s * float(2 ** min(tries, _MAX_DOUBLINGS)))
    return ceiling * (0.1 + 0.9 * fraction)


def retry_delay_s(policy: RetryPolicy, retry_no: int) -> float:
    """Seconds before the `retry_no`-th retry (from 1) of a task, by its own policy; without jitter."""
    doublings = 0 if policy.backoff is Backoff.FIXED else min(retry_no - 1, _MAX_DOUBLINGS)
    return min(policy.delay_s * float(2**doublings), policy.max_delay_s)
