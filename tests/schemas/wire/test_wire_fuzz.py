"""Whatever a control plane answers, in either dialect and with any slips, is understood or refused: never a crash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from remotegpu_schemas import limits
from remotegpu_schemas.errors import Permanent
from remotegpu_schemas.task import Task
from remotegpu_schemas.wire import (
    Claim,
    ClaimRequest,
    CompleteReport,
    HeartbeatRequest,
    ProgressReport,
    RefusedClaim,
    RegisterRequest,
    ReleaseReport,
    RenewRequest,
    Request,
    StartReport,
    UnusableClaim,
    UploadUrlRequest,
    Verdict,
    clean_text,
    inline_output,
    parse_answer,
    parse_claims,
    parse_features,
    parse_heartbeat,
    parse_http_date,
    parse_renewal,
    parse_retry_after,
    parse_time,
    parse_upload_target,
)
from tests.scale import scaled
from tests.schemas.garbage import EDGES, as_json, cut_bytes, encoded, fuzz, near, odd_values, with_cut

pytestmark = pytest.mark.timeout(scaled(120, 1800))

STRICT_TASK: Final = {
    "id": "task-1",
    "attempt_id": "attempt-1",
    "name": "train",
    "type": "shell",
    "command": "python",
    "args": ["train.py", "--epochs=100"],
    "env": {"SEED": "1"},
    "workdir": "/workspace",
    "timeout": 86400,
    "priority": 5,
    "max_retries": 3,
    "retry_count": 1,
    "retry_delay": 60,
    "status": "assigned",
    "machine_id": "machine-1",
    "group_id": "g1",
    "parent_id": None,
    "depends_on": [],
    "assigned_at": "2026-02-05T12:00:00Z",
    "lease_expires_at": "2026-02-05T12:05:00Z",
    "created_at": "2026-02-05T11:00:00Z",
    "resources": {"gpus": 1, "cpus": 8, "memory_gb": 64},
    "grace_period_sec": 30,
    "lease_ttl_sec": 300,
    "renew_interval_sec": 60,
    "labels": {"team": "vision"},
    "warn": {"signal": "SIGUSR1", "before": "5m"},
    "retry": {"on": ["exit_code"], "exit_codes": [75], "backoff": "exponential"},
    "stop_signal": "SIGINT",
}
DEPLOYED_TASK: Final = {
    "id": 17,
    "attempt_id": "attempt-1",
    "name": "",
    "type": "shell",
    "command": "echo hello",
    "args": "[]",
    "env_vars": '{"SEED": 1}',
    "env": None,
    "timeout": 0,
    "priority": 0,
    "max_retries": 0,
    "retry_count": 0,
    "status": "assigned",
    "machine_id": 4,
    "group_id": "",
    "depends_on": "null",
    "assigned_at": "2026-02-05T12:00:00.123456789Z",
    "lease_expires_at": "0001-01-01T00:00:00Z",
    "created_at": "2026-02-05T12:00:00+01:00",
}
STRICT_ANSWER: Final = {"code": 0, "message": "ok", "data": {"tasks": [STRICT_TASK]}}
DEPLOYED_ANSWER: Final = {"code": 0, "msg": "ok", "data": {"tasks": [DEPLOYED_TASK, STRICT_TASK]}, "took": 3}
DATA: Final[tuple[dict[str, Any], ...]] = (
    {"status": "ok", "machine_id": "machine-1", "features": ["release", "upload-url"]},
    {"status": "ok", "cancelled": [{"task_id": "t", "attempt_id": "a"}], "drain": True, "needs_collect": False},
    {"task_id": "t", "lease_expires_at": "2026-02-05T12:05:00Z", "cancel_requested": True},
    {"task_id": "t", "renewed": True},
    {"url": "https://store.example/k?x=1", "method": "PUT", "headers": {"Content-Type": "text/plain"}, "key": "k"},
)
DIALECT_KEYS: Final = (
    "env_vars",
    "args",
    "msg",
    "message",
    "error_msg",
    "data",
    "code",
    "args",
    "depends_on",
    "script",
)

REQUESTS: Final[dict[type[Request], dict[str, Any]]] = {
    RegisterRequest: {
        "agent_id": "a", "machine_id": "m", "version": "1", "hostname": "h", "ip_address": "10.0.0.1",
        "agent_port": 8090, "max_workers": 4, "features": ["release"], "labels": {"a": "b"}, "hardware": {"os": "x"},
    },
    HeartbeatRequest: {
        "agent_id": "a", "machine_id": "m", "state": "ready", "reasons": ["r"], "sidecars": [{"service_id": "s"}],
        "metrics": {"memory_used_gb": 1.5, "gpu_metrics": [{"index": 0, "temperature_c": 60.5, "uuid": "u"}]},
    },
    ClaimRequest: {
        "agent_id": "a", "machine_id": "m", "limit": 1, "request_id": "r", "wait_sec": 25, "capacity": {"slots": 1},
    },
    StartReport: {"agent_id": "a", "attempt_id": "b", "process_id": 1, "gpu_uuids": ["u"], "run_no": 1},
    RenewRequest: {"agent_id": "a", "attempt_id": "b", "extend_sec": 300},
    ProgressReport: {"agent_id": "a", "attempt_id": "b", "percent": 12.5, "message": "epoch 1"},
    CompleteReport: {
        "agent_id": "a", "attempt_id": "b", "exit_code": 0, "stdout": "x", "stderr": "", "error": "", "runs": 1,
        "status": "completed", "cause": "succeeded", "started_at": None, "ended_at": "2026-02-05T12:00:00Z",
        "artifacts": [{"name": "n", "size_bytes": 1, "sha256": "0" * 64, "key": "k"}], "usage": {"wall_s": 1.5},
    },
    ReleaseReport: {"agent_id": "a", "attempt_id": "b", "reason": "r"},
    UploadUrlRequest: {"agent_id": "a", "attempt_id": "b", "name": "n", "size_bytes": 1, "sha256": "0" * 64},
}  # fmt: skip


def check_texts(*texts: str) -> None:
    """What every peer and every store can keep: no NUL, and nothing that UTF-8 cannot write."""
    for text in texts:
        assert "\0" not in text
        text.encode()


def check_claims(data: Mapping[str, Any]) -> None:
    """Each item is a task that can be stored and sent, a refusal that can be sent, or a line for the log."""
    for item in parse_claims(data):
        match item:
            case Claim():
                assert Task.model_validate_json(item.task.model_dump_json()) == item.task
                assert item.lease_ttl_s is None or 0 < item.lease_ttl_s <= limits.TIMEOUT_MAX_S
                assert item.renew_interval_s is None or 0 < item.renew_interval_s <= limits.TIMEOUT_MAX_S
                assert 0 <= item.retries_used <= limits.RETRIES_MAX
                check_texts(item.machine_id or "")
            case RefusedClaim():
                check_texts(item.reason)
                assert len(item.reason) <= limits.WIRE_MESSAGE_MAX_CHARS
            case UnusableClaim():
                assert item.reason


def check_data(data: Mapping[str, Any]) -> None:
    """The data of any call, read as that of every call."""
    check_claims(data)
    parse_renewal(data)
    parse_heartbeat(data)
    assert len(parse_features(data)) <= limits.FEATURES_MAX_COUNT
    try:
        target = parse_upload_target(data)
    except Permanent:
        return
    check_texts(target.url, target.method, target.key)


@fuzz(20_000)
@given(
    body=near(STRICT_ANSWER, DIALECT_KEYS) | near(DEPLOYED_ANSWER, DIALECT_KEYS),
    encode=encoded,
    cut=cut_bytes,
    status=st.sampled_from([200, 200, 201, 204, 301, 400, 401, 404, 409, 410, 429, 500, 503, 599]),
    headers=st.dictionaries(
        st.sampled_from(["Date", "Retry-After"]), st.sampled_from([str(edge) for edge in EDGES]) | st.text(max_size=40)
    ),
)
def test_answers_with_slips(
    body: Any, encode: Any, cut: tuple[int, bytes], status: int, headers: dict[str, str]
) -> None:
    """An answer to a claim in either dialect: one verdict, and of what is accepted each task on its own."""
    answer = parse_answer(status, headers, with_cut(encode(body), cut))
    assert answer.verdict in Verdict
    check_texts(answer.message)
    assert answer.retry_after_s is None or 0 <= answer.retry_after_s <= limits.RETRY_AFTER_MAX_S
    assert answer.verdict is Verdict.OK or answer.data == {}
    check_data(answer.data)


@fuzz(20_000)
@given(item=near(STRICT_TASK, DIALECT_KEYS) | near(DEPLOYED_TASK, DIALECT_KEYS))
def test_claimed_tasks_with_slips(item: Any) -> None:
    """A claimed task in either dialect is a task, a refusal or unusable, beside a good one that it does not hurt."""
    body = json.loads(as_json({"tasks": [item, STRICT_TASK]}))
    check_claims(body)
    assert isinstance(parse_claims(body)[-1], Claim)


@fuzz(6_000)
@given(data=st.sampled_from(DATA).flatmap(near))
def test_data_with_slips(data: Any) -> None:
    """What comes with heartbeats, renewals, registrations and uploads."""
    if isinstance(data, dict):
        check_data(json.loads(as_json(data)))


@fuzz(6_000)
@given(raw=st.binary(max_size=200), value=odd_values, tail=st.binary(max_size=50), limit_bytes=st.integers(0, 300))
def test_any_values(raw: bytes, value: Any, tail: bytes, limit_bytes: int) -> None:
    """Answers that are no JSON; and times, texts and output as somebody may send them."""
    assert parse_answer(200, {}, raw).verdict in Verdict
    assert parse_answer(200, {}, as_json(value)).verdict in Verdict
    check_data({"tasks": value, "features": value, "cancelled": value, "headers": value, "url": value, "key": value})
    found = parse_time(value)
    assert found is None or found.utcoffset() is not None
    text = str(value)
    parse_retry_after(text, parse_http_date(text))
    check_texts(clean_text(text))
    cut, _ = inline_output(raw, tail, len(raw) + len(tail), limit_bytes)
    check_texts(cut)
    assert len(cut.encode()) <= limit_bytes


@fuzz(8_000)
@given(
    kind_and_body=st.sampled_from(list(REQUESTS)).flatmap(lambda kind: st.tuples(st.just(kind), near(REQUESTS[kind])))
)
def test_requests_with_slips(kind_and_body: tuple[type[Request], Any]) -> None:
    """What the agent would send is a JSON object, or it cannot be made."""
    kind, body = kind_and_body
    try:
        request = kind.model_validate(body)
    except ValidationError:
        return
    sent = request.body()
    assert isinstance(sent, dict)
    assert json.dumps(sent).encode()


@pytest.mark.parametrize("body", [STRICT_ANSWER, DEPLOYED_ANSWER], ids=["strict", "deployed"])
def test_the_forms_without_slips_are_accepted(body: dict[str, Any]) -> None:
    """Else the slips would prove little."""
    answer = parse_answer(200, {}, as_json(body))
    assert answer.verdict is Verdict.OK
    assert all(isinstance(item, Claim) for item in parse_claims(answer.data))


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.__name__)
def test_the_requests_without_slips_can_be_made(kind: type[Request]) -> None:
    """Likewise."""
    assert kind.model_validate(REQUESTS[kind]).body()
