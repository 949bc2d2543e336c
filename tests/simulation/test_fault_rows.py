"""Rows of the fault table by simulation: schedules full of one fault, which must keep every promise.

The same rows with real processes, files and HTTP are in the other folders.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import pytest

from tests.scale import scaled
from tests.simulation import faults
from tests.simulation.simulator import run_schedule
from tests.simulation.undisturbed import undisturbed

pytestmark = pytest.mark.timeout(600)

_SCHEDULES: Final = scaled(40, 1000)


def _run(*kinds: str) -> Counter[str]:
    """Schedules of these faults; what happened in all of them."""
    seen: Counter[str] = Counter()
    with undisturbed():
        for seed in range(1, _SCHEDULES + 1):
            seen += run_schedule(seed, kinds).judge.seen
    return seen


def test_f02_killed_after_storing_before_launch() -> None:
    """F02: launched after the restart if the lease still holds, else returned or lapsed; once."""
    seen = _run("kill at commit", "kill at directory")
    assert seen["agents killed"]
    assert seen["results accepted"]


def test_f03_killed_between_launch_and_storing_the_identity() -> None:
    """F03: adopted from the attempt directory; once."""
    seen = _run("kill at shim", "kill at tree")
    assert seen["agents killed"]
    assert seen["runs adopted"]


def test_f06_killed_after_the_report_before_the_answer() -> None:
    """F06: sent again, counted once."""
    seen = _run("kill at arrive complete", "kill at send complete")
    assert seen["agents killed"]
    assert seen["completes repeated"]


def test_f07_killed_at_random_moments() -> None:
    """F07: all results right, none twice."""
    seen = _run("kill", "kill after steps", "kill at a point")
    assert seen["agents killed"] > _SCHEDULES
    assert seen["results accepted"] > _SCHEDULES


def test_f13_lost_answers() -> None:
    """F13: claim, start, renew, progress and complete are repeated, and count once."""
    seen = _run("lose answers")
    assert seen["claims repeated"]
    assert seen["completes repeated"]
    assert seen["starts repeated"]


def test_f20_wall_clocks_jump_by_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """F20: whether wall clocks jump or not, the same schedules come to the same: no lease, run or result differs."""
    with_jumps = _run("jump clock")
    assert with_jumps["clocks jumped"] > _SCHEDULES
    assert with_jumps["results accepted"] > _SCHEDULES
    monkeypatch.setattr(faults, "JUMP_MAX_S", 0.0)
    assert _run("jump clock") == with_jumps


def test_f31_everything_at_the_same_moment() -> None:
    """F31: of timeout, cancellation, stop and natural end one is the outcome; once."""
    seen = _run("collide")
    assert seen["results accepted"] > _SCHEDULES


def test_f42_capacity_after_any_kill() -> None:
    """F42: whatever was killed, slots and CPUs are never given out twice; GPUs come with their allocator."""
    seen = _run("kill", "kill after steps", "cut power", "stop", "lose shim")
    assert seen["agents killed"]
    assert seen["trees"] > _SCHEDULES


def test_f10_f11_frozen_or_cut_off_past_a_lease() -> None:
    """F10, F11: the shim kills at the deadline, whatever the agent can do."""
    seen = _run("freeze", "cut off")
    assert seen["ended by their lease"]


def test_f14_taken_away_or_lied_to() -> None:
    """F14: the own process is stopped, the newer attempt is never touched."""
    seen = _run("take away", "lies")
    assert seen["taken away"]
    assert seen["results accepted"]


def test_f18_f51_overload_and_hiccups() -> None:
    """F18, F51: Retry-After, bare 404, 409 and 410 cost delay only."""
    assert _run("overload", "hiccups", "garble", "wrong token")["results accepted"] > _SCHEDULES
