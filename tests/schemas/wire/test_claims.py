"""One bad claimed task never hurts another; what is refused is refused with a reason that a person can read."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_schemas import limits
from remotegpu_schemas.task import Task
from remotegpu_schemas.task_form import TaskForm
from remotegpu_schemas.wire import Claim, RefusedClaim, UnusableClaim, parse_claims
from tests.schemas.support import claim, claimed_item, json_values, parse_claim, property_test, refusal

BAD_IDS = [
    pytest.param(value, id=name)
    for name, value in {
        "parent": "../etc",
        "slash": "a/b",
        "absolute": "/etc/passwd",
        "dot": ".",
        "dots": "..",
        "backslash": "a\\b",
        "nul": "a\0b",
        "10-kb": "a" * 10_240,
        "129-characters": "a" * 129,
        "look-alike": "t\u0430sk",
        "fullwidth": "\uff41",
        "arabic-digit": "\u0661",
        "zero-width": "a\u200bb",
        "surrogate": "a\udc80",
        "space": "a b",
        "line-break": "a\n",
        "dash-first": "-rf",
        "empty": "",
        "null": None,
        "zero": 0,
        "negative": -1,
        "float": 1.0,
        "bool": True,
        "list": ["a"],
        "object": {"a": 1},
        "huge-number": 10**200,
    }.items()
]


@pytest.mark.parametrize("key", ["id", "attempt_id"])
@pytest.mark.parametrize("bad", BAD_IDS)
def test_f34_unusable_id_is_refused_at_the_edge(key: str, bad: object) -> None:
    """An id that could not name a directory makes the item unusable: nobody can be told, so it lapses."""
    item = parse_claim(**{key: bad})
    assert isinstance(item, UnusableClaim)
    assert len(item.reason) < 300
    item.reason.encode()


@pytest.mark.parametrize("key", ["group_id", "parent_id"])
@pytest.mark.parametrize("bad", ["../etc", "a/b", "a\0b", "a" * 10_240, "t\u0430sk", "a\udc80"])
def test_f34_other_ids_are_refused_with_a_reason(key: str, bad: str) -> None:
    """The ids of group and parent obey the same rule; the refusal can be reported."""
    reason = refusal(**{key: bad})
    assert key in reason
    reason.encode()


@pytest.mark.parametrize("good", ["a", "A-1.b_c:d", "0", "a" * 128, "550e8400-e29b-41d4-a716-446655440000"])
def test_usable_ids(good: str) -> None:
    """Letters, digits and . _ : - up to 128 characters."""
    parsed = claim(id=good, attempt_id=good)
    assert (parsed.task.id, parsed.attempt_id) == (good, good)


@pytest.mark.parametrize("bad", [None, 3, "task", [], True])
def test_item_that_is_no_object(bad: object) -> None:
    """It is unusable, and says what it is."""
    (item,) = parse_claims({"tasks": [bad]})
    assert isinstance(item, UnusableClaim)
    assert "not an object" in item.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param(
            {"type": "docker"},
            "'type' must be shell, python, script or container, not the text 'docker'",
            id="unknown-type",
        ),
        pytest.param(
            {"type": 3}, "'type' must be shell, python, script or container, not the number 3", id="type-number"
        ),
        pytest.param({"command": None}, "a task needs a command or a script", id="command-null"),
        pytest.param({"command": ""}, "a task needs a command or a script", id="command-empty"),
        pytest.param({"command": "  "}, "command is empty", id="command-blank"),
        pytest.param({"command": ["true"]}, "'command' must be text, not a list", id="command-list"),
        pytest.param({"command": "a\0b"}, "'command' must not contain a NUL character", id="command-nul"),
        pytest.param(
            {"command": "a\udc80"},
            "'command' must not contain half of a surrogate pair, which is no character",
            id="command-surrogate",
        ),
        pytest.param(
            {"command": "x" * limits.ARGUMENT_MAX_BYTES},
            "'command' is longer than 131071 bytes, which Linux refuses",
            id="command-long",
        ),
        pytest.param({"script": "echo"}, "a task has either a command or a script, not both", id="command-and-script"),
        pytest.param({"args": "--epochs 5"}, "'args' is a text that holds no JSON document", id="args-no-json"),
        pytest.param({"args": '"a"'}, "'args' must be a list", id="args-json-of-text"),
        pytest.param({"args": {"a": 1}}, "'args' must be a list", id="args-object"),
        pytest.param({"args": [["a"]]}, "'args[0]' must be text, not a list", id="args-nested"),
        pytest.param({"args": ["x"] * 5000}, "'args' has more than 4096 entries", id="args-many"),
        pytest.param({"env": "A=1"}, "'env' is a text that holds no JSON document", id="env-no-json"),
        pytest.param({"env": ["A=1"]}, "'env' must be a mapping (key: value)", id="env-list"),
        pytest.param({"env": {"A": {"b": 1}}}, "'env.A' must be text, not a mapping", id="env-value"),
        pytest.param(
            {"env": {"A=B": "1"}}, "'env.A=B': an environment name must not be empty or contain '='", id="env-name"
        ),
        pytest.param({"env": "[" * 100_000}, "'env' is a text that holds no JSON document", id="env-deep"),
        pytest.param(
            {"timeout": -1},
            "'timeout' must not be negative: write seconds, or a number with s, m, h or d, such as 90s, 10m, 24h, 7d",
            id="timeout-negative",
        ),
        pytest.param({"timeout": math.inf}, "'timeout' must be a finite duration; 0 means none", id="timeout-infinite"),
        pytest.param({"timeout": 10**400}, "'timeout' must be a finite duration; 0 means none", id="timeout-huge"),
        pytest.param({"priority": math.inf}, "'priority' must be a finite number", id="priority-infinite"),
        pytest.param({"priority": math.nan}, "'priority' must be a finite number", id="priority-nan"),
        pytest.param(
            {"priority": "high"}, "'priority' must be a whole number, not the text 'high'", id="priority-word"
        ),
        pytest.param({"max_retries": -1}, "'max_retries' must be at least 0, not -1", id="retries-negative"),
        pytest.param({"machine_id": []}, "'machine_id' must be text, not a list", id="machine-list"),
        pytest.param({"machine_id": "m" * 257}, "'machine_id' is longer than 256 characters", id="machine-long"),
        pytest.param({"machine_id": {"a": 1}}, "'machine_id' must be text, not a mapping", id="machine-object"),
        pytest.param(
            {"lease_ttl_sec": [1]},
            "'lease_ttl_sec' must be a duration: write seconds, or a number with s, m, h or d, such as "
            "90s, 10m, 24h, 7d",
            id="lease-list",
        ),
        pytest.param(
            {"max_retries": 1, "retry": {"max": 2}},
            "'max_retries' is 1 and 'retry.max' is 2: one thing, two values; keep one",
            id="contradiction",
        ),
        pytest.param({"labels": {"a\0": "b"}}, "'labels.a\ufffd': must not contain a NUL character", id="label-nul"),
    ],
)
def test_refused_claim_says_why(changes: dict[str, Any], reason: str) -> None:
    """A task that can never run here is refused with a sentence that names the field and the mend."""
    assert refusal(**changes) == reason


@pytest.mark.parametrize(
    "changes", [{"env": 'TOKEN="s3cret'}, {"env": ["s3cret"]}, {"args": "s3cret"}, {"env": {"A": ["s3cret"]}}]
)
def test_f49_refusal_shows_no_secret(changes: dict[str, Any]) -> None:
    """Environments and arguments may hold secrets, and the reason goes to the log and to the plane."""
    assert "s3cret" not in refusal(**changes)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        {},
        {"id": "../x", "attempt_id": "a"},
        {"id": [[]], "attempt_id": {}},
        claimed_item(machine_id=[]),
        claimed_item(priority=math.inf),
        claimed_item(command="\udc80"),
        claimed_item(env="{"),
        claimed_item(type="docker"),
        claimed_item(labels={"\udc80": "\udc80"}),
    ],
)
def test_one_bad_item_never_hurts_another(bad: object) -> None:
    """Whatever one item is, its neighbours are taken."""
    first, middle, last = parse_claims({"tasks": [claimed_item(id="t1"), bad, claimed_item(id="t2")]})
    assert isinstance(first, Claim)
    assert isinstance(last, Claim)
    assert isinstance(middle, RefusedClaim | UnusableClaim)
    assert (first.task.id, last.task.id) == ("t1", "t2")


def test_more_tasks_than_can_be_asked_for_are_counted() -> None:
    """What stands behind the bound is not taken, and is said to have been there."""
    parsed = parse_claims({"tasks": [claimed_item(id=f"t{number}") for number in range(limits.CLAIM_MAX_TASKS + 3)]})
    assert len(parsed) == limits.CLAIM_MAX_TASKS + 1
    assert parsed[-1] == UnusableClaim("a claim answer holds 3 tasks more than the 64 that it may")


@pytest.mark.parametrize(
    ("given_priority", "expected"),
    [(1, 1), (10, 10), (5, 5), ("3", 3), (0, 5), (None, 5), (-4, 1), (100, 10), (2.9, 2)],
)
def test_priority_of_other_scales_is_cut(given_priority: object, expected: int) -> None:
    """1 is most urgent, 10 least; 0 and null mean the default."""
    assert claim(priority=given_priority).task.priority == expected


@pytest.mark.parametrize(
    ("ttl", "expected_s"), [(60, 60.0), ("45", 45.0), ("2m", 120.0), (0, None), (None, None), ("", None)]
)
def test_lease_term_of_the_plane_is_kept_however_it_is_written(ttl: object, expected_s: float | None) -> None:
    """A term written as text is not replaced by a longer default: the task would outlive its lease."""
    assert claim(lease_ttl_sec=ttl).lease_ttl_s == expected_s
    assert claim(renew_interval_sec=ttl).renew_interval_s == expected_s


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0), (3, 3), (-1, 0), (None, 0), ("x", 0), (10**30, limits.RETRIES_MAX)]
)
def test_retries_used_before(count: object, expected: int) -> None:
    """Retries of earlier attempts count; nonsense counts as none."""
    assert claim(retry_count=count).retries_used == expected


def test_keys_of_the_task_file_work_in_a_claim() -> None:
    """A claimed task may carry any key of a task in taskfile.md."""
    task = claim(
        resources='{"gpus": 2, "memory_gb": 1.5}',
        retry={"max": 3, "delay": "60s", "on": ["exit_code"]},
        stop_signal="SIGINT",
        grace_period="30s",
        timeout="1h",
        labels={"team": "vision", "n": 1, "x": None},
        workdir="/w",
        name="n",
        type="python",
    ).task
    assert (task.resources.gpus, task.resources.memory_mb, task.retry.max, task.retry.delay_s) == (2, 1536, 3, 60)
    assert (task.stop_signal, task.grace_period_s, task.timeout_s) == (2, 30, 3600)
    assert task.labels == {"team": "vision", "n": "1", "x": ""}


def test_grace_period_of_zero_is_meant() -> None:
    """The new key can say "kill at once"; 0 in the old one means "not set"."""
    assert claim(grace_period=0).task.grace_period_s == 0
    assert claim(grace_period_sec=0).task.grace_period_s is None


task_items = st.fixed_dictionaries(
    {"id": st.just("t"), "attempt_id": st.just("a"), "command": st.just("true") | json_values},
    optional={
        name: json_values
        for name in [*TaskForm.model_fields, "env_vars", "depends_on", "retry_count", "lease_expires_at", "machine_id"]
        if name not in {"id", "command"}
    },
)


@property_test
@given(item=task_items)
def test_any_item_is_a_claim_or_a_refusal(item: dict[str, Any]) -> None:
    """Whatever a plane sends, nothing is raised; a claim can be stored, a reason can be sent."""
    (parsed,) = parse_claims({"tasks": [item]})
    match parsed:
        case Claim():
            assert Task.model_validate_json(parsed.task.model_dump_json()) == parsed.task
        case RefusedClaim():
            assert parsed.reason
            assert len(parsed.reason.encode()) <= 4 * limits.WIRE_MESSAGE_MAX_CHARS
        case UnusableClaim():
            pytest.fail(f"its ids are good: {parsed.reason}")


@property_test
@given(items=st.lists(json_values, max_size=5))
def test_each_item_gives_one_result(items: list[Any]) -> None:
    """Whatever the items are, there are as many results, in the same order."""
    assert len(parse_claims({"tasks": items})) == len(items)
