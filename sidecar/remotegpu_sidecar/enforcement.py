"""What ends a run, and when: stop request, timeout, lease, natural end. Pure: no clock, no process, no file.

All times are nanoseconds on CLOCK_BOOTTIME. The shim asks `next_ns` when to look again, and does what is due.
Standard library only.
"""

from __future__ import annotations

EXIT = "exit"
STOP = "stop"
TIMEOUT = "timeout"
LEASE = "lease"
LAUNCH = "launch"
ABANDONED = "abandoned"

# What a task leaves behind when it ends by itself gets this long after its SIGTERM, or the grace period if shorter.
LEFTOVER_GRACE_S = 2.0

_NS_PER_S = 1_000_000_000


class Enforcement:
    """One run's causes of ending; the first one wins and stays.

    `kill_at_ns` is set from then on and only ever moves to an earlier time: nothing prolongs a stop.
    """

    __slots__ = ("_deadline_ns", "_grace_ns", "_lease_grace_ns", "_timeout_at_ns", "ended_by", "kill_at_ns")

    def __init__(
        self,
        *,
        now_ns: int,
        timeout_s: float | None,
        grace_period_s: float,
        lease_grace_s: float,
        deadline_ns: int | None,
    ) -> None:
        self._timeout_at_ns = None if timeout_s is None else now_ns + round(timeout_s * _NS_PER_S)
        self._grace_ns = round(grace_period_s * _NS_PER_S)
        self._lease_grace_ns = round(lease_grace_s * _NS_PER_S)
        self._deadline_ns = deadline_ns
        self.ended_by: str | None = None
        self.kill_at_ns: int | None = None

    def move_deadline(self, deadline_ns: int | None) -> None:
        """The lease was renewed, shortened, or taken off. A stop under way only ever gets less time."""
        self._deadline_ns = deadline_ns
        if self.kill_at_ns is not None and deadline_ns is not None:
            self.kill_at_ns = min(self.kill_at_ns, deadline_ns)

    def next_ns(self) -> int | None:
        """When something is due by the clock; None if nothing ever is."""
        if self.ended_by is not None:
            return self.kill_at_ns
        lease_ns = self._lease_stop_ns()
        if lease_ns is None or self._timeout_at_ns is None:
            return lease_ns if self._timeout_at_ns is None else self._timeout_at_ns
        return min(lease_ns, self._timeout_at_ns)

    def request_stop(self, now_ns: int) -> bool:
        """Somebody asks for an end with grace. True if the stop signal is to be sent now; False if it has been."""
        return self._begin(STOP, now_ns, self._grace_ns)

    def request_kill(self, now_ns: int) -> None:
        """Somebody asks for an end at once."""
        if self.ended_by is None:
            self.ended_by = STOP
        self.kill_at_ns = now_ns

    def strike(self, now_ns: int) -> bool:
        """Look at the clock. True if a timeout or the lease has just ended the run: the stop signal is to be sent."""
        due_ns = self.next_ns()
        if self.ended_by is not None or due_ns is None or now_ns < due_ns:
            return False
        if due_ns == self._timeout_at_ns:
            return self._begin(TIMEOUT, now_ns, self._grace_ns)
        return self._begin(LEASE, now_ns, self._lease_grace_ns)

    def main_exited(self, now_ns: int) -> bool:
        """The main process has ended. True if by itself: what it left behind is to be told to go."""
        return self._begin(EXIT, now_ns, min(self._grace_ns, round(LEFTOVER_GRACE_S * _NS_PER_S)))

    def is_kill_due(self, now_ns: int) -> bool:
        """Whether whatever is left is to be killed now."""
        return self.kill_at_ns is not None and now_ns >= self.kill_at_ns

    def _begin(self, cause: str, now_ns: int, grace_ns: int) -> bool:
        if self.ended_by is not None:
            return False
        self.ended_by = cause
        self.kill_at_ns = now_ns + grace_ns
        if self._deadline_ns is not None:
            self.kill_at_ns = min(self.kill_at_ns, self._deadline_ns)
        return True

    def _lease_stop_ns(self) -> int | None:
        return None if self._deadline_ns is None else self._deadline_ns - self._lease_grace_ns
