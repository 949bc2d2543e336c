"""What the tests of the schemas share: answers and claimed tasks as a control plane sends them, task files by text."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from remotegpu_schemas.problems import InvalidFile
from remotegpu_schemas.task import Task, TaskId
from remotegpu_schemas.taskfile import Submission, load_task_file
from remotegpu_schemas.wire import Answer, Claim, ClaimItem, RefusedClaim, parse_answer, parse_claims

property_test = settings(deadline=None, print_blob=True, max_examples=100)
"""Time limits are pytest's: on a shared machine one example may take long."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=8,
)
"""Whatever `json.loads` can give: also NaN, infinities and halves of surrogate pairs."""


def answer(status: int, body: object, headers: Mapping[str, str] | None = None) -> Answer:
    """The answer to one call; a body that is not bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_answer(status, headers or {}, data)


def claimed_item(**changes: Any) -> dict[str, Any]:
    """A claimed task with the least that it needs."""
    return {"id": "task-1", "attempt_id": "attempt-1", "command": "true", **changes}


def parse_claim(**changes: Any) -> ClaimItem:
    """The one item of a claim answer."""
    (item,) = parse_claims({"tasks": [claimed_item(**changes)]})
    return item


def claim(**changes: Any) -> Claim:
    """The item, which must be accepted."""
    item = parse_claim(**changes)
    assert isinstance(item, Claim), item
    return item


def refusal(**changes: Any) -> str:
    """The reason for which the item is refused."""
    item = parse_claim(**changes)
    assert isinstance(item, RefusedClaim), item
    assert (item.task_id, item.attempt_id) == ("task-1", "attempt-1")
    return item.reason


def load(text: str | bytes) -> list[Submission]:
    """The submissions of a task file; text is dedented."""
    return load_task_file(text if isinstance(text, bytes) else textwrap.dedent(text).encode(), "job.yaml")


def load_task(text: str | bytes) -> Task:
    """The one task of a task file."""
    (submission,) = load(text)
    return submission.task(TaskId("t"))


def report(text: str | bytes) -> str:
    """The whole report on a task file that is refused."""
    with pytest.raises(InvalidFile) as caught:
        load(text)
    return str(caught.value)


def messages(text: str | bytes) -> list[str]:
    """The first lines of the report's problems, without the line that counts them."""
    with pytest.raises(InvalidFile) as caught:
        load(text)
    return [problem.render().split("\n")[0] for problem in caught.value.problems]
