"""From the form of a task to the task that the queue keeps."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from pydantic import ValidationError

from remotegpu_schemas.task import DEFAULT_RETRY_ON, Task, TaskId, Warn
from remotegpu_schemas.task_form import TaskForm, contradictions, task_from_mapping, to_task


def task(defaults: TaskForm | None = None, **keys: Any) -> Task:
    """The task that these keys make."""
    return to_task(task_from_mapping({"command": "x", **keys}, ignore_unknown=False), TaskId("t"), defaults)


def test_what_is_left_out_has_the_defaults_of_the_task() -> None:
    """A form says nothing on its own."""
    assert task() == Task(id="t", command="x")
    assert task().retry.on == DEFAULT_RETRY_ON


def test_defaults_fill_what_the_form_leaves_out() -> None:
    """Labels and environment key by key, everything else as a whole."""
    defaults = task_from_mapping(
        {"name": "d", "timeout": "1h", "env": {"A": "1", "B": "2"}, "labels": {"x": "1"}, "retry": {"max": 3}},
        ignore_unknown=False,
    )
    made = task(defaults, timeout=5, env={"B": "3"}, retry={"delay": 7})
    assert (made.name, made.timeout_s, made.env, made.labels) == ("d", 5, {"A": "1", "B": "3"}, {"x": "1"})
    assert (made.retry.max, made.retry.delay_s) == (0, 7)


def test_warning_of_a_task() -> None:
    """`before` is a duration; the signal is SIGUSR1 unless another one is named."""
    assert task(warn={"before": "5m"}).warn == Warn(signal=10, before_s=300)
    assert task(warn={"signal": "SIGUSR2", "before": 1.5}).warn == Warn(signal=12, before_s=1.5)
    assert task().warn is None


@pytest.mark.parametrize("given", [{}, {"signal": "SIGUSR1"}, {"before": 0}, {"before": "x"}, {"before": 5, "x": 1}])
def test_warning_that_is_none(given: object) -> None:
    """Without a time, or with a signal that nobody can hear."""
    with pytest.raises(ValidationError):
        task(warn=given)
    for number in (9, "SIGSTOP"):
        with pytest.raises(ValidationError, match="SIGKILL and SIGSTOP are none"):
            task(warn={"signal": number, "before": 5})


def test_unknown_keys_of_a_peer_are_ignored_and_of_a_person_refused() -> None:
    """At the top and inside."""
    raw = {"command": "x", "bogus": 1, "resources": {"gpus": "2", "bogus": 1}}
    assert task_from_mapping(raw, ignore_unknown=True).resources is not None
    with pytest.raises(ValidationError) as caught:
        task_from_mapping(raw, ignore_unknown=False)
    assert {error["loc"] for error in caught.value.errors()} == {
        ("bogus",),
        ("resources", "bogus"),
        ("resources", "gpus"),
    }


def test_contradiction_makes_no_task() -> None:
    """It is found in the form, and refused also where nobody looked for it."""
    form = task_from_mapping({"command": "x", "max_retries": 1, "retry": {"max": 2}}, ignore_unknown=False)
    assert [finding.path for finding in contradictions(form)] == [("max_retries",)]
    with pytest.raises(ValueError, match="one thing, two values"):
        to_task(form, TaskId("t"))


@pytest.mark.parametrize(
    ("given", "number"),
    [("SIGINT", 2), ("INT", 2), ("sigusr1", 10), (15, 15), ("9", 9), ("SIGRTMIN", int(signal.SIGRTMIN)), (64, 64)],
)
def test_stop_signal(given: object, number: int) -> None:
    """By name with and without SIG, or by number."""
    assert task(stop_signal=given).stop_signal == number


@pytest.mark.parametrize("given", ["SIGFOO", "", "SIG_DFL", 0, 65, -1, True, 2.0, "66", "00", [], "IG", "__doc__"])
def test_no_signal(given: object) -> None:
    """What the kernel does not have is refused."""
    with pytest.raises(ValidationError, match="must be a signal"):
        task(stop_signal=given)


def test_zero_in_the_newer_key_is_not_replaced_by_the_older() -> None:
    """0 is a value; only what is not given is looked for elsewhere."""
    assert task(grace_period=0).grace_period_s == 0
    assert task(grace_period_sec=5).grace_period_s == 5
    assert task().grace_period_s is None
