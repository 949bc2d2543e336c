"""The task as the queue keeps it refuses what could never run, and comes back from its JSON as it went."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from remotegpu_schemas import limits
from remotegpu_schemas.task import Resources, RetryPolicy, Task
from tests.schemas.support import property_test


def make(**changes: Any) -> Task:
    """A small task."""
    return Task.model_validate({"id": "t", "command": "x", **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"command": None},
        {"command": ""},
        {"command": " \n"},
        {"script": "y"},
        {"command": None, "script": " "},
        {"bogus": 1},
        {"id": "../x"},
        {"id": "a\n"},
        {"id": ""},
        {"group_id": "a/b"},
        {"parent_id": "a" * 129},
        {"name": "a\0"},
        {"name": "n" * 257},
        {"env": {"": "x"}},
        {"env": {"A\0": "x"}},
        {"env": {"A": "\0"}},
        {"args": ["\0"]},
        {"args": ["x"] * 4097},
        {"args": ["x" * limits.ARGUMENT_MAX_BYTES]},
        {"timeout_s": -1},
        {"timeout_s": float("nan")},
        {"timeout_s": limits.TIMEOUT_MAX_S + 1},
        {"priority": 0},
        {"priority": 11},
        {"stop_signal": 0},
        {"stop_signal": 65},
        {"labels": {f"l{n}": "" for n in range(65)}},
        {"labels": {"a": "x" * 257}},
        {"labels": {"a\0": "x"}},
        {"command": "\udc80"},
        {"script": "\ud800", "command": None},
        {"workdir": "\0"},
        {"resources": {"gpus": 65}},
        {"resources": {"memory_gb": -1}},
        {"retry": {"max": -1}},
        {"retry": {"bogus": 1}},
    ],
)
def test_refused(changes: dict[str, Any]) -> None:
    """What no host could run, or no table could hold."""
    with pytest.raises(ValidationError):
        make(**changes)


def test_vector_of_one_differs_from_a_shell_string() -> None:
    """`args=()` starts the program itself."""
    assert make(args=()).args == ()
    assert make().args is None
    assert make(args=()) != make()


def test_memory_is_rounded_up() -> None:
    """A request for a bit is a request for a MiB."""
    assert [Resources(memory_gb=gb).memory_mb for gb in (0, 0.0001, 0.5, 64)] == [0, 1, 512, 65536]


def test_task_never_changes() -> None:
    """It is shared between the queue, the scheduler and the executor."""
    with pytest.raises(ValidationError, match="frozen"):
        make().priority = 1  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def test_defaults_are_not_shared() -> None:
    """The environment of one task is not another's."""
    assert make().env is not make().env
    assert make().labels is not make().labels


def test_task_id_is_the_id() -> None:
    """The same text under the type that cannot be mixed up."""
    assert make(id="abc").task_id == "abc"


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


@property_test
@given(
    command=text.filter(str.strip),
    args=st.none() | st.lists(text, max_size=3),
    labels=st.dictionaries(text, text, max_size=3),
    env=st.dictionaries(text.filter(lambda name: name and "=" not in name), text, max_size=3),
    delay=st.floats(0, 1000),
)
def test_stored_task_comes_back(
    command: str, args: list[str] | None, labels: dict[str, str], env: dict[str, str], delay: float
) -> None:
    """Its JSON says everything."""
    task = make(command=command, args=args, labels=labels, env=env, retry=RetryPolicy(max=2, delay_s=delay))
    assert Task.model_validate_json(task.model_dump_json()) == task
