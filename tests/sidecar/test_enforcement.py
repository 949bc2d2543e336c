"""The first cause wins; nothing prolongs a stop; the lease's deadline bounds everything."""

from __future__ import annotations

from remotegpu_sidecar.enforcement import EXIT, LEASE, STOP, TIMEOUT, Enforcement

S = 1_000_000_000


def make(
    timeout_s: float | None = None, grace_s: float = 30.0, lease_grace_s: float = 10.0, deadline_s: float | None = None
) -> Enforcement:
    """A run that starts at second 100."""
    return Enforcement(
        now_ns=100 * S,
        timeout_s=timeout_s,
        grace_period_s=grace_s,
        lease_grace_s=lease_grace_s,
        deadline_ns=None if deadline_s is None else round(deadline_s * S),
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
    run.move_deadline(300 * S)
    assert run.next_ns() == 290 * S
    run.move_deadline(150 * S)
    assert run.next_ns() == 140 * S
    run.move_deadline(None)
    assert run.next_ns() is None


def test_renewal_does_not_prolong_a_stop_but_an_earlier_deadline_shortens_it() -> None:
    """Once the stop signal is out, time only gets less."""
    run = make(deadline_s=200)
    run.strike(190 * S)
    run.move_deadline(900 * S)
    assert run.kill_at_ns == 200 * S
    run.move_deadline(195 * S)
    assert run.kill_at_ns == 195 * S


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
