"""The bodies of reports: what the control plane is told, within its bounds."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent.reports import Reports, usage_of
from remotegpu_queue import views
from remotegpu_queue.rows import Attempt
from remotegpu_queue.transitions import Outcome
from remotegpu_schemas.attempt import (
    AttemptId,
    EndedBy,
    ProcessIdentity,
    RunEnded,
    RunNo,
    RunRecord,
    RunStarted,
    RunUsage,
)
from remotegpu_schemas.states import Cause
from remotegpu_schemas.task import TaskId
from remotegpu_schemas.wire import JsonObject, RefusedClaim
from remotegpu_sidecar.adoption import directory_name
from remotegpu_sidecar.output import segment_name
from tests.agent.support import AGENT, BOOT, MovableClock, add_attempt, open_store
from tests.sidecar.support import make_spec

ONE = RunNo(1)
SUCCEEDED = Outcome(Cause.SUCCEEDED, 0, None, "")
LIMIT = 1000


@pytest.fixture
def reports(tmp_path: Path) -> Reports:
    """Reports with little room for output."""
    return Reports(AGENT, tmp_path / "attempts", LIMIT)


@pytest.fixture
async def claimed(tmp_path: Path) -> AsyncGenerator[Attempt]:
    """An attempt of the control plane."""
    async with open_store(tmp_path) as opened:
        attempt_id = await add_attempt(opened.store, MovableClock(), "t", attempt_id="a", ttl_s=60.0)
        attempt = await opened.store.read(lambda db: views.attempt(db, attempt_id))
        assert attempt is not None
        yield attempt


def local(attempt: Attempt) -> Attempt:
    """The same, submitted here."""
    return dataclasses.replace(attempt, origin="local", lease=None)


def directory_of(reports: Reports, attempt: Attempt) -> Path:
    """The run's directory."""
    directory = reports.attempts_dir / directory_name(attempt.attempt_id, ONE)
    directory.mkdir(parents=True)
    return directory


def record_of(attempt: Attempt, **ended: Any) -> RunRecord:
    """The record of a run that has ended."""
    spec = make_spec("true").model_copy(update={"attempt_id": attempt.attempt_id})
    values: dict[str, Any] = {"ended_by": EndedBy.EXIT, "exit_code": 0, "ended_wall_ns": 10**9, **ended}
    return RunRecord(spec=spec, ended=RunEnded(**values))


def complete(
    reports: Reports, attempt: Attempt, outcome: Outcome, record: RunRecord | None, ended_ms: int
) -> JsonObject | None:
    """The completion after run 1, with its output as it lies there."""
    return reports.complete(attempt, ONE, outcome, reports.read_outputs(attempt, ONE, record), ended_ms)


def test_a_start(reports: Reports, claimed: Attempt) -> None:
    """Process id and run number; nothing for a local task."""
    process = ProcessIdentity(boot_id=BOOT, pid=42, start_ticks=1)
    started = RunStarted(process=process, shim=process, started_wall_ns=1, started_boottime_ns=1)
    assert reports.start(claimed, RunNo(2), started) == {
        "agent_id": AGENT,
        "attempt_id": "a",
        "process_id": 42,
        "gpu_uuids": [],
        "run_no": 2,
    }
    assert reports.start(local(claimed), ONE, started) is None


def test_progress(reports: Reports, claimed: Attempt) -> None:
    """Percent and message, cut to its bound; nothing for a local task."""
    body = reports.progress(claimed, 50.0, "x" * 600)
    assert body is not None
    assert (body["percent"], len(body["message"])) == (50.0, 500)
    assert reports.progress(local(claimed), 50.0, "x") is None


def test_a_completion_with_short_output(reports: Reports, claimed: Attempt) -> None:
    """Both streams whole, text that every peer can store, usage, the number of runs."""
    directory = directory_of(reports, claimed)
    (directory / segment_name("stdout", 0)).write_bytes(b"out\0\xff\n")
    (directory / segment_name("stderr", 0)).write_bytes(b"err\n")
    usage = RunUsage(wall_s=1.23456, cpu_s=0.5, memory_peak_bytes=3 * 2**20)
    record = record_of(claimed, stdout_bytes=6, stderr_bytes=4, usage=usage)
    body = complete(reports, claimed, SUCCEEDED, record, 1_770_000_000_000)
    assert body is not None
    assert (body["stdout"], body["stderr"], body["truncated"]) == ("out��\n", "err\n", False)
    assert (body["status"], body["cause"], body["exit_code"], body["runs"]) == ("completed", "succeeded", 0, 1)
    expected = {"wall_s": 1.235, "cpu_s": 0.5, "memory_peak_mb": 3, "io_read_mb": 0.0, "io_write_mb": 0.0}
    assert body["usage"] == usage_of(usage) == expected
    assert body["ended_at"] == "2026-02-02T02:40:00.000Z"
    assert body["error"] == body["error_msg"] == ""


@pytest.mark.parametrize("size", [LIMIT, LIMIT + 1, 10 * LIMIT])
def test_output_over_the_limit_keeps_head_and_tail(reports: Reports, claimed: Attempt, size: int) -> None:
    """Within the limit as UTF-8, with a marker that says how much there was; at the limit it is whole."""
    data = bytes(0x41 + (number * 7) % 26 for number in range(size))
    (directory_of(reports, claimed) / segment_name("stdout", 0)).write_bytes(data)
    body = complete(reports, claimed, SUCCEEDED, record_of(claimed, stdout_bytes=size), 0)
    assert body is not None
    text: str = body["stdout"]
    assert len(text.encode()) <= LIMIT
    assert body["truncated"] is (size > LIMIT)
    if size == LIMIT:
        assert text.encode() == data
    else:
        head, marker, tail = text.partition(f"\n... [remotegpu: output of {size} bytes cut here] ...\n")
        assert marker
        assert data.startswith(head.encode())
        assert data.endswith(tail.encode())
        assert min(len(head), len(tail)) > LIMIT // 3


def test_output_whose_middle_was_dropped(reports: Reports, claimed: Attempt) -> None:
    """The first and the newest segment, and the true size."""
    directory = directory_of(reports, claimed)
    (directory / segment_name("stdout", 0)).write_bytes(b"first " * 20)
    (directory / segment_name("stdout", 10**9)).write_bytes(b"last " * 20)
    body = complete(reports, claimed, SUCCEEDED, record_of(claimed, stdout_bytes=10**9 + 100), 0)
    assert body is not None
    assert body["truncated"] is True
    assert body["stdout"].startswith("first first")
    assert body["stdout"].endswith("last last ")
    assert "output of 1000000100 bytes cut here" in body["stdout"]


def test_a_run_whose_shim_was_lost(reports: Reports, claimed: Attempt) -> None:
    """What lies there counts; no usage is made up."""
    (directory_of(reports, claimed) / segment_name("stdout", 0)).write_bytes(b"before it died\n")
    lost = Outcome(Cause.AGENT_LOST, 125, None, "the supervisor of this run was lost")
    for record in (None, RunRecord(spec=make_spec("true"))):
        body = complete(reports, claimed, lost, record, 0)
        assert body is not None
        assert (body["stdout"], body["stderr"], body["truncated"]) == ("before it died\n", "", False)
        assert (body["status"], body["exit_code"], body["cause"]) == ("failed", 125, "agent_lost")
        assert "usage" not in body


def test_output_that_cannot_be_found_or_read(reports: Reports, claimed: Attempt) -> None:
    """A removed directory is no output; what is there and cannot be read is said. The result goes all the same."""
    body = complete(reports, claimed, SUCCEEDED, record_of(claimed, stdout_bytes=5), 0)
    assert body is not None
    assert (body["stdout"], body["truncated"]) == ("", False)
    directory = directory_of(reports, claimed)
    (directory / segment_name("stdout", 0)).symlink_to("/etc/passwd")
    body = complete(reports, claimed, SUCCEEDED, record_of(claimed, stdout_bytes=5), 0)
    assert body is not None
    assert "root" not in body["stdout"]
    assert body["stdout"].startswith("[remotegpu: the output cannot be read: ")
    assert body["truncated"] is True


def test_nothing_is_said_for_a_superseded_attempt_or_a_local_task(reports: Reports, claimed: Attempt) -> None:
    """Another attempt speaks for the task; a local task has nobody who asks."""
    superseded = Outcome(Cause.SUPERSEDED, 125, None, "x")
    assert complete(reports, claimed, superseded, None, 0) is None
    assert complete(reports, local(claimed), SUCCEEDED, None, 0) is None
    for can_release in (False, True):
        assert reports.never_ran(claimed, superseded, 0, can_release=can_release) is None
        assert reports.never_ran(local(claimed), SUCCEEDED, 0, can_release=can_release) is None


def test_a_task_whose_lease_was_over_is_handed_back_where_that_is_possible(reports: Reports, claimed: Attempt) -> None:
    """Released, or left to lapse; one that has run before is completed instead."""
    lost = Outcome(Cause.LEASE_LOST, 125, None, "the lease ended before the task could be started")
    released = reports.never_ran(claimed, lost, 0, can_release=True)
    assert released == ("release", {"agent_id": AGENT, "attempt_id": "a", "reason": lost.error})
    assert reports.never_ran(claimed, lost, 0, can_release=False) is None
    again = dataclasses.replace(claimed, run_no=RunNo(2))
    completed = reports.never_ran(again, lost, 0, can_release=True)
    assert completed is not None
    assert (completed[0], completed[1]["cause"], completed[1]["runs"]) == ("complete", "lease_lost", 2)


def test_a_cancelled_task_that_never_ran_is_completed(reports: Reports, claimed: Attempt) -> None:
    """With no output and no runs."""
    made = reports.never_ran(claimed, Outcome(Cause.CANCELLED, 143, None, "cancelled"), 0, can_release=True)
    assert made is not None
    kind, body = made
    assert (kind, body["status"], body["exit_code"], body["runs"]) == ("complete", "cancelled", 143, 0)
    assert (body["stdout"], body["stderr"]) == ("", "")


def test_a_long_reason_is_cut(reports: Reports, claimed: Attempt) -> None:
    """An error is one readable sentence, bounded, and clean."""
    body = reports.refused(RefusedClaim(TaskId("t"), AttemptId("a"), "x\0" * 5000), 0)
    assert len(body["error"]) == 2000
    assert "\0" not in body["error"]
    assert body["error"].startswith("the agent cannot run this task: x")
    assert (body["status"], body["cause"], body["exit_code"]) == ("failed", "policy_refused", 126)
    outcome = Outcome(Cause.EXIT_CODE, 1, None, "y" * 5000)
    completed = complete(reports, claimed, outcome, None, 0)
    assert completed is not None
    assert len(completed["error"]) == 2000
