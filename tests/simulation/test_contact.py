"""Losses of contact on the virtual clock, for leases of every length: short ones kill nothing, long ones in time."""

from __future__ import annotations

from collections import Counter
from typing import Final

import pytest

from remotegpu_agent.config import Config
from remotegpu_queue import leasing
from tests.docs.fault_rows import ROWS
from tests.scale import scaled
from tests.simulation.simulator import Scene, Simulation
from tests.simulation.undisturbed import undisturbed

_TTLS_S: Final = (5.0, 8.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
_LOSS_S: Final = 60.0
_ROUNDS: Final = scaled(10, 200)
_DEFAULTS: Final = Config()
_MANY_FAILURES: Final = 20
_CALL_SHARE: Final = 0.25
"""Of a lease; a renewal that is not answered by then is made again."""


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


def _renewed_every_s(ttl_s: float) -> float:
    return leasing.renew_after_s(ttl_s, _DEFAULTS.lease.renew_interval, 0.0)


def _worst_use_s(ttl_s: float, *, refuses: bool) -> float:
    """How much of a lease a loss of 60 s takes at most, from the last renewal before it to the first one after it.

    The loss begins when the lease is about to be renewed. A renewal that hangs may have begun right before its end, and
    only after a pause comes the next. Before the lease's end lie its margin, the grace period and the `Date` header's
    cut-off second: 2/3 of a lease less margin and grace are 60 s at 142.5 s, but that leaves no time to notice.
    """
    hangs_s = 0.0 if refuses else _CALL_SHARE * ttl_s
    pause_s = leasing.renew_again_after_s(ttl_s, _MANY_FAILURES, 1.0)
    grace_s = leasing.lease_grace_s(_DEFAULTS.tasks.grace_period, ttl_s)
    margin_s = leasing.margin_s(ttl_s, _DEFAULTS.lease.margin)
    return _renewed_every_s(ttl_s) + _LOSS_S + hangs_s + pause_s + margin_s + grace_s + 1.0


def _holds_from_s(*, refuses: bool) -> int:
    """The shortest lease, in whole seconds, that outlasts it with the default config."""
    return next(ttl_s for ttl_s in range(1, 3600) if _worst_use_s(ttl_s, refuses=refuses) < ttl_s)


_LEASES_S: Final = [
    (float(ttl_s), refuses)
    for refuses in (False, True)
    for ttl_s in (_holds_from_s(refuses=refuses), 180, 200, 240, 270, 300, 450, 600, 900, 1800, 3600)
    if ttl_s >= _holds_from_s(refuses=refuses)
]


@pytest.mark.parametrize(("ttl_s", "refuses"), _LEASES_S)
def test_f55_a_minute_without_contact_kills_nothing_with_the_default_config(ttl_s: float, refuses: bool) -> None:
    """F55: for every lease from the shortest on that can outlast it, whether connections hang or are refused."""
    for seed in range(_ROUNDS):
        cut_at_s = 5.0 + _renewed_every_s(ttl_s) * seed / _ROUNDS
        scene = Scene(
            lease_ttl_s=ttl_s,
            task_s=cut_at_s + 2.0 * ttl_s,
            cut_at_s=cut_at_s,
            cut_s=_LOSS_S,
            cut_refuses=refuses,
            has_defaults=True,
        )
        seen = _play(seed, scene)
        assert (seen["trees"], seen["results accepted"], seen["leases lapsed"]) == (1, 1, 0)
        assert not seen["ended by their lease"]


def test_f55_the_document_says_from_which_lease_on() -> None:
    """F55: the shortest leases in the table of faults are those of the default config, whose own lease is longer."""
    hanging_s, refused_s = _holds_from_s(refuses=False), _holds_from_s(refuses=True)
    assert f"from a lease of {hanging_s} s on ({_DEFAULTS.lease.ttl:g} s is the default)" in ROWS["F55"].figure
    assert f"from {refused_s} s on where connections are refused" in ROWS["F55"].figure
    assert hanging_s <= _DEFAULTS.lease.ttl


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
