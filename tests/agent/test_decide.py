"""What an answer means for a report: every kind with every verdict, young and old."""

from __future__ import annotations

from typing import Final

import pytest

from remotegpu_agent.reporter import Decision, Fate, decide
from remotegpu_schemas.limits import REPORT_GIVE_UP_S
from remotegpu_schemas.states import Cause
from remotegpu_schemas.wire import Verdict

KINDS: Final = ("start", "progress", "complete", "release")
OLD_S: Final = REPORT_GIVE_UP_S + 1

SAME_FOR_ALL: Final[dict[Verdict, tuple[Fate, Cause | None]]] = {
    Verdict.OK: (Fate.DELIVERED, None),
    Verdict.SUPERSEDED: (Fate.DROPPED, Cause.SUPERSEDED),
    Verdict.INVALID: (Fate.DEAD, None),
    Verdict.RETRY: (Fate.AGAIN, None),
    Verdict.UNAUTHORIZED: (Fate.AGAIN, None),
}
BY_KIND: Final[dict[tuple[Verdict, str], tuple[Fate, Cause | None]]] = {
    (Verdict.FINISHED, "start"): (Fate.DROPPED, Cause.SUPERSEDED),
    (Verdict.FINISHED, "progress"): (Fate.DROPPED, Cause.SUPERSEDED),
    (Verdict.FINISHED, "complete"): (Fate.DELIVERED, None),
    (Verdict.FINISHED, "release"): (Fate.DROPPED, Cause.SUPERSEDED),
    (Verdict.LEASE_EXPIRED, "start"): (Fate.DROPPED, Cause.LEASE_LOST),
    (Verdict.LEASE_EXPIRED, "progress"): (Fate.DROPPED, Cause.LEASE_LOST),
    (Verdict.LEASE_EXPIRED, "complete"): (Fate.DEAD, Cause.LEASE_LOST),
    (Verdict.LEASE_EXPIRED, "release"): (Fate.DROPPED, Cause.LEASE_LOST),
    (Verdict.AMBIGUOUS, "start"): (Fate.AGAIN, None),
    (Verdict.AMBIGUOUS, "progress"): (Fate.AGAIN, None),
    (Verdict.AMBIGUOUS, "complete"): (Fate.AGAIN, None),
    (Verdict.AMBIGUOUS, "release"): (Fate.AGAIN, None),
    (Verdict.ROUTE_MISSING, "start"): (Fate.AGAIN, None),
    (Verdict.ROUTE_MISSING, "progress"): (Fate.DROPPED, None),
    (Verdict.ROUTE_MISSING, "complete"): (Fate.AGAIN, None),
    (Verdict.ROUTE_MISSING, "release"): (Fate.DROPPED, None),
}
EXPECTED: Final = {
    **{(verdict, kind): fate for verdict, fate in SAME_FOR_ALL.items() for kind in KINDS},
    **BY_KIND,
}
IS_GIVEN_UP: Final = {Verdict.AMBIGUOUS, Verdict.ROUTE_MISSING}


def test_the_table_is_whole() -> None:
    """No verdict and no kind is left out."""
    assert set(EXPECTED) == {(verdict, kind) for verdict in Verdict for kind in KINDS}


@pytest.mark.parametrize(("verdict", "kind"), EXPECTED)
def test_every_answer_has_its_consequence(verdict: Verdict, kind: str) -> None:
    """Fate and stop cause, for a report that is young and for one at the last second before it is given up."""
    for age_s in (0.0, REPORT_GIVE_UP_S):
        decision = decide(kind, verdict, age_s)
        assert (decision.fate, decision.stop) == EXPECTED[verdict, kind]


@pytest.mark.parametrize(("verdict", "kind"), EXPECTED)
def test_age_matters_for_ambiguous_answers_alone(verdict: Verdict, kind: str) -> None:
    """After 24 h of bare 404s a report becomes a dead letter; an outage of any length costs delay only."""
    fate, stop = EXPECTED[verdict, kind]
    if fate is Fate.AGAIN and verdict in IS_GIVEN_UP:
        fate = Fate.DEAD
    decision = decide(kind, verdict, OLD_S)
    assert (decision.fate, decision.stop) == (fate, stop)


@pytest.mark.parametrize("kind", KINDS)
def test_f17_f51_how_fast_it_is_tried_again(kind: str) -> None:
    """An outage is met fast and at most every minute; a bad token and a hiccup slower and slower, up to 5 min."""
    assert decide(kind, Verdict.RETRY, 0) == Decision(Fate.AGAIN, base_s=0.5, cap_s=60.0)
    assert decide(kind, Verdict.UNAUTHORIZED, 0) == Decision(Fate.AGAIN, base_s=5.0, cap_s=300.0)
    assert decide(kind, Verdict.AMBIGUOUS, 0) == Decision(Fate.AGAIN, base_s=1.0, cap_s=300.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("verdict", [Verdict.AMBIGUOUS, Verdict.ROUTE_MISSING, Verdict.RETRY, Verdict.UNAUTHORIZED])
def test_f51_nothing_ambiguous_ever_kills(verdict: Verdict, kind: str) -> None:
    """F51: only 30001-30004 stop a process, at any age."""
    assert decide(kind, verdict, 0).stop is None
    assert decide(kind, verdict, OLD_S).stop is None
