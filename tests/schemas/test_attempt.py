"""Records of runs are read by later versions, and by earlier ones."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from remotegpu_schemas.attempt import EndedBy, Lease, ProcessIdentity, RunEnded, RunRecord, RunSpec, RunStarted

SPEC: dict[str, Any] = {"task_id": "t", "attempt_id": "a", "run_no": 1, "argv": ["true"], "env": {"A": "1"}, "cwd": "/"}
PROCESS: dict[str, Any] = {"boot_id": "b", "pid": 2, "start_ticks": 3}
STARTED: dict[str, Any] = {"process": PROCESS, "shim": PROCESS, "started_wall_ns": 1, "started_boottime_ns": 2}
ENDED: dict[str, Any] = {"ended_by": "exit", "exit_code": 0, "ended_wall_ns": 5}


def test_least_record_of_this_version() -> None:
    """The required keys of each line are these, and stay so: records of shims that run now must be read later."""
    record = RunRecord.model_validate({"spec": SPEC, "started": STARTED, "ended": ENDED})
    assert (record.spec.argv, record.spec.umask, record.spec.stop_signal) == (("true",), 0o022, 15)
    assert record.ended is not None
    assert (record.ended.ended_by, record.ended.usage.wall_s) == (EndedBy.EXIT, 0.0)


def test_keys_of_a_later_version_are_ignored() -> None:
    """At every depth."""
    newer = {**STARTED, "later": 1, "process": {**PROCESS, "later": 2}}
    assert RunStarted.model_validate(newer) == RunStarted.model_validate(STARTED)
    assert RunEnded.model_validate({**ENDED, "later": []}) == RunEnded.model_validate(ENDED)


@pytest.mark.parametrize(
    "changes",
    [
        {"argv": []},
        {"umask": 0o1000},
        {"timeout_s": 0},
        {"grace_period_s": -1},
        {"stop_signal": 0},
        {"output_limit_bytes": 1},
        {"env": None},
        {"cwd": None},
    ],
)
def test_spec_that_no_shim_could_follow(changes: dict[str, Any]) -> None:
    """It is refused before a process is made."""
    with pytest.raises(ValidationError):
        RunSpec.model_validate({**SPEC, **changes})


@pytest.mark.parametrize("changes", [{"pid": 0}, {"pid": -1}, {"start_ticks": -1}, {"boot_id": None}])
def test_identity_that_is_no_process(changes: dict[str, Any]) -> None:
    """0 and negative numbers would signal groups (kill(2))."""
    with pytest.raises(ValidationError):
        ProcessIdentity.model_validate({**PROCESS, **changes})


def test_lease_has_a_term() -> None:
    """A lease of no length is none."""
    with pytest.raises(ValidationError):
        Lease(ttl_s=0, deadline_boottime_ns=1, boot_id="b")


def test_record_comes_back_from_its_json() -> None:
    """What the agent writes is what it reads."""
    record = RunRecord.model_validate({"spec": SPEC, "started": STARTED, "ended": ENDED})
    assert RunRecord.model_validate_json(record.model_dump_json()) == record
