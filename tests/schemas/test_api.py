"""Requests of the agent's own API, as deployed callers send them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from remotegpu_schemas import limits
from remotegpu_schemas.api import Envelope, Ping, ProcessStopRequest, StopSignal, TaskPage


@pytest.mark.parametrize(
    ("body", "signal"),
    [
        ({"process_id": 7}, StopSignal.SIGTERM),
        ({"process_id": 7, "signal": "SIGKILL"}, StopSignal.SIGKILL),
        ({"process_id": 7, "signal": ""}, StopSignal.SIGTERM),
        ({"process_id": 7, "signal": None}, StopSignal.SIGTERM),
        ({"process_id": 7, "host_id": 3, "reason": "x"}, StopSignal.SIGTERM),
        ({"process_id": 7, "host_id": {"any": []}}, StopSignal.SIGTERM),
    ],
)
def test_process_stop(body: dict[str, Any], signal: StopSignal) -> None:
    """SIGTERM unless SIGKILL is asked for; `host_id` may be anything, unknown keys are ignored."""
    request = ProcessStopRequest.model_validate_json(json.dumps(body))
    assert (request.process_id, request.signal) == (7, signal)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"process_id": "7"},
        {"process_id": 7.0},
        {"process_id": True},
        {"process_id": 0},
        {"process_id": -1},
        {"process_id": 2**31},
        {"process_id": None},
        {"process_id": 7, "signal": "SIGHUP"},
        {"process_id": 7, "signal": 9},
        {"process_id": 7, "signal": ["SIGTERM"]},
        {"process_id": 7, "signal": "sigterm"},
    ],
)
def test_process_stop_refuses(body: dict[str, Any]) -> None:
    """A process id is a positive JSON integer, a signal is one of two words."""
    with pytest.raises(ValidationError):
        ProcessStopRequest.model_validate_json(json.dumps(body))


def test_envelope_on_success_and_on_error() -> None:
    """The same five fields, with `data` null on an error."""
    ok = Envelope[Ping](
        success=True, code=0, message="ok", data=Ping(version="1", agent_id="a", state="ready"), timestamp="t"
    )
    failed = Envelope[Ping](success=False, code=30004, message="task not found", data=None, timestamp="t")
    fields = {"success", "code", "message", "data", "timestamp"}
    assert ok.model_dump().keys() == failed.model_dump().keys() == fields
    assert ok.model_dump()["data"]["ok"] is True


@pytest.mark.parametrize("limit", [0, limits.API_LIST_MAX + 1])
def test_page_is_bounded(limit: int) -> None:
    """A listing holds at least one task and at most what the bound allows."""
    with pytest.raises(ValidationError):
        TaskPage(tasks=[], total=0, limit=limit, offset=0)
