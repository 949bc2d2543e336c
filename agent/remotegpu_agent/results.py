"""From a run that has ended to the completion that the control plane gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from remotegpu_queue.rows import Attempt
from remotegpu_queue.transitions import Outcome
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import RunRecord, RunUsage
from remotegpu_schemas.states import CAUSE_RULES
from remotegpu_schemas.wire import CompleteReport, JsonObject, clean_text, format_time, inline_output

_ERROR_MAX_CHARS: Final = limits.WIRE_MESSAGE_MAX_CHARS

ReadOutput = Callable[[str, int, int], bytes]
"""(stream, offset, limit) -> bytes from there; a negative offset counts from the end."""


def complete_report(
    attempt: Attempt,
    outcome: Outcome,
    record: RunRecord | None,
    read_output: ReadOutput,
    *,
    agent_id: str,
    runs: int,
    ended_ms: int,
    inline_limit_bytes: int,
) -> JsonObject:
    """The body of POST /tasks/{id}/complete. Output longer than the limit keeps its head and its tail."""
    ended = record.ended if record is not None else None
    stdout, stdout_cut = _inline("stdout", ended.stdout_bytes if ended else None, read_output, inline_limit_bytes)
    stderr, stderr_cut = _inline("stderr", ended.stderr_bytes if ended else None, read_output, inline_limit_bytes)
    return CompleteReport(
        agent_id=agent_id,
        attempt_id=attempt.attempt_id,
        exit_code=outcome.exit_code,
        stdout=stdout,
        stderr=stderr,
        error=clean_text(outcome.error)[:_ERROR_MAX_CHARS],
        status=CAUSE_RULES[outcome.cause].final_state,
        cause=outcome.cause,
        signal=outcome.signal,
        started_at=format_time(attempt.started_at_ms / 1000) if attempt.started_at_ms is not None else None,
        ended_at=format_time(ended_ms / 1000),
        runs=runs,
        truncated=stdout_cut or stderr_cut,
        usage=usage_of(ended.usage) if ended else None,
    ).body()


def usage_of(usage: RunUsage) -> dict[str, float]:
    """The usage as it is stored, shown and sent."""
    return {
        "wall_s": round(usage.wall_s, 3),
        "cpu_s": round(usage.cpu_s, 3),
        "memory_peak_mb": round(usage.memory_peak_bytes / limits.MIB),
    }


def _inline(stream: str, total_bytes: int | None, read_output: ReadOutput, limit_bytes: int) -> tuple[str, bool]:
    if total_bytes == 0:
        return "", False
    head = read_output(stream, 0, limit_bytes)
    if total_bytes is None:  # the shim was lost before it could count
        total_bytes = len(head) + (1 if len(head) == limit_bytes else 0)
    tail = read_output(stream, -limit_bytes, limit_bytes) if total_bytes > len(head) else b""
    return inline_output(head, tail, total_bytes, limit_bytes)
