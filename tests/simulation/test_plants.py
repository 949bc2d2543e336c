"""The simulator bites: each of six planted bugs breaks a promise within a minute."""

from __future__ import annotations

import re
import time
from typing import Final

import pytest

from tests.simulation.invariants import Violation
from tests.simulation.plants import PLANTS
from tests.simulation.simulator import run_schedules

_WITHIN_S: Final = 60.0
_SCHEDULES_MAX: Final = 3000

_FOUND_BY: Final = {
    "no-fencing": "lives on after the end of its lease|two process trees",
    "late-deadline-base": "lives on after the end of its lease|two process trees|started after its lease",
    "update-without-attempt-id": "no rest|goes from|is reported|says that|more than it has",
    "report-before-store": "before it is on its disk",
    "claim-without-request-id": "has not heard what it was given",
    "renew-failure-ignored": "lives on after the end of its lease|two process trees",
}


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found(name: str) -> None:
    """Within a minute of processor time, and by the promise that it breaks."""
    began_s = time.process_time()
    with PLANTS[name](), pytest.raises(Violation) as violation:
        run_schedules(range(1, _SCHEDULES_MAX))
    assert re.search(_FOUND_BY[name], str(violation.value)), str(violation.value)
    assert time.process_time() - began_s < _WITHIN_S
