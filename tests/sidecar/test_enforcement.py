"""The first cause wins; nothing prolongs a stop; the lease's deadline bounds everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_sidecar.enforcement import EXIT, LEASE, STOP, TIMEOUT, Enforcement

S = 1_000_000_000


def make(
    timeout_s: float | None = None,
    grace_s: float = 30.0,
    lease_grace_s: float = 10.0,
    deadline_s: float | None = None,
    warn_before_s: float | None = None,
    lease_warn_s: float | None = None,
) -> Enforcement:
    """A run that starts at second 100."""
    return Enforcement(
        now_ns=100 * S,
        timeout_s=timeout_s,
        grace_period_s=grace_s,
        lease_grace_s=lease_grace_s,
        deadline_ns=None if deadline_s is None else round(deadline_s * S),
        warn_before_s=warn_before_s,
        lease_warn_s=lease_warn_s,
    )


def test_nothing_is_due_without_timeout_and_lease() -> None:
    """A run without limits never strikes."""
    run = make()
    assert run.next_ns() is None
    assert not run.strike(10**6 * S)


def test_timeout_strikes_once() -> None:
    """The stop signal is sent at the timeout, the kill after the grace period."""
    run = make(timeout_s=5)
    assert run.next_ns() == 105 * S
    assert not run.strike(105 * S - 1)
    assert run.strike(105 * S)
    assert not run.strike(106 * S)
    assert (run.ended_by, run.kill_at_ns) == (TIMEOUT, 135 * S)
    assert not run.is_kill_due(134 * S)
    assert run.is_kill_due(135 * S)


def test_lease_is_stopped_before_its_deadline() -> None:
    """The stop signal comes a lease grace early, the kill at the deadline."""
    run = make(deadline_s=200)
    assert run.next_ns() == 190 * S
    assert run.strike(190 * S)
    assert (run.ended_by, run.kill_at_ns) == (LEASE, 200 * S)


def test_late_look_at_a_lease_still_kills_at_the_deadline() -> None:
    """After a suspend there may be no grace left."""
    run = make(deadline_s=200)
    assert run.strike(250 * S)
    assert run.is_kill_due(250 * S)


def test_grace_of_any_stop_ends_at_the_deadline() -> None:
    """A timeout or stop request shortly before the deadline gets less grace."""
    run = make(deadline_s=200)
    assert run.request_stop(185 * S)
    assert run.kill_at_ns == 200 * S


def test_earlier_of_timeout_and_lease_wins() -> None:
    """Even if both are over when somebody looks."""
    assert make(timeout_s=50, deadline_s=200).next_ns() == 150 * S
    run = make(timeout_s=95, deadline_s=200)
    run.strike(500 * S)
    assert run.ended_by == LEASE


def test_renewal_moves_the_strike() -> None:
    """Both ways."""
    run = make(deadline_s=200)
    run.move_deadline(300 * S, 110 * S)
    assert run.next_ns() == 290 * S
    run.move_deadline(150 * S, 111 * S)
    assert run.next_ns() == 140 * S
    run.move_deadline(None, 112 * S)
    assert run.next_ns() is None


def test_renewal_does_not_prolong_a_stop_but_an_earlier_deadline_shortens_it() -> None:
    """Once the stop signal is out, time only gets less."""
    run = make(deadline_s=200)
    run.strike(190 * S)
    run.move_deadline(900 * S, 191 * S)
    assert run.kill_at_ns == 200 * S
    run.move_deadline(195 * S, 192 * S)
    assert run.kill_at_ns == 195 * S


@given(st.floats(1, 600), st.floats(0, 600), st.lists(st.floats(0.1, 1.0), min_size=1, max_size=30))
def test_a_lease_that_is_renewed_in_time_is_kept_whatever_its_length(
    ttl_s: float, grace_s: float, shares: list[float]
) -> None:
    """Renewals of any shorter length, each as soon as a third of the last one is over: nothing is ever stopped.

    Without further ones the stop comes before the last deadline, and the kill at it at the latest.
    """
    now_ns, deadline_ns = 100 * S, 100 * S + round(ttl_s * S)
    run = make(grace_s=grace_s, lease_grace_s=min(grace_s, ttl_s / 3), deadline_s=deadline_ns / S)
    for number, share in enumerate(shares, 1):
        now_ns += (deadline_ns - now_ns) // 3
        while (due_ns := run.next_ns() or 0) < now_ns:  # its timer strikes, and it looks
            run.move_deadline(deadline_ns, due_ns)
            assert not run.strike(due_ns)
        before_ns, deadline_ns = deadline_ns, now_ns + round(ttl_s * share * S) + number  # never twice the same
        if deadline_ns < before_ns:  # it is told
            run.move_deadline(deadline_ns, now_ns)
            assert not run.strike(now_ns)
    while (due_ns := run.next_ns() or 0) < deadline_ns and not run.ended_by:
        run.move_deadline(deadline_ns, due_ns)
        run.strike(due_ns)
    run.strike(deadline_ns)
    assert run.ended_by == LEASE
    assert run.kill_at_ns is not None
    assert run.kill_at_ns <= deadline_ns


def test_shorter_renewals_shorten_the_grace_period_of_the_lease() -> None:
    """A plane that grants 10 s where the claim had 60: the stop comes in the middle, not at once."""
    run = make(grace_s=30, lease_grace_s=20, deadline_s=160)
    run.move_deadline(130 * S, 120 * S)
    assert run.next_ns() == 125 * S
    run.move_deadline(200 * S, 125 * S)
    assert run.next_ns() == 180 * S


def test_first_cause_stays() -> None:
    """Whatever comes later."""
    run = make(timeout_s=5)
    assert run.request_stop(101 * S)
    assert not run.request_stop(102 * S)
    assert not run.strike(200 * S)
    assert not run.main_exited(103 * S)
    run.request_kill(104 * S)
    assert (run.ended_by, run.kill_at_ns) == (STOP, 104 * S)


def test_leftovers_of_a_natural_end_get_two_seconds() -> None:
    """Or the grace period, if that is shorter, and never more than the lease."""
    for grace_s, deadline_s, seconds in ((30, None, 2), (0.5, None, 0.5), (30, 101.0, 1)):
        run = make(grace_s=grace_s, lease_grace_s=0, deadline_s=deadline_s)
        assert run.main_exited(100 * S)
        assert (run.ended_by, run.kill_at_ns) == (EXIT, 100 * S + round(seconds * S))


def test_kill_after_the_natural_end_keeps_the_cause() -> None:
    """The main process was first."""
    run = make()
    run.main_exited(100 * S)
    run.request_kill(101 * S)
    assert (run.ended_by, run.kill_at_ns) == (EXIT, 101 * S)


# --- warnings ---


def test_warning_comes_before_the_timeout_once() -> None:
    """It is the next thing that is due, and after it the timeout is."""
    run = make(timeout_s=60, warn_before_s=20)
    assert run.next_ns() == 140 * S
    assert not run.warn(140 * S - 1)
    assert run.warn(140 * S)
    assert not run.warn(141 * S)
    assert run.next_ns() == 160 * S
    assert run.strike(160 * S)


def test_warning_comes_before_the_stop_of_the_lease_and_a_renewal_takes_it_back() -> None:
    """Each deadline has its own; one that was renewed in time has none."""
    run = make(deadline_s=200, lease_warn_s=30)
    assert run.next_ns() == 160 * S
    run.move_deadline(300 * S, 150 * S)
    assert run.next_ns() == 260 * S
    assert not run.warn(200 * S)
    assert run.warn(260 * S)
    assert not run.warn(270 * S)
    run.move_deadline(300 * S, 270 * S)
    assert not run.warn(271 * S), "the same deadline, read again"
    run.move_deadline(400 * S, 272 * S)
    assert run.next_ns() == 360 * S
    assert run.warn(360 * S)


def test_timeout_and_lease_warn_each_for_itself() -> None:
    """Both, or one signal for both if they fall together."""
    run = make(timeout_s=60, deadline_s=200, warn_before_s=20, lease_warn_s=20)
    assert run.warn(140 * S)
    assert run.next_ns() == 160 * S
    assert run.strike(160 * S)
    run = make(timeout_s=90, deadline_s=200, warn_before_s=20, lease_warn_s=20)
    assert run.warn(170 * S)
    assert not run.warn(170 * S)


@pytest.mark.parametrize(("timeout_s", "deadline_s"), [(20, None), (19, None), (None, 130.0), (None, 120.0)])
def test_warning_that_would_be_due_at_the_start_is_left_out(timeout_s: float | None, deadline_s: float | None) -> None:
    """A timeout or a lease shorter than the warning's time warns nobody."""
    run = make(timeout_s=timeout_s, deadline_s=deadline_s, warn_before_s=20, lease_warn_s=20)
    for second in range(100, 118):
        assert not run.warn(second * S)


def test_who_is_ending_is_not_warned() -> None:
    """The stop signal has been sent; a warning would only confuse."""
    run = make(timeout_s=60, deadline_s=200, warn_before_s=20, lease_warn_s=20)
    run.request_stop(110 * S)
    assert not run.warn(150 * S)


def test_without_a_request_nobody_is_warned() -> None:
    """No `warn`, no signal."""
    run = make(timeout_s=60, deadline_s=200)
    assert not any(run.warn(second * S) for second in range(100, 300))


# --- suspended ---


def test_timeout_stands_still_while_suspended() -> None:
    """And its warning with it; both come later by as long as the run stood still."""
    run = make(timeout_s=60, warn_before_s=20)
    assert run.suspend(130 * S)
    assert run.is_suspended
    assert run.next_ns() is None
    assert not run.strike(1000 * S)
    assert not run.warn(1000 * S)
    assert run.resume(1030 * S)
    assert run.next_ns() == 1040 * S
    assert run.warn(1040 * S)
    assert not run.strike(1060 * S - 1)
    assert run.strike(1060 * S)


def test_lease_goes_on_while_suspended() -> None:
    """Its warning and its stop come as they would, and renewals count."""
    run = make(timeout_s=60, deadline_s=200, warn_before_s=20, lease_warn_s=30)
    run.suspend(110 * S)
    assert run.next_ns() == 160 * S
    assert run.warn(160 * S)
    run.move_deadline(300 * S, 165 * S)
    assert not run.strike(190 * S)
    assert run.strike(290 * S)
    assert (run.ended_by, run.kill_at_ns, run.is_suspended) == (LEASE, 300 * S, False)


def test_suspending_and_resuming_twice_change_nothing() -> None:
    """Level, not edge: the second request is no news."""
    run = make(timeout_s=60)
    assert not run.resume(101 * S)
    assert run.suspend(110 * S)
    assert not run.suspend(120 * S)
    assert run.resume(130 * S)
    assert not run.resume(140 * S)
    assert run.next_ns() == 180 * S


def test_whole_timeline_of_suspensions_adds_up() -> None:
    """However often a run is suspended, it gets its whole timeout of running time."""
    run = make(timeout_s=60)
    for number in range(10):
        run.suspend((110 + 100 * number) * S)
        run.resume((110 + 100 * number + 95) * S)
    assert run.next_ns() == (160 + 950) * S


EVENTS = ("stop", "kill", "exit", "timeout", "lease", "suspend", "resume", "warn")
CAUSES = {"stop": STOP, "kill": STOP, "exit": EXIT, "timeout": TIMEOUT, "lease": LEASE}


def _happen(run: Enforcement, event: str, now_ns: int) -> None:
    match event:
        case "stop":
            run.request_stop(now_ns)
        case "kill":
            run.request_kill(now_ns)
        case "exit":
            run.main_exited(now_ns)
        case "timeout":
            run.strike(170 * S)
        case "lease":
            run.move_deadline(now_ns + S, now_ns)
            run.strike(now_ns + S)
        case "suspend":
            run.suspend(now_ns)
        case "resume":
            run.resume(now_ns)
        case _:
            run.warn(now_ns)


@pytest.mark.parametrize("events", list(itertools.product(EVENTS, repeat=3)), ids="-".join)
def test_every_order_of_three_events_has_one_outcome(events: tuple[str, ...]) -> None:
    """F31: the first end counts, the kill time never moves later, and what is ending stands still no more."""
    run = make(timeout_s=60, deadline_s=500, warn_before_s=20, lease_warn_s=20)
    wanted: str | None = None
    is_suspended = False
    for number, event in enumerate(events):
        kill_before_ns = run.kill_at_ns
        _happen(run, event, (110 + number) * S)
        if wanted is None and event in CAUSES and not (event == "timeout" and is_suspended):
            wanted = CAUSES[event]
        is_suspended = wanted is None and (event == "suspend" or (is_suspended and event != "resume"))
        assert (run.ended_by, run.is_suspended) == (wanted, is_suspended)
        assert (run.kill_at_ns is None) == (wanted is None)
        if kill_before_ns is not None and event != "kill":
            assert run.kill_at_ns is not None
            assert run.kill_at_ns <= kill_before_ns
