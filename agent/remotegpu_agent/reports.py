"""The bodies of all reports: start, progress, release and the completion with its output. Sends nothing.

None is made for a local task, nor where another attempt has taken over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from remotegpu_queue.outbox import ReportKind
from remotegpu_queue.rows import Attempt
from remotegpu_queue.transitions import Outcome
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId, RunNo, RunRecord, RunStarted, RunUsage
from remotegpu_schemas.states import CAUSE_RULES, EXIT_NOT_EXECUTABLE, Cause
from remotegpu_schemas.wire import (
    CompleteReport,
    JsonObject,
    ProgressReport,
    RefusedClaim,
    ReleaseReport,
    StartReport,
    clean_text,
    format_time,
    inline_output,
)
from remotegpu_sidecar.adoption import directory_name
from remotegpu_sidecar.output import read_output

log = structlog.get_logger(__name__)

_ERROR_MAX_CHARS: Final = limits.WIRE_MESSAGE_MAX_CHARS


@dataclass(frozen=True)
class Outputs:
    """What a completion says of a run's output and of what it used."""

    stdout: str = ""
    stderr: str = ""
    was_truncated: bool = False
    usage: JsonObject | None = None


@dataclass(frozen=True)
class Reports:
    """Makes reports in the name of one agent. Output longer than the limit keeps its head and its tail."""

    agent_id: str
    attempts_dir: Path
    inline_limit_bytes: int

    def start(self, attempt: Attempt, run_no: RunNo, started: RunStarted) -> JsonObject | None:
        """POST /tasks/{id}/start."""
        if attempt.origin == "local":
            return None
        return self.start_body(attempt.attempt_id, run_no, started)

    def start_body(self, attempt_id: AttemptId, run_no: RunNo, started: RunStarted) -> JsonObject:
        """As `start`, of a claimed attempt."""
        return StartReport(
            agent_id=self.agent_id, attempt_id=attempt_id, process_id=started.process.pid, run_no=run_no
        ).body()

    def begun(self, attempt: Attempt, run_no: RunNo) -> JsonObject | None:
        """POST /tasks/{id}/start for an attempt that goes on after a run without a process, so that it is renewed."""
        if attempt.origin == "local" or attempt.is_start_accepted:
            return None
        return StartReport(agent_id=self.agent_id, attempt_id=attempt.attempt_id, run_no=run_no).body()

    def progress(self, attempt: Attempt, percent: float, message: str) -> JsonObject | None:
        """POST /tasks/{id}/progress."""
        if attempt.origin == "local":
            return None
        return ProgressReport(
            agent_id=self.agent_id, attempt_id=attempt.attempt_id, percent=percent, message=message
        ).body()

    def read_outputs(self, attempt: Attempt, run_no: RunNo, record: RunRecord | None) -> Outputs:
        """The run's output as it goes inline; nothing for a local task."""
        if attempt.origin == "local":
            return Outputs()
        ended = record.ended if record is not None else None
        directory = self.attempts_dir / directory_name(attempt.attempt_id, run_no)
        stdout, stdout_cut = self._inline(directory, "stdout", ended.stdout_bytes if ended else None)
        stderr, stderr_cut = self._inline(directory, "stderr", ended.stderr_bytes if ended else None)
        return Outputs(stdout, stderr, stdout_cut or stderr_cut, usage_of(ended.usage) if ended else None)

    def complete(
        self, attempt: Attempt, run_no: RunNo, outcome: Outcome, outputs: Outputs, ended_ms: int
    ) -> JsonObject | None:
        """POST /tasks/{id}/complete, after its last run."""
        if attempt.origin == "local" or not CAUSE_RULES[outcome.cause].is_reported:
            return None
        return CompleteReport(
            agent_id=self.agent_id,
            attempt_id=attempt.attempt_id,
            exit_code=outcome.exit_code,
            stdout=outputs.stdout,
            stderr=outputs.stderr,
            error=clean_text(outcome.error)[:_ERROR_MAX_CHARS],
            status=CAUSE_RULES[outcome.cause].final_state,
            cause=outcome.cause,
            signal=outcome.signal,
            started_at=format_time(attempt.started_at_ms / 1000) if attempt.started_at_ms is not None else None,
            ended_at=format_time(ended_ms / 1000),
            runs=run_no,
            truncated=outputs.was_truncated,
            usage=outputs.usage,
        ).body()

    def never_ran(
        self, attempt: Attempt, outcome: Outcome, now_ms: int, *, can_release: bool
    ) -> tuple[ReportKind, JsonObject] | None:
        """For an attempt that ends without a process.

        One whose lease was over before it could start is handed back where the plane can, else left to lapse.
        """
        if attempt.origin == "local" or not CAUSE_RULES[outcome.cause].is_reported:
            return None
        if outcome.cause is Cause.LEASE_LOST and attempt.run_no == 0:
            return ("release", self.release(attempt.attempt_id, outcome.error)) if can_release else None
        return "complete", self._without_output(attempt.attempt_id, outcome, now_ms, runs=attempt.run_no)

    def release(self, attempt_id: AttemptId, reason: str) -> JsonObject:
        """POST /tasks/{id}/release: a claimed task goes back unstarted."""
        return ReleaseReport(agent_id=self.agent_id, attempt_id=attempt_id, reason=clean_text(reason)).body()

    def refused(self, claim: RefusedClaim, now_ms: int) -> JsonObject:
        """For a claimed task that this agent can never run, of which nothing is stored."""
        error = f"the agent cannot run this task: {claim.reason}"[:_ERROR_MAX_CHARS]
        outcome = Outcome(Cause.POLICY_REFUSED, EXIT_NOT_EXECUTABLE, None, error)
        return self._without_output(claim.attempt_id, outcome, now_ms, runs=0)

    def _without_output(self, attempt_id: AttemptId, outcome: Outcome, now_ms: int, *, runs: int) -> JsonObject:
        return CompleteReport(
            agent_id=self.agent_id,
            attempt_id=attempt_id,
            exit_code=outcome.exit_code,
            stdout="",
            stderr="",
            error=clean_text(outcome.error)[:_ERROR_MAX_CHARS],
            status=CAUSE_RULES[outcome.cause].final_state,
            cause=outcome.cause,
            ended_at=format_time(now_ms / 1000),
            runs=runs,
        ).body()

    def _inline(self, directory: Path, stream: str, total_bytes: int | None) -> tuple[str, bool]:
        """The stream's text and whether it was cut; without a total (the shim was lost) what lies there counts."""
        if total_bytes == 0:
            return "", False
        limit = self.inline_limit_bytes
        try:
            _, head, end = read_output(directory, stream, 0, limit)
            tail = read_output(directory, stream, -limit, limit)[1] if max(end, total_bytes or 0) > len(head) else b""
        except FileNotFoundError:
            return "", False
        except OSError as error:
            log.warning("output cannot be read", directory=str(directory), stream=stream, error=str(error))
            return f"[remotegpu: the output cannot be read: {error.strerror}]", True
        return inline_output(head, tail, max(end, total_bytes or 0), limit)


def usage_of(usage: RunUsage) -> dict[str, float]:
    """The usage as it is stored, shown and sent."""
    return {
        "wall_s": round(usage.wall_s, 3),
        "cpu_s": round(usage.cpu_s, 3),
        "memory_peak_mb": round(usage.memory_peak_bytes / limits.MIB),
        "io_read_mb": round(usage.io_read_bytes / limits.MIB, 1),
        "io_write_mb": round(usage.io_write_bytes / limits.MIB, 1),
    }
