"""Which tasks of a group start when: every mode and rule, without a database."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.dependencies import (
    GroupState,
    Member,
    OnFailure,
    Rules,
    Standing,
    Steps,
    When,
    circle_in,
    next_steps,
    state_of,
)


def rules(on_failure: OnFailure = OnFailure.STOP, max_parallel: int | None = None, *, cancelled: bool = False) -> Rules:
    """The rules of a group."""
    return Rules(on_failure, max_parallel, cancelled)


def member(name: str, standing: str = "waiting", *depends_on: str, when: str = "success") -> Member:
    """A task."""
    return Member(name, depends_on, When(when), Standing(standing))


def skipped(steps: Steps) -> list[str]:
    """The names of what is skipped."""
    return [skip.name for skip in steps.skipped]


def test_roots_start() -> None:
    """What depends on nothing, in the group's order, whatever the order of dependencies is."""
    steps = next_steps(rules(), [member("late", "waiting", "b"), member("b"), member("a")])
    assert steps == Steps(("b", "a"), ())


def test_all_of_them_must_have_ended() -> None:
    """One that still runs keeps the task waiting."""
    members = [member("a", "succeeded"), member("b", "open"), member("c", "waiting", "a", "b")]
    assert next_steps(rules(), members) == Steps((), ())


def test_bound_on_parallel_tasks() -> None:
    """Those that are out count, whether somebody has them yet or not."""
    members = [member("a", "open"), member("b", "ready"), member("c"), member("d")]
    assert next_steps(rules(max_parallel=3), members).released == ("c",)
    assert next_steps(rules(max_parallel=2), members).released == ()


def test_stop() -> None:
    """Nothing more is started, not even what was ready; what runs is left alone; the reason names the task."""
    members = [member("a", "failed"), member("b", "open"), member("c", "ready"), member("d", "waiting", "b")]
    steps = next_steps(rules(OnFailure.STOP), members)
    assert steps.released == ()
    assert skipped(steps) == ["c", "d"]
    assert steps.skipped[0].reason == "the group stopped when task a did not succeed"


def test_stop_spares_tasks_for_failures() -> None:
    """What runs always or after a failure does so in a stopped group too."""
    members = [
        member("a", "failed"),
        member("tell", "waiting", "a", when="failure"),
        member("clean", "waiting", "b", when="always"),
        member("b", "waiting", "a"),
    ]
    steps = next_steps(rules(OnFailure.STOP), members)
    assert (steps.released, skipped(steps)) == (("tell", "clean"), ["b"])


def test_continue() -> None:
    """A failed dependency is as good as a met one."""
    members = [member("a", "failed"), member("b", "waiting", "a"), member("c", "waiting", "b")]
    assert next_steps(rules(OnFailure.CONTINUE), members) == Steps(("b",), ())


def test_skip_dependents() -> None:
    """All that depend on it, also over others; the rest goes on."""
    members = [member("c", "waiting", "b"), member("b", "waiting", "a"), member("a", "failed"), member("x")]
    steps = next_steps(rules(OnFailure.SKIP_DEPENDENTS), members)
    assert (steps.released, skipped(steps)) == (("x",), ["c", "b"])


def test_what_was_for_a_failure_is_not_needed() -> None:
    """Skipped with what depends on it, and that is no failure of the group."""
    members = [
        member("a", "succeeded"),
        member("tell", "waiting", "a", when="failure"),
        member("after", "waiting", "tell"),
    ]
    steps = next_steps(rules(), members)
    assert [(skip.name, skip.is_failure) for skip in steps.skipped] == [("tell", False), ("after", False)]
    standings = [Standing.SUCCEEDED, *(skip.standing for skip in steps.skipped)]
    assert state_of(standings, is_cancelled=False) is GroupState.COMPLETED


def test_cancelled_group_starts_nothing() -> None:
    """Whatever its rules say."""
    members = [member("a", "ready"), member("b", "waiting", when="always"), member("c", "open")]
    steps = next_steps(rules(OnFailure.CONTINUE, cancelled=True), members)
    assert (steps.released, skipped(steps)) == ((), ["a", "b"])


@pytest.mark.parametrize(
    ("standings", "cancelled", "state"),
    [
        (["succeeded", "open"], False, GroupState.RUNNING),
        (["failed", "ready"], True, GroupState.RUNNING),
        (["succeeded", "succeeded"], False, GroupState.COMPLETED),
        (["succeeded", "failed"], False, GroupState.FAILED),
        (["succeeded", "failed"], True, GroupState.CANCELLED),
        (["succeeded", "succeeded"], True, GroupState.COMPLETED),
    ],
)
def test_state(standings: list[str], cancelled: bool, state: GroupState) -> None:
    """By where the tasks are."""
    assert state_of([Standing(standing) for standing in standings], is_cancelled=cancelled) is state


@pytest.mark.parametrize(
    ("depends_on", "circles"),
    [
        ({"a": ["b"], "b": []}, [None]),
        ({"a": ["a"]}, [["a", "a"]]),
        ({"a": ["b"], "b": ["c"], "c": ["a"], "x": []}, [list("abca"), list("bcab"), list("cabc")]),
    ],
)
def test_circle(depends_on: dict[str, list[str]], circles: list[list[str] | None]) -> None:
    """Each name depends on the next one."""
    assert circle_in(depends_on) in circles


_ENDS = st.sampled_from([Standing.SUCCEEDED, Standing.FAILED])


@st.composite
def group_members(draw: st.DrawFn) -> list[Member]:
    """A group without circles: tasks depend on earlier ones only, in any order of the group."""
    members: list[Member] = []
    for number in range(draw(st.integers(1, 8))):
        names = [earlier.name for earlier in members]
        depends_on = tuple(draw(st.lists(st.sampled_from(names), unique=True))) if names else ()
        members.append(Member(f"t{number}", depends_on, draw(st.sampled_from(When)), Standing.WAITING))
    return draw(st.permutations(members))


@given(
    members=group_members(),
    on_failure=st.sampled_from(OnFailure),
    max_parallel=st.none() | st.integers(1, 3),
    data=st.data(),
)
def test_every_group_comes_to_an_end(
    members: list[Member], on_failure: OnFailure, max_parallel: int | None, data: st.DataObject
) -> None:
    """Whatever ends how: none starts before what it depends on, the bound holds, and none waits for ever."""
    standings = {each.name: each.standing for each in members}
    by_name = {each.name: each for each in members}
    while True:
        present = [Member(each.name, each.depends_on, each.when, standings[each.name]) for each in members]
        steps = next_steps(rules(on_failure, max_parallel), present)
        for skip in steps.skipped:
            standings[skip.name] = skip.standing
        for name in steps.released:
            assert all(standings[other].has_ended for other in by_name[name].depends_on)
            standings[name] = Standing.READY
        present = [Member(each.name, each.depends_on, each.when, standings[each.name]) for each in members]
        assert next_steps(rules(on_failure, max_parallel), present) == Steps((), ())
        out = [name for name, standing in standings.items() if standing is Standing.READY]
        assert max_parallel is None or len(out) <= max_parallel
        if not out:
            break
        standings[data.draw(st.sampled_from(out))] = data.draw(_ENDS)
    assert all(standing.has_ended for standing in standings.values())
