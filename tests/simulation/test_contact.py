"""Losses of contact on the virtual clock, for leases of every length: short ones kill nothing, long ones in time."""

from __future__ import annotations

from collections import Counter
from typing import Final

import pytest

from tests.scale import scaled
from tests.simulation.simulator import Scene, Simulation
from tests.simulation.undisturbed import undisturbed

_TTLS_S: Final = (5.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
_LOSS_S: Final = 60.0
_ROUNDS: Final = scaled(10, 200)


def _play(seed: int, scene: Scene) -> Counter[str]:
    with undisturbed():
        simulation = Simulation(seed, scene=scene)
        try:
            simulation.run()
        finally:
            simulation.unwind()
    return simulation.judge.seen


@pytest.mark.parametrize("ttl_s", [ttl_s for ttl_s in _TTLS_S if ttl_s >= 4 * _LOSS_S])
def test_f55_a_minute_without_contact_kills_nothing(ttl_s: float) -> None:
    """F55: 60 s, at any moment between two renewals; the one run ends by itself and is reported once."""
    for seed in range(_ROUNDS):
        cut_at_s = 5.0 + (ttl_s / 3) * seed / _ROUNDS
        scene = Scene(lease_ttl_s=ttl_s, task_s=cut_at_s + 2.0 * ttl_s, cut_at_s=cut_at_s, cut_s=_LOSS_S)
        seen = _play(seed, scene)
        assert (seen["trees"], seen["results accepted"], seen["leases lapsed"]) == (1, 1, 0)
        assert not seen["ended by their lease"]


@pytest.mark.parametrize("term_s", [0.1, None], ids=["heeds", "ignores"])
@pytest.mark.parametrize("ttl_s", _TTLS_S)
def test_f11_a_loss_longer_than_the_lease_kills_in_time(ttl_s: float, term_s: float | None) -> None:
    """F11: whether or not the task heeds its stop signal, its tree is dead when the plane's lease ends.

    (The judge looks at the moment of that end.) Afterwards the task runs again, to its result.
    """
    for seed in range(_ROUNDS):
        cut_at_s = 5.0 + (ttl_s / 3) * seed / _ROUNDS
        scene = Scene(
            lease_ttl_s=ttl_s, task_s=cut_at_s + 1.6 * ttl_s, cut_at_s=cut_at_s, cut_s=1.7 * ttl_s, term_s=term_s
        )
        seen = _play(seed, scene)
        assert seen["ended by their lease"] == 1
        assert (seen["trees"], seen["results accepted"], seen["leases lapsed"]) == (2, 1, 1)


def test_f12_a_loss_longer_than_the_lease_with_continue() -> None:
    """F12: with `on_unreachable: continue` the run goes on to its end, and its late result counts."""
    for seed in range(_ROUNDS):
        scene = Scene(lease_ttl_s=15.0, task_s=60.0, cut_at_s=10.0, cut_s=45.0, continues=True)
        seen = _play(seed, scene)
        assert not seen["ended by their lease"]
        assert seen["leases lapsed"] == 1
