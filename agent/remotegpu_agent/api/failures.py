"""Failed authentications by address: a token bucket for each, in a bounded table. Pure: the time is passed in.

Only failures count. A good token is served whatever its address has done before: behind one address there are many (a
NAT, a proxy, all users of a host on 127.0.0.1), and one job with an old token must not lock out the control plane. What
keeps guessing hopeless is the length of a token (`token new`: 256 bits), not this; this keeps log and processor free.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable
from typing import Final


@dataclasses.dataclass(frozen=True)
class Failure:
    """What is to be done about one more failure."""

    retry_after_s: float
    """0.0: answer it as a failure. Else: too many, and after so long one more will be answered as such."""
    is_first_refused: bool = False


@dataclasses.dataclass
class _Bucket:
    level: float
    at: float
    is_refusing: bool = False


class Failures:
    """Each address may fail `burst` times at once and `per_s` times a second; at most `places` are remembered."""

    def __init__(self, *, burst: int, per_s: float, places: int) -> None:
        self._burst: Final = float(burst)
        self._per_s: Final = per_s
        self._places: Final = places
        self._buckets: collections.OrderedDict[Hashable, _Bucket] = collections.OrderedDict()
        self.refused_count = 0

    def note(self, peer: Hashable, now: float) -> Failure:
        """Count one more failure of `peer` at `now` (seconds, monotonic)."""
        bucket = self._buckets.pop(peer, None) or _Bucket(self._burst, now)
        self._buckets[peer] = bucket
        if len(self._buckets) > self._places:
            self._buckets.popitem(last=False)
        bucket.level = min(self._burst, bucket.level + (now - bucket.at) * self._per_s)
        bucket.at = now
        if bucket.level >= 1.0:
            bucket.level -= 1.0
            bucket.is_refusing = False
            return Failure(0.0)
        self.refused_count += 1
        is_first, bucket.is_refusing = not bucket.is_refusing, True
        return Failure((1.0 - bucket.level) / self._per_s, is_first)

    def __len__(self) -> int:
        return len(self._buckets)
