"""Whatever the bytes of a task file are, it is accepted, or InvalidFile says why."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_schemas.problems import InvalidFile
from remotegpu_schemas.task import Task, TaskId
from remotegpu_schemas.task_form import ResourcesForm, RetryForm, TargetsForm, TaskForm
from remotegpu_schemas.taskfile import DocumentForm, Submission, load_task_file, override_tasks
from tests.scale import scaled
from tests.schemas.garbage import as_json, cut_bytes, encoded, fuzz, near, with_cut
from tests.schemas.support import json_values

pytestmark = pytest.mark.timeout(scaled(120, 1800))

VALID = b"""\
# a comment
version: 1
name: train
labels: {team: vision}
task: &task
  id: t-1
  type: python
  command: python
  args: [train.py, --epochs=100, 1.10, "quoted \\u00e9"]
  env: {SEED: "1", B: two}
  resources: {gpus: 2, cpus: 0.5, memory_gb: 64}
  timeout: 24h
  retry: {max: 3, delay: 60s, on: [exit_code], exit_codes: [75]}
  targets: {machine_ids: [m1], ips: [10.0.0.1]}
---
task:
  script: |
    echo one
    echo two
  max_retries: 2
"""


def check(raw: bytes) -> None:
    """Accepted files make tasks that can be stored and overridden; others make a bounded report."""
    submissions = _loaded(raw)
    if isinstance(submissions, InvalidFile):
        text = str(submissions)
        assert submissions.problems
        assert text.endswith("nothing was submitted.")
        assert len(text) < 60 * 1000
        assert all(
            problem.line <= raw.count(b"\n") + raw.count(b"\r") + raw.count(b"\xc2\x85") + 200
            for problem in submissions.problems
        )
        text.encode()
    else:
        assert submissions
        for submission in submissions:
            task = submission.task(TaskId("t"))
            assert Task.model_validate_json(task.model_dump_json()) == task
        assert len(load_task_file(override_tasks(raw, "f.yaml", {"priority": 1}))) == len(submissions)


def _loaded(raw: bytes) -> list[Submission] | InvalidFile:
    try:
        return load_task_file(raw, "f.yaml")
    except InvalidFile as error:
        return error


YAML_PIECES: Final = (
    "task:", "command", "x", "- ", ": ", "\n", "\n  ", "\n    ", "? ", "{", "}", "[", "]", ", ", "&a ", "*a", "<<: ",
    "#", "!!str ", "! ", "%YAML 1.1\n", "---\n", "...\n", "|2-\n", ">\n", '"', "'", "\\u12", "\\x", "\t", "\r", "\x85",
    "\u2028", "\ufeff", "\ud7ff", "\x7f", "\0", "1e999", "0x1F", ".nan", "~", "9" * 40, "é", "[" * 40, "- " * 40,
)  # fmt: skip
yaml_texts = st.lists(st.sampled_from(YAML_PIECES), max_size=40).map(lambda parts: "".join(parts).encode())


@fuzz(10_000)
@given(raw=st.binary(max_size=300) | yaml_texts)
def test_any_bytes(raw: bytes) -> None:
    """Nothing but InvalidFile is raised for arbitrary bytes, nor for what YAML is made of in any order."""
    check(raw)


mutations = st.lists(
    st.tuples(
        st.sampled_from(["insert", "delete", "replace", "repeat", "swap"]),
        st.integers(0, len(VALID)),
        st.integers(0, 40),
        st.binary(max_size=4)
        | st.sampled_from([b"\t", b"  ", b": ", b"- ", b"*task", b"&a ", b"{", b"]", b'"', b"'", b"|", b"\n", b"<<: "]),
    ),
    min_size=1,
    max_size=6,
)


@fuzz(12_000)
@given(changes=mutations)
def test_valid_file_with_mutations(changes: list[tuple[str, int, int, bytes]]) -> None:
    """A few slips of the hand in a valid file."""
    raw = VALID
    for kind, at, length, piece in changes:
        begin, middle, end = raw[:at], raw[at : at + length], raw[at + length :]
        match kind:
            case "insert":
                raw = begin + piece + middle + end
            case "delete":
                raw = begin + end
            case "replace":
                raw = begin + piece + end
            case "repeat":
                raw = begin + middle * 3 + end
            case _:
                raw = end + middle + begin
    check(raw)


def test_the_unmutated_file_is_accepted() -> None:
    """Else the mutations would prove little."""
    assert len(load_task_file(VALID)) == 2
    check(VALID)


def keys_of(
    form: type[DocumentForm | TaskForm | ResourcesForm | RetryForm | TargetsForm],
) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings with the form's keys, and one more, with any values."""
    return st.dictionaries(st.sampled_from([*form.model_fields, "bogus"]), json_values, max_size=5)


tasks = st.tuples(
    keys_of(TaskForm),
    st.fixed_dictionaries(
        {}, optional={"resources": keys_of(ResourcesForm), "retry": keys_of(RetryForm), "targets": keys_of(TargetsForm)}
    ),
    st.sampled_from([{}, {"command": "x"}, {"script": "x"}]),
).map(lambda parts: {**parts[0], **parts[1], **parts[2]})


@fuzz(6_000)
@given(document=keys_of(DocumentForm), task=tasks)
def test_any_values_of_known_keys(document: dict[str, Any], task: dict[str, Any]) -> None:
    """Every key of the format, with values of every type."""
    check(json.dumps({**document, "version": 1, "task": task}).encode("utf-8", "surrogatepass"))


FULL: Final[dict[str, Any]] = {
    "version": 1,
    "name": "nightly",
    "labels": {"team": "vision"},
    "task": {
        "id": "t-1",
        "name": "train",
        "type": "python",
        "command": "python",
        "args": ["train.py", "--epochs=100"],
        "workdir": "/workspace",
        "env": {"SEED": "1", "B": "two"},
        "resources": {"gpus": 2, "cpus": 0.5, "memory_gb": 64},
        "timeout": "24h",
        "grace_period": "30s",
        "priority": 3,
        "stop_signal": "SIGINT",
        "warn": {"signal": "SIGUSR1", "before": "5m"},
        "retry": {"max": 3, "delay": "60s", "backoff": "exponential", "max_delay": "10m", "on": ["exit_code"]},
        "labels": {"a": "b"},
        "group_id": "g",
        "parent_id": "p",
        "machine_id": "m",
        "targets": {"machine_ids": ["m1"], "ips": ["10.0.0.1"]},
        "lease_ttl_sec": 300,
    },
}
OTHER_KEYS: Final = ("script", "interpreter", "max_retries", "retry_delay", "exit_codes", "grace_period_sec", "group")


@fuzz(14_000)
@given(document=near(FULL, OTHER_KEYS), encode=encoded, cut=cut_bytes)
def test_a_full_document_with_slips(document: Any, encode: Any, cut: tuple[int, bytes]) -> None:
    """Every key of the format, with values at their bounds, in other spellings, of other types or in other places."""
    check(with_cut(encode(document), cut))


def test_the_full_document_is_accepted() -> None:
    """Else the slips would prove little."""
    assert len(load_task_file(as_json(FULL))) == 1
