"""Random schedules: whatever fails, every promise is kept, and a failure can be replayed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.scale import IS_LONG, scaled
from tests.simulation.faults import FAULTS
from tests.simulation.invariants import Violation
from tests.simulation.plants import report_before_store
from tests.simulation.simulator import run_schedule, run_schedules
from tests.simulation.undisturbed import undisturbed

_REPOSITORY = Path(__file__).resolve().parents[2]
_RATE_MIN = 2000


@pytest.mark.timeout(3600)
def test_every_promise_is_kept() -> None:
    """Thousands of schedules of faults of all kinds break no promise."""
    assert run_schedules(range(1, scaled(300, 20_000) + 1)) == scaled(300, 20_000)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", FAULTS)
def test_every_promise_is_kept_under_one_kind_of_fault(kind: str) -> None:
    """Each kind of fault alone, several times in each schedule."""
    run_schedules(range(1, scaled(8, 300) + 1), (kind,))


def test_a_schedule_follows_from_its_seed_alone() -> None:
    """In another process, with other hashes and addresses, the same seed gives the same trace."""
    command = [sys.executable, "-m", "tests.simulation", "--seed", "3", "--schedules", "4", "-v"]
    paths = [str(_REPOSITORY), *sys.path]
    traces = []
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, env=environment, cwd=_REPOSITORY, capture_output=True, text=True, check=True)
        traces.append([line for line in done.stdout.splitlines() if line.startswith(" ")])
    assert len(traces[0]) > 100
    assert traces[0] == traces[1]


def test_a_violation_says_how_to_replay_it() -> None:
    """It names the promise, the seed, and the one command that shows the schedule again."""
    with report_before_store(), pytest.raises(Violation) as violation:
        run_schedules(range(1, 100), ("kill",), replay=" --plant report-before-store")
    text = str(violation.value)
    seed = text.partition(":")[0].removeprefix("seed ")
    assert "before it is on its disk" in text
    assert text.endswith(f"python -m tests.simulation --seed {seed} -v --focus kill --plant report-before-store")
    lines: list[str] = []
    with undisturbed(), report_before_store(), pytest.raises(Violation, match=f"seed {seed}:"):
        run_schedule(int(seed), ("kill",), say=lines.append)
    assert any("VIOLATED" in line for line in lines)


@pytest.mark.skipif(not IS_LONG, reason="measures the machine; at full length only")
def test_two_thousand_schedules_a_minute() -> None:
    """One core does at least 2,000 schedules a minute."""
    run_schedules(range(1, 50))
    began_s = time.process_time()
    count = run_schedules(range(1, 1001))
    rate = count / (time.process_time() - began_s) * 60
    assert rate >= _RATE_MIN, f"{rate:.0f} schedules a minute"
