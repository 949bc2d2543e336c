"""What ends a run, and when: stop request, timeout, lease, natural end. Pure: no clock, no process, no file.

All times are nanoseconds on CLOCK_BOOTTIME. The shim asks `next_ns` when to look again, and does what is due. While a
run is suspended its timeout stands still; its lease does not. Standard library only.
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

    A warning is due `warn_before_s` before the timeout and `lease_warn_s` before the lease's stop, once for each of
    them, and again for each renewed lease. One that would be due at the start already is left out: a task that has not
    begun has nothing to save, and no handler yet.

    The lease's grace period is the spec's until the deadline first moves. From then on it is at most half of what is
    left: a plane may grant less from one renewal to the next. Half, because the shim looks when a third of a lease is
    over at least: with renewals in time, a grace period of a third of the lease is kept whole.
    """

    __slots__ = (
        "_deadline_ns",
        "_grace_ns",
        "_is_lease_warned",
        "_is_timeout_warned",
        "_lease_grace_max_ns",
        "_lease_grace_ns",
        "_lease_warn_ns",
        "_suspended_at_ns",
        "_timeout_at_ns",
        "_warn_ns",
        "ended_by",
        "kill_at_ns",
    )

    def __init__(
        self,
        *,
        now_ns: int,
        timeout_s: float | None,
        grace_period_s: float,
        lease_grace_s: float,
        deadline_ns: int | None,
        warn_before_s: float | None = None,
        lease_warn_s: float | None = None,
    ) -> None:
        self._timeout_at_ns = None if timeout_s is None else now_ns + round(timeout_s * _NS_PER_S)
        self._grace_ns = round(grace_period_s * _NS_PER_S)
        self._lease_grace_max_ns = self._lease_grace_ns = round(lease_grace_s * _NS_PER_S)
        self._warn_ns = _ns(warn_before_s)
        self._lease_warn_ns = _ns(lease_warn_s)
        self._deadline_ns = deadline_ns
        self._suspended_at_ns: int | None = None
        self._is_timeout_warned = self._is_lease_warned = False
        self.ended_by: str | None = None
        self.kill_at_ns: int | None = None
        self.warn(now_ns)

    @property
    def is_suspended(self) -> bool:
        """Whether the run stands still, and with it the timeout's clock."""
        return self._suspended_at_ns is not None

    def move_deadline(self, deadline_ns: int | None, now_ns: int) -> None:
        """The lease was renewed, shortened, or taken off. A stop under way only ever gets less time."""
        if deadline_ns != self._deadline_ns:
            self._is_lease_warned = False
            if deadline_ns is not None:
                self._lease_grace_ns = min(self._lease_grace_max_ns, max(0, deadline_ns - now_ns) // 2)
        self._deadline_ns = deadline_ns
        if self.kill_at_ns is not None and deadline_ns is not None:
            self.kill_at_ns = min(self.kill_at_ns, deadline_ns)

    def next_ns(self) -> int | None:
        """When something is due by the clock; None if nothing ever is."""
        if self.ended_by is not None:
            return self.kill_at_ns
        times = (self._timeout_ns(), self._lease_stop_ns(), self._timeout_warning_ns(), self._lease_warning_ns())
        return min((time_ns for time_ns in times if time_ns is not None), default=None)

    def suspend(self, now_ns: int) -> bool:
        """The run is to stand still. False if it does already, or is ending: an end is never held up."""
        if self.ended_by is not None or self._suspended_at_ns is not None:
            return False
        self._suspended_at_ns = now_ns
        return True

    def resume(self, now_ns: int) -> bool:
        """The run is to go on; its timeout is later by as long as it stood still. False if it is not suspended."""
        if self._suspended_at_ns is None:
            return False
        if self._timeout_at_ns is not None:
            self._timeout_at_ns += now_ns - self._suspended_at_ns
        self._suspended_at_ns = None
        return True

    def request_stop(self, now_ns: int) -> bool:
        """Somebody asks for an end with grace. True if the stop signal is to be sent now; False if it has been."""
        return self._begin(STOP, now_ns, self._grace_ns)

    def request_kill(self, now_ns: int) -> None:
        """Somebody asks for an end at once."""
        if self.ended_by is None:
            self.ended_by = STOP
            self._suspended_at_ns = None
        self.kill_at_ns = now_ns

    def strike(self, now_ns: int) -> bool:
        """Look at the clock. True if a timeout or the lease has just ended the run: the stop signal is to be sent."""
        if self.ended_by is not None:
            return False
        timeout_ns, lease_ns = self._timeout_ns(), self._lease_stop_ns()
        due = [
            (time_ns, cause)
            for time_ns, cause in ((timeout_ns, TIMEOUT), (lease_ns, LEASE))
            if time_ns is not None and now_ns >= time_ns
        ]
        if not due:
            return False
        # Of two that are over the earlier one has ended it, at the same time the timeout.
        _, cause = min(due, key=lambda each: each[0])
        return self._begin(cause, now_ns, self._grace_ns if cause == TIMEOUT else self._lease_grace_ns)

    def warn(self, now_ns: int) -> bool:
        """Look at the clock. True if a warning is to be sent now; each is due once."""
        if self.ended_by is not None:
            return False
        timeout_ns, lease_ns = self._timeout_warning_ns(), self._lease_warning_ns()
        is_timeout_due = timeout_ns is not None and now_ns >= timeout_ns
        is_lease_due = lease_ns is not None and now_ns >= lease_ns
        self._is_timeout_warned = self._is_timeout_warned or is_timeout_due
        self._is_lease_warned = self._is_lease_warned or is_lease_due
        return is_timeout_due or is_lease_due

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
        self._suspended_at_ns = None
        self.kill_at_ns = now_ns + grace_ns
        if self._deadline_ns is not None:
            self.kill_at_ns = min(self.kill_at_ns, self._deadline_ns)
        return True

    def _timeout_ns(self) -> int | None:
        return self._timeout_at_ns if self._suspended_at_ns is None else None

    def _lease_stop_ns(self) -> int | None:
        return None if self._deadline_ns is None else self._deadline_ns - self._lease_grace_ns

    def _timeout_warning_ns(self) -> int | None:
        timeout_ns = self._timeout_ns()
        if timeout_ns is None or self._warn_ns is None or self._is_timeout_warned:
            return None
        return timeout_ns - self._warn_ns

    def _lease_warning_ns(self) -> int | None:
        stop_ns = self._lease_stop_ns()
        if stop_ns is None or self._lease_warn_ns is None or self._is_lease_warned:
            return None
        return stop_ns - self._lease_warn_ns


def _ns(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * _NS_PER_S)
