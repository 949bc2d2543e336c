"""A body that breaks a rule of protocol.md cannot be made."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from remotegpu_schemas import limits
from remotegpu_schemas.states import CAUSE_RULES, Cause, TaskState, wire_exit_code
from remotegpu_schemas.wire import (
    Artifact,
    ClaimRequest,
    CompleteReport,
    HeartbeatRequest,
    ProgressReport,
    RegisterRequest,
    ReleaseReport,
    RenewRequest,
    Request,
    StartReport,
    UploadUrlRequest,
)
from tests.schemas.support import json_values, property_test

ATTEMPT = {"agent_id": "a", "attempt_id": "x"}


def complete(**changes: Any) -> CompleteReport:
    """A completion of a success."""
    return CompleteReport.model_validate(
        {
            **ATTEMPT,
            "exit_code": 0,
            "stdout": "",
            "stderr": "",
            "error": "",
            "status": "completed",
            "cause": "succeeded",
            "ended_at": "2026-02-05T12:00:00.000Z",
            "runs": 1,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("request_", "required"),
    [
        pytest.param(
            RegisterRequest(
                agent_id="a", machine_id="m", version="1", hostname="h", ip_address="", agent_port=1, max_workers=2
            ),
            "agent_id machine_id version hostname ip_address agent_port max_workers",
            id="register",
        ),
        pytest.param(
            HeartbeatRequest(agent_id="a", machine_id="m", metrics={}, state="ready"),
            "agent_id machine_id metrics",
            id="heartbeat",
        ),
        pytest.param(
            ClaimRequest(agent_id="a", machine_id="m", limit=1, request_id="r"),
            "agent_id machine_id limit request_id",
            id="claim",
        ),
        pytest.param(
            StartReport(agent_id="a", attempt_id="x", process_id=1, run_no=1), "agent_id attempt_id", id="start"
        ),
        pytest.param(
            RenewRequest(agent_id="a", attempt_id="x", extend_sec=1), "agent_id attempt_id extend_sec", id="renew"
        ),
        pytest.param(
            ProgressReport(agent_id="a", attempt_id="x", percent=1, message=""),
            "agent_id attempt_id percent message",
            id="progress",
        ),
        pytest.param(complete(), "agent_id attempt_id exit_code stdout stderr error", id="complete"),
        pytest.param(
            ReleaseReport(agent_id="a", attempt_id="x", reason="r"), "agent_id attempt_id reason", id="release"
        ),
        pytest.param(
            UploadUrlRequest(agent_id="a", attempt_id="x", name="o", size_bytes=0, sha256="0" * 64),
            "agent_id attempt_id name size_bytes sha256",
            id="upload-url",
        ),
    ],
)
def test_required_fields_are_always_sent(request_: Request, required: str) -> None:
    """The fields that every plane knows are in the body; of the others, None is left out."""
    body = request_.body()
    assert set(required.split()) <= body.keys()
    assert None not in body.values()
    json.dumps(body, allow_nan=False)


def test_none_is_left_out_at_every_depth() -> None:
    """A value that cannot be had is left out, not sent as null."""
    capacity = {"slots": 1, "gpus": [{"uuid": "g", "model": None}], "memory_mb": None}
    body = ClaimRequest(agent_id="a", machine_id="m", limit=1, request_id="r", wait_sec=None, capacity=capacity).body()
    assert body == {
        "agent_id": "a",
        "machine_id": "m",
        "limit": 1,
        "request_id": "r",
        "capacity": {"slots": 1, "gpus": [{"uuid": "g"}]},
    }


@pytest.mark.parametrize("limit", [0, -1, limits.CLAIM_MAX_TASKS + 1])
def test_claim_limit_is_in_its_bounds(limit: int) -> None:
    """Never 0, which deployed planes read as 10; never more than an answer may hold."""
    with pytest.raises(ValidationError):
        ClaimRequest(agent_id="a", machine_id="m", limit=limit, request_id="r")


def test_integers_of_a_heartbeat_stay_integers() -> None:
    """A float in one of these makes a deployed plane refuse the whole heartbeat; percents and watts may be floats."""
    metrics = {
        "cpu_usage_percent": 12.5,
        "memory_used_gb": 31.7,
        "disk_used_gb": 4.0,
        "memory_usage_percent": None,
        "gpu_metrics": [
            {
                "index": 0.0,
                "uuid": "g",
                "util_percent": 99.5,
                "memory_used_mb": 1023.6,
                "memory_total_mb": 4096,
                "temperature_c": 61.4,
                "power_usage_w": 250.25,
            },
            {"index": 1, "temperature_c": math.nan, "memory_used_mb": math.inf},
        ],
    }
    sent = HeartbeatRequest(agent_id="a", machine_id="m", metrics=metrics, state="ready").body()["metrics"]
    expected = {
        "cpu_usage_percent": 12.5,
        "memory_used_gb": 32,
        "disk_used_gb": 4,
        "gpu_metrics": [
            {
                "index": 0,
                "uuid": "g",
                "util_percent": 99.5,
                "memory_used_mb": 1024,
                "memory_total_mb": 4096,
                "temperature_c": 61,
                "power_usage_w": 250.25,
            },
            {"index": 1},
        ],
    }
    assert json.dumps(sent) == json.dumps(expected)


@property_test
@given(
    metrics=st.dictionaries(st.sampled_from(["a_gb", "b_mb", "index", "temperature_c", "percent", "list"]), json_values)
)
def test_any_metrics_are_sendable(metrics: dict[str, Any]) -> None:
    """Whatever was measured, the body is JSON, and the integers are integers."""
    body = HeartbeatRequest(agent_id="a", machine_id="m", metrics=metrics, state="ready").body()
    sent = json.loads(json.dumps(body["metrics"], allow_nan=False))
    for key in ("a_gb", "b_mb", "index", "temperature_c"):
        assert not isinstance(sent.get(key), float)


@pytest.mark.parametrize("percent", [-0.1, 100.1, math.nan, math.inf])
def test_progress_is_a_percentage(percent: float) -> None:
    """Between 0 and 100."""
    with pytest.raises(ValidationError):
        ProgressReport(agent_id="a", attempt_id="x", percent=percent, message="")


@property_test
@given(message=st.text(st.characters(), max_size=2000))
def test_progress_message_is_bounded(message: str) -> None:
    """At most 500 characters, and sendable; a longer one is cut, not refused."""
    sent = ProgressReport(agent_id="a", attempt_id="x", percent=50, message=message).body()["message"]
    assert len(sent) == min(len(message), 500)
    sent.encode()


def test_renewal_asks_for_some_time() -> None:
    """An extension of nothing would end the lease."""
    with pytest.raises(ValidationError):
        RenewRequest(agent_id="a", attempt_id="x", extend_sec=0)


def test_completion_of_a_success() -> None:
    """The whole body, as a plane gets it."""
    artifact = Artifact(name="out/a.pt", size_bytes=3, sha256="0" * 64, key="k")
    assert complete(artifacts=[artifact], usage={"wall_s": 1.5}, started_at="2026-02-05T11:00:00.000Z").body() == {
        **ATTEMPT,
        "exit_code": 0,
        "stdout": "",
        "stderr": "",
        "error": "",
        "error_msg": "",
        "status": "completed",
        "cause": "succeeded",
        "started_at": "2026-02-05T11:00:00.000Z",
        "ended_at": "2026-02-05T12:00:00.000Z",
        "runs": 1,
        "truncated": False,
        "usage": {"wall_s": 1.5},
        "artifacts": [{"name": "out/a.pt", "size_bytes": 3, "sha256": "0" * 64, "key": "k"}],
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"exit_code": 0, "status": "failed", "cause": "exit_code"},
        {"exit_code": 0, "status": "cancelled", "cause": "cancelled"},
        {"exit_code": 1, "status": "completed"},
        {"exit_code": 1, "status": "running"},
        {"status": "broken"},
        {"cause": "bad luck"},
    ],
)
def test_completion_that_contradicts_itself_cannot_be_made(changes: dict[str, Any]) -> None:
    """Exit code 0 and the status `completed` go together; status and cause are from the closed lists."""
    with pytest.raises(ValidationError):
        complete(**changes)


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("exit_code", [None, 0, 3])
def test_every_cause_can_be_completed(cause: Cause, exit_code: int | None) -> None:
    """What the table of causes gives for status and exit code is always a valid completion."""
    status = CAUSE_RULES[cause].final_state
    body = complete(exit_code=wire_exit_code(cause, exit_code, None), status=status, cause=cause).body()
    assert (body["status"], body["cause"]) == (status.value, cause.value)
    assert TaskState(body["status"]).is_final


def test_error_of_a_completion_is_bounded_clean_text() -> None:
    """It is one sentence, whatever a task or a kernel put into it."""
    body = complete(error="a\0\udc80" + "b" * 5000).body()
    assert body["error"].startswith("a\ufffd\ufffdbbb")
    assert len(body["error"]) == limits.WIRE_MESSAGE_MAX_CHARS


@pytest.mark.parametrize(
    "changes", [{"name": ""}, {"name": "n" * 10_000}, {"size_bytes": -1}, {"sha256": "0" * 63}, {"sha256": "G" * 64}]
)
def test_upload_url_request_names_a_file(changes: dict[str, Any]) -> None:
    """A name, a size and a digest in hex."""
    values = {**ATTEMPT, "name": "out/a.pt", "size_bytes": 3, "sha256": "0" * 64}
    assert UploadUrlRequest.model_validate(values).body() == values
    with pytest.raises(ValidationError):
        UploadUrlRequest.model_validate({**values, **changes})
