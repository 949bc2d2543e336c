"""Every line of "Deployed peers (facts; accept every one)" in protocol.md, as far as the wire decides it.

Each case's id is the fact. What a repeated task and a lost claim answer mean is the store's business.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from remotegpu_schemas.states import Cause, TaskState
from remotegpu_schemas.wire import (
    Claim,
    ClaimRequest,
    CompleteReport,
    Verdict,
    parse_claims,
    parse_features,
    parse_heartbeat,
    parse_renewal,
    parse_time,
)
from tests.schemas.support import answer, claim, claimed_item

NOON = datetime(2026, 2, 5, 12, tzinfo=UTC)

# --- envelopes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message", "data"),
    [
        pytest.param({"code": 0, "message": "fine", "data": {"a": 1}}, "fine", {"a": 1}, id="field-message"),
        pytest.param({"code": 0, "msg": "fine", "data": {"a": 1}}, "fine", {"a": 1}, id="field-msg"),
        pytest.param({"code": 0, "message": "", "msg": "fine"}, "fine", {}, id="field-message-empty-beside-msg"),
        pytest.param({"code": 0}, "", {}, id="no-message-at-all"),
        pytest.param({"code": 0, "message": None}, "", {}, id="message-null"),
        pytest.param({"code": 0, "message": "ok"}, "ok", {}, id="data-missing"),
        pytest.param({"code": 0, "message": "ok", "data": None}, "ok", {}, id="data-null"),
        pytest.param({"code": 0, "data": [1]}, "", {}, id="data-no-object"),
        pytest.param({"code": 0, "data": {}, "request_id": "x", "took": 3}, "", {}, id="unknown-fields-ignored"),
    ],
)
def test_success_in_any_dialect(body: dict[str, Any], message: str, data: dict[str, Any]) -> None:
    """An envelope with code 0 is a success, however it names its message and whether or not it has data."""
    parsed = answer(200, body)
    assert (parsed.verdict, parsed.message, parsed.data) == (Verdict.OK, message, data)


ERRORS = [
    pytest.param(400, Verdict.INVALID, id="400"),
    pytest.param(401, Verdict.UNAUTHORIZED, id="401"),
    pytest.param(403, Verdict.UNAUTHORIZED, id="403"),
    pytest.param(404, Verdict.AMBIGUOUS, id="404"),
    pytest.param(409, Verdict.AMBIGUOUS, id="409"),
    pytest.param(410, Verdict.AMBIGUOUS, id="410"),
    pytest.param(429, Verdict.RETRY, id="429"),
    pytest.param(500, Verdict.RETRY, id="500"),
    pytest.param(503, Verdict.RETRY, id="503"),
]


@pytest.mark.parametrize("field", ["message", "msg", "error", "error_msg"])
@pytest.mark.parametrize(("code", "verdict"), ERRORS)
def test_error_as_body_code_with_http_200(code: int, verdict: Verdict, field: str) -> None:
    """An error that comes with HTTP 200 means what its body code means as a status."""
    parsed = answer(200, {"code": code, field: "database is locked"})
    assert (parsed.verdict, parsed.message) == (verdict, "database is locked")


@pytest.mark.parametrize(("code", "verdict"), ERRORS)
def test_error_with_its_http_status(code: int, verdict: Verdict) -> None:
    """An error that comes with its HTTP status means the same as one that comes with HTTP 200."""
    assert answer(code, {"code": code, "msg": "no", "data": None}).verdict is verdict


@pytest.mark.parametrize(("status", "verdict"), ERRORS)
@pytest.mark.parametrize("code", [0, 1, -1, 99999])
def test_error_status_with_a_code_that_says_nothing(code: int, status: int, verdict: Verdict) -> None:
    """With an error status, a body code that is in no table changes nothing; 0 is no success then."""
    assert answer(status, {"code": code, "message": "no"}).verdict is verdict


# --- claimed tasks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "read", "expected"),
    [
        pytest.param({"env": {"A": "1"}}, lambda c: c.task.env, {"A": "1"}, id="env"),
        pytest.param({"env_vars": {"A": "1"}}, lambda c: c.task.env, {"A": "1"}, id="env-called-env_vars"),
        pytest.param({"env": None, "env_vars": {"A": "1"}}, lambda c: c.task.env, {"A": "1"}, id="env-null-env_vars"),
        pytest.param({"env": {}, "env_vars": {"A": "1"}}, lambda c: c.task.env, {"A": "1"}, id="env-empty-env_vars"),
        pytest.param({"env": "{}", "env_vars": {"A": "1"}}, lambda c: c.task.env, {"A": "1"}, id="env-text-env_vars"),
        pytest.param({"env_vars": '{"A": "1"}'}, lambda c: c.task.env, {"A": "1"}, id="env_vars-json-in-string"),
        pytest.param({"env": '{"A": "1"}'}, lambda c: c.task.env, {"A": "1"}, id="env-json-in-string"),
        pytest.param({"env": None}, lambda c: c.task.env, {}, id="env-null"),
        pytest.param({"env": "null"}, lambda c: c.task.env, {}, id="env-null-in-string"),
        pytest.param({"env": ""}, lambda c: c.task.env, {}, id="env-empty-string"),
        pytest.param(
            {"env": {"A": 1, "B": True, "C": None}},
            lambda c: c.task.env,
            {"A": "1", "B": "true", "C": ""},
            id="env-values-of-other-types",
        ),
        pytest.param({"env_vars": None}, lambda c: c.task.env, {}, id="env_vars-null"),
        pytest.param({"args": ["a", "b c"]}, lambda c: c.task.args, ("a", "b c"), id="args-vector"),
        pytest.param({"args": None}, lambda c: c.task.args, None, id="args-null-is-a-shell-string"),
        pytest.param({"args": []}, lambda c: c.task.args, None, id="args-empty-is-a-shell-string"),
        pytest.param({"args": '["a", "b c"]'}, lambda c: c.task.args, ("a", "b c"), id="args-json-in-string"),
        pytest.param({"args": "[]"}, lambda c: c.task.args, None, id="args-empty-in-string"),
        pytest.param({"args": "null"}, lambda c: c.task.args, None, id="args-null-in-string"),
        pytest.param({"args": ["--n", 3]}, lambda c: c.task.args, ("--n", "3"), id="args-with-a-number"),
        pytest.param({"depends_on": None}, lambda c: c.task.id, "task-1", id="depends_on-null"),
        pytest.param({"depends_on": ["a"]}, lambda c: c.task.id, "task-1", id="depends_on-was-met-by-the-plane"),
        pytest.param({"depends_on": '["a"]'}, lambda c: c.task.id, "task-1", id="depends_on-json-in-string"),
        pytest.param({"depends_on": "{a,b}"}, lambda c: c.task.id, "task-1", id="depends_on-is-not-looked-at"),
        pytest.param({"timeout": 0}, lambda c: c.task.timeout_s, 0, id="timeout-0-means-the-default"),
        pytest.param({}, lambda c: c.task.timeout_s, 0, id="timeout-missing-means-the-default"),
        pytest.param({"timeout": None}, lambda c: c.task.timeout_s, 0, id="timeout-null-means-the-default"),
        pytest.param({"timeout": 90}, lambda c: c.task.timeout_s, 90, id="timeout-given"),
        pytest.param(
            {"lease_expires_at": "2026-02-05T12:00:00Z"},
            lambda c: c.lease_expires_at,
            NOON,
            id="lease_expires_at-given",
        ),
        pytest.param({}, lambda c: (c.lease_expires_at, c.lease_ttl_s), (None, None), id="lease_expires_at-missing"),
        pytest.param({"lease_expires_at": None}, lambda c: c.lease_expires_at, None, id="lease_expires_at-null"),
        pytest.param({"lease_expires_at": ""}, lambda c: c.lease_expires_at, None, id="lease_expires_at-empty"),
        pytest.param(
            {"lease_expires_at": "0001-01-01T00:00:00Z"},
            lambda c: c.lease_expires_at,
            None,
            id="lease_expires_at-zero-time",
        ),
        pytest.param({"machine_id": "m-7"}, lambda c: c.machine_id, "m-7", id="machine_id-of-the-enrolment"),
        pytest.param({"machine_id": 7}, lambda c: c.machine_id, "7", id="machine_id-number"),
        pytest.param({"machine_id": ""}, lambda c: c.machine_id, None, id="machine_id-not-set"),
        pytest.param(
            {"id": 17, "attempt_id": 4}, lambda c: (c.task.id, c.attempt_id), ("17", "4"), id="ids-as-numbers"
        ),
        pytest.param(
            {"max_retries": 2, "retry_count": 1},
            lambda c: (c.task.retry.max, c.retries_used),
            (2, 1),
            id="max_retries-is-for-the-agent",
        ),
        pytest.param(
            {"group_id": "", "parent_id": None},
            lambda c: (c.task.group_id, c.task.parent_id),
            (None, None),
            id="group-not-set",
        ),
        pytest.param(
            {"error": None, "error_msg": "", "score": 3, "a": {"b": []}},
            lambda c: c.task.id,
            "task-1",
            id="unknown-fields-ignored",
        ),
        pytest.param(
            {"resources": {"gpus": 1, "tpu": 2}, "retry": {"max": 1, "x": 1}},
            lambda c: (c.task.resources.gpus, c.task.retry.max),
            (1, 1),
            id="unknown-fields-inside-ignored",
        ),
    ],
)
def test_claimed_task_in_any_dialect(
    changes: dict[str, Any], read: Callable[[Claim], object], expected: object
) -> None:
    """A claimed task means the same in every dialect that is deployed."""
    assert read(claim(**changes)) == expected


def test_everything_that_a_deployed_plane_sends_at_once() -> None:
    """All fields of a claimed task, as Go writes its zero values, make a plain task."""
    item = claimed_item(
        name="",
        type="shell",
        args=None,
        env=None,
        workdir="",
        timeout=0,
        priority=0,
        max_retries=0,
        retry_count=0,
        retry_delay=0,
        status="assigned",
        machine_id="",
        group_id="",
        parent_id="",
        depends_on=None,
        script="",
        assigned_agent_id="a",
        assigned_at="2026-02-05T12:00:00.123456789Z",
        created_at="0001-01-01T00:00:00Z",
        lease_expires_at="2026-02-05T20:00:00+08:00",
        started_at=None,
        stop_signal="",
        interpreter="",
    )
    (parsed,) = parse_claims({"tasks": [item]})
    assert parsed == claim(lease_expires_at="2026-02-05T12:00:00Z", assigned_at="2026-02-05T12:00:00.123456Z")


@pytest.mark.parametrize("data", [{}, {"tasks": None}, {"tasks": []}, {"tasks": {}}])
def test_claim_answer_without_tasks(data: dict[str, Any]) -> None:
    """No tasks, null, and what is no list are all an empty claim."""
    assert parse_claims(data) == []


# --- times ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("2026-02-05T12:00:00Z", NOON, id="rfc-3339"),
        pytest.param("2026-02-05T12:00:00.123456789Z", NOON + timedelta(microseconds=123456), id="nanoseconds"),
        pytest.param("2026-02-05T12:00:00.5Z", NOON + timedelta(milliseconds=500), id="tenths"),
        pytest.param("2026-02-05T20:00:00+08:00", NOON, id="offset"),
        pytest.param("2026-02-05T07:30:00-04:30", NOON, id="negative-offset"),
        pytest.param("2026-02-05T20:00:00.000000001+0800", NOON, id="offset-without-colon"),
        pytest.param("0001-01-01T00:00:00Z", None, id="zero-time"),
        pytest.param("0001-01-01T00:00:00+08:00", None, id="zero-time-with-offset"),
        pytest.param("", None, id="empty"),
        pytest.param(None, None, id="null"),
    ],
)
def test_time_in_any_dialect(text: object, expected: datetime | None) -> None:
    """Times may carry nanoseconds or an offset; the zero time, the empty text and null mean "not set"."""
    assert parse_time(text) == expected


# --- other calls ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expires", "is_cancel_requested"),
    [
        pytest.param({"task_id": "t", "renewed": True}, None, False, id="renewed-true-without-expiry"),
        pytest.param({"task_id": "t", "lease_expires_at": "2026-02-05T12:00:00Z"}, NOON, False, id="with-expiry"),
        pytest.param({"lease_expires_at": None, "cancel_requested": None}, None, False, id="nulls"),
        pytest.param({"cancel_requested": True}, None, True, id="cancel-requested"),
        pytest.param({}, None, False, id="no-data"),
    ],
)
def test_renew_answer_in_any_dialect(data: dict[str, Any], expires: datetime | None, is_cancel_requested: bool) -> None:
    """A renewal may come without an expiry: the caller then counts from the sending of the request."""
    renewal = parse_renewal(data)
    assert (renewal.lease_expires_at, renewal.is_cancel_requested) == (expires, is_cancel_requested)


def test_older_plane_gives_none_of_the_optional_answers() -> None:
    """Register and heartbeat answers of an older plane ask for nothing and name no feature."""
    data = answer(200, {"code": 0, "message": "ok", "data": {"status": "ok", "machine_id": "m"}}).data
    heartbeat = parse_heartbeat(data)
    assert (heartbeat.cancelled, heartbeat.wants_drain, heartbeat.needs_collect) == ((), False, False)
    assert parse_features(data) == frozenset()


def test_error_is_sent_under_both_names() -> None:
    """A plane that reads `error_msg` and one that reads `error` both get the sentence.

    The agent reads no error field of a task; it only sends one, and unknown fields are ignored there.
    """
    body = CompleteReport(
        agent_id="a",
        attempt_id="x",
        exit_code=1,
        stdout="",
        stderr="",
        error="it broke",
        status=TaskState.FAILED,
        cause=Cause.EXIT_CODE,
        ended_at="2026-02-05T12:00:00Z",
        runs=1,
    ).body()
    assert (body["error"], body["error_msg"]) == ("it broke", "it broke")


def test_claim_never_asks_for_none() -> None:
    """Deployed planes read a limit of 0 as 10, so such a request cannot be made."""
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        ClaimRequest(agent_id="a", machine_id="m", limit=0, request_id="r")
