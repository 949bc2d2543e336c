"""Scheduling: what starts, what waits, and why; over every mix of tasks that hypothesis finds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from remotegpu_queue.scheduling import Capacity, Waiting, never_fits, plan
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.task import Resources, TaskId

_NOW = 1_000_000_000
_CPUS = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0])
_NEEDS = st.builds(Resources, gpus=st.integers(0, 3), cpus=_CPUS, memory_gb=st.sampled_from([0.0, 0.5, 1.0, 4.0]))
_TOTALS = st.builds(
    Capacity, slots=st.integers(0, 5), cpus=_CPUS, memory_mb=st.sampled_from([0, 512, 2048]), gpus=st.integers(0, 3)
)


@st.composite
def _waiting(draw: st.DrawFn) -> list[Waiting]:
    count = draw(st.integers(0, 12))
    ages = draw(st.permutations(range(count)))
    return [
        Waiting(
            AttemptId(f"a{seq}"),
            TaskId(f"t{draw(st.integers(0, 8))}"),
            draw(st.integers(1, 4)),
            seq,
            draw(_NEEDS),
            draw(st.sampled_from([0, 0, 0, _NOW, _NOW + 1, _NOW + 5])),
        )
        for seq in ages
    ]


_RUNNING = st.lists(_NEEDS, max_size=4)
_LIVE = st.sets(st.sampled_from([TaskId(f"t{number}") for number in range(9)]), max_size=3)


def _item(name: str, seq: int, *, priority: int = 5, ready_ns: int = 0, **need: float) -> Waiting:
    return Waiting(AttemptId(name), TaskId(name), priority, seq, Resources.model_validate(need), ready_ns)


@given(_waiting(), _TOTALS, _RUNNING, _LIVE)
def test_never_more_than_there_is(
    waiting: list[Waiting], total: Capacity, running: list[Resources], live: set[TaskId]
) -> None:
    """What starts fits beside what runs: slots, GPUs, CPUs and memory."""
    starts = set(plan(waiting, total, running, live, _NOW).starts)
    needs = [item.resources for item in waiting if item.attempt_id in starts]
    if needs:
        everything = [*running, *needs]
        assert len(everything) <= total.slots
        for given_out, there in (
            (sum(need.gpus for need in needs), total.gpus - sum(need.gpus for need in running)),
            (sum(need.cpus for need in needs), total.cpus - sum(need.cpus for need in running) + 1e-5),
            (sum(need.memory_mb for need in needs), total.memory_mb - sum(need.memory_mb for need in running)),
        ):
            assert given_out <= max(there, 0)


@given(_waiting(), _TOTALS, _RUNNING, _LIVE)
def test_started_or_a_reason(
    waiting: list[Waiting], total: Capacity, running: list[Resources], live: set[TaskId]
) -> None:
    """Every task either starts or has a reason, never both, and no reason is empty."""
    decided = plan(waiting, total, running, live, _NOW)
    assert sorted([*decided.starts, *decided.reasons]) == sorted(item.attempt_id for item in waiting)
    assert all(decided.reasons.values())


@given(_waiting(), _TOTALS, _RUNNING, _LIVE)
def test_never_two_attempts_of_a_task(
    waiting: list[Waiting], total: Capacity, running: list[Resources], live: set[TaskId]
) -> None:
    """No task starts twice, nor beside a live attempt of it (promise 2)."""
    by_id = {item.attempt_id: item for item in waiting}
    tasks = [by_id[each].task_id for each in plan(waiting, total, running, live, _NOW).starts]
    assert len(set(tasks)) == len(tasks)
    assert not live & set(tasks)


@given(_waiting(), _TOTALS, _RUNNING, _LIVE)
def test_order_is_priority_then_age(
    waiting: list[Waiting], total: Capacity, running: list[Resources], live: set[TaskId]
) -> None:
    """Starts are in order, and nothing that could run waits while something behind it starts."""
    decided = plan(waiting, total, running, live, _NOW)
    by_id = {item.attempt_id: item for item in waiting}
    order = [(by_id[each].priority, by_id[each].seq) for each in decided.starts]
    assert order == sorted(order)
    started_tasks = {by_id[each].task_id for each in decided.starts}
    for item in waiting:
        is_able = (
            item.ready_boottime_ns <= _NOW
            and item.task_id not in live | started_tasks
            and never_fits(item.resources, total) is None
        )
        if is_able and item.attempt_id in decided.reasons:
            assert all(place < (item.priority, item.seq) for place in order)


@given(_waiting(), _TOTALS, _RUNNING, _LIVE)
def test_nothing_waits_without_need(
    waiting: list[Waiting], total: Capacity, running: list[Resources], live: set[TaskId]
) -> None:
    """The first task that could run starts if it fits: the plan never idles."""
    able = [
        item
        for item in sorted(waiting, key=lambda item: (item.priority, item.seq))
        if item.ready_boottime_ns <= _NOW and item.task_id not in live and never_fits(item.resources, total) is None
    ]
    free = total.minus_all(running)
    if able and free.slots > 0 and never_fits(able[0].resources, free) is None:
        assert plan(waiting, total, running, live, _NOW).starts[0] == able[0].attempt_id


@given(_waiting(), _TOTALS, _RUNNING, _LIVE)
def test_who_can_never_run_blocks_nobody(
    waiting: list[Waiting], total: Capacity, running: list[Resources], live: set[TaskId]
) -> None:
    """Without the tasks that can never fit or that wait for a delay, the same ones start."""
    others = [item for item in waiting if never_fits(item.resources, total) is None and item.ready_boottime_ns <= _NOW]
    assert plan(waiting, total, running, live, _NOW).starts == plan(others, total, running, live, _NOW).starts


@given(_waiting(), _TOTALS)
def test_next_end_of_a_delay(waiting: list[Waiting], total: Capacity) -> None:
    """The plan says when the first delay ends, so that the scheduler sleeps until then."""
    delays = [item.ready_boottime_ns for item in waiting if item.ready_boottime_ns > _NOW]
    assert plan(waiting, total, [], set(), _NOW).next_ready_boottime_ns == min(delays, default=None)


def test_big_task_is_not_starved() -> None:
    """A task that does not fit now keeps its place: a small one behind it waits, although it would fit."""
    decided = plan(
        [_item("big", 1, gpus=2), _item("small", 2, gpus=1)], Capacity(4, 8, 8, 2), [Resources(gpus=1)], set(), _NOW
    )
    assert decided.starts == ()
    assert decided.reasons == {
        "big": "needs 2 GPUs; 1 are free",
        "small": "waits behind task big, which is more urgent or older",
    }


def test_reasons_can_be_read() -> None:
    """Each reason names what is lacking, how much there is, and what would change it."""
    total = Capacity(2, 4.0, 1024, 1)
    waiting = [
        _item("delayed", 1, ready_ns=_NOW + 90 * 1_000_000_000),
        _item("live", 2),
        _item("gpus", 3, gpus=2),
        _item("cpus", 4, cpus=8),
        _item("memory", 5, memory_gb=2),
        _item("slots", 6),
    ]
    decided = plan(waiting, total, [Resources(), Resources()], {TaskId("live")}, _NOW)
    assert list(decided.reasons.values()) == [
        "waits 90 s before its next try",
        "an older attempt of this task is still being stopped",
        "needs 2 GPUs; this agent manages 1",
        "needs 8 CPUs; this host gives 4",
        "needs 2048 MiB of memory; this host gives 1024 MiB",
        "all slots are taken (capacity.max_concurrent)",
    ]
    for need, reason in (
        ({"cpus": 3}, "needs 3 CPUs; 2 are free"),
        ({"memory_gb": 1}, "needs 1024 MiB of memory; 512 MiB are free"),
    ):
        decided = plan([_item("a", 1, **need)], total, [Resources(cpus=2, memory_gb=0.5)], set(), _NOW)
        assert decided.reasons == {"a": reason}


def test_shares_of_a_cpu_add_up() -> None:
    """Three tasks of 0.1 CPUs run on 0.3, although binary fractions say that a hair is missing."""
    total = Capacity(3, 0.3, 1024)
    assert len(plan([_item(name, n, cpus=0.1) for n, name in enumerate("abc")], total, [], set(), _NOW).starts) == 3


def test_more_runs_than_there_is_room_for() -> None:
    """After a restart with a smaller capacity nothing starts until enough has ended."""
    decided = plan([_item("a", 1)], Capacity(1, 1.0, 1024), [Resources(cpus=1)] * 3, set(), _NOW)
    assert decided.starts == ()
