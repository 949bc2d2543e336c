"""What a plane makes of its looks at the server's clock."""

from __future__ import annotations

import pytest

from control_plane.store.server_clock import DRIFT, ServerClock


class Own:
    """A host's own clock, moved by hand."""

    time_s = 100.0

    def __call__(self) -> float:
        """Seconds since the host started."""
        return self.time_s


def test_clock_is_right_to_half_a_round_trip() -> None:
    """The server's time is taken to be that of the middle of the look."""
    own = Own()
    clock = ServerClock(own)
    clock.observe(99.0, 5000.0, 100.0)
    assert clock() == pytest.approx(5000.5)
    assert clock.error_s == pytest.approx(0.5)
    own.time_s += 10
    assert clock() == pytest.approx(5010.5)
    assert clock.error_s == pytest.approx(0.5 + 10 * DRIFT)


def test_slow_look_does_not_spoil_a_quick_one() -> None:
    """A look that took longer than the last one could be wrong by is not believed."""
    own = Own()
    clock = ServerClock(own)
    clock.observe(99.998, 5000.0, 100.0)
    own.time_s += 4
    clock.observe(100.0, 5004.0, 104.0)
    assert clock() == pytest.approx(5004.001)


def test_old_look_gives_way() -> None:
    """After a while a somewhat slower look is believed again, so that a server's clock that was set is followed."""
    own = Own()
    clock = ServerClock(own)
    clock.observe(99.998, 5000.0, 100.0)
    own.time_s += 100
    clock.observe(199.99, 6000.0, 200.0)
    assert clock() == pytest.approx(6000.005)
