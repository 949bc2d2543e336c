"""The black-hole breaker, event by event, and against every order of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from remotegpu_queue import breaker
from remotegpu_queue.breaker import Breaker, Phase, Rules
from remotegpu_schemas.task import TaskId

RULES = Rules(failures=3, within_s=10.0, probe_interval_s=30.0, probe_max_interval_s=600.0)


def failed(state: Breaker, *task_ids: str, rules: Rules = RULES) -> Breaker:
    """These tasks have failed fast."""
    for task_id in task_ids:
        state = breaker.failed_fast(state, TaskId(task_id), f"{task_id} broke", rules, 1000)
    return state


def test_different_tasks_in_a_row_open_it() -> None:
    """The third different task that fails fast ends the claiming; the sentence says why."""
    state = failed(Breaker(), "a", "b")
    assert (state.phase, breaker.room(state, RULES, 0)) == (Phase.CLOSED, 1)
    state = failed(state, "c")
    assert (state.phase, state.opened_at_ms, breaker.room(state, RULES, 0)) == (Phase.OPEN, 1000, 0)
    assert breaker.sentence(state, RULES) == (
        "3 different tasks in a row failed within 10 s, the last one so: c broke. A canary finds out when this host "
        "works again (0 have failed so far)"
    )


def test_one_task_that_is_repeated_counts_once() -> None:
    """A bad task with a thousand retries does not stop a host."""
    assert failed(Breaker(), *["a"] * 1000).phase is Phase.CLOSED


def test_a_success_begins_the_row_anew() -> None:
    """Failures with successes between them are the tasks' own; a host that has proven itself has no bound."""
    state = breaker.proved(failed(Breaker(), "a", "b"))
    assert (state.streak, breaker.room(state, RULES, 50)) == ((), None)
    assert failed(state, "c", "d").phase is Phase.CLOSED


def test_an_unproven_host_risks_no_more_than_may_fail() -> None:
    """Before its first success, and after a failure, so many tasks may be under way as failures are allowed."""
    assert [breaker.room(Breaker(), RULES, unproven) for unproven in range(5)] == [3, 2, 1, 0, 0]
    assert breaker.room(failed(breaker.proved(Breaker()), "a"), RULES, 1) == 1


def test_the_way_back() -> None:
    """Canary, trial of one task, closed; a failed canary or trial doubles the pause, up to a bound."""
    state = failed(Breaker(), "a", "b", "c")
    pauses = []
    for _ in range(6):
        pauses.append(breaker.probe_pause_s(state, RULES))
        state = breaker.probe_ended(breaker.probe_began(state), has_passed=False, error="no disk")
    assert pauses == [30, 60, 120, 240, 480, 600]
    state = breaker.probe_ended(breaker.probe_began(state), has_passed=True)
    assert (state.phase, breaker.room(state, RULES, 0), breaker.room(state, RULES, 1)) == (Phase.TRIAL, 1, 0)
    assert failed(state, "d").phase is Phase.OPEN
    assert failed(state, "d").probes == 7
    assert breaker.proved(state) == Breaker(is_proven=True)


def test_what_began_before_the_opening_proves_nothing() -> None:
    """A success while it is open does not close it."""
    state = failed(Breaker(), "a", "b", "c")
    assert breaker.proved(state) == state
    assert breaker.proved(breaker.probe_began(state)).phase is Phase.PROBING


def test_it_is_off_where_nothing_may_fail() -> None:
    """`failures` 0: nothing opens it, nothing is bounded."""
    off = Rules(0, 10.0, 30.0, 600.0)
    state = failed(Breaker(), *"abcdefgh", rules=off)
    assert (state, breaker.room(state, off, 99)) == (Breaker(), None)


def test_over_restarts() -> None:
    """It stays open; a canary of the old process is not waited for; what was proven before a reboot is not any more."""
    probing = breaker.probe_began(failed(Breaker(), "a", "b", "c"))
    kept = breaker.restarted(breaker.from_text(breaker.to_text(probing)), is_same_boot=True)
    assert (kept.phase, kept.streak, kept.last_error) == (Phase.OPEN, ("a", "b", "c"), "c broke")
    proven = breaker.from_text(breaker.to_text(Breaker(is_proven=True)))
    assert breaker.restarted(proven, is_same_boot=True).is_proven
    assert not breaker.restarted(proven, is_same_boot=False).is_proven
    assert breaker.from_text('{"phase": "ajar"}') == breaker.from_text("nonsense") == Breaker()


@given(st.integers(1, 8), st.lists(st.integers(0, 7), max_size=60))
def test_f53_a_broken_host_burns_no_more_than_it_may(failures: int, batches: list[int]) -> None:
    """F53: whatever is claimed in whatever portions, on a host where every task fails at most K tasks ever fail."""
    rules = Rules(failures, 10.0, 30.0, 600.0)
    state, burnt, number, active = Breaker(), 0, 0, list[str]()
    for asked in [*batches, *[7] * 20]:
        room = breaker.room(state, rules, len(active))
        assert room is not None
        for _ in range(min(room, asked)):
            number += 1
            active.append(f"t-{number}")
        for _ in range(min(len(active), 1 + asked)):
            state, burnt = failed(state, active.pop(), rules=rules), burnt + 1
    assert burnt == failures
    assert state.phase is Phase.OPEN
