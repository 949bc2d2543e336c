"""What the attempt directories say after a restart of the agent: which runs live, which have ended, and how."""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId, ProcessIdentity, RunEnded, RunNo, RunRecord, RunSpec, RunStarted
from remotegpu_sidecar import identity, record
from remotegpu_sidecar.runs import Run

_DIRECTORY_NAME: Final = re.compile(rf"({limits.ID_PATTERN})\.([1-9][0-9]{{0,8}})", re.ASCII)


class AdoptedState(enum.StrEnum):
    """What has become of a run."""

    RUNNING = "running"
    """Its shim lives; see `run`."""
    ENDED = "ended"
    """It ended while no agent was there; see `record.ended`."""
    NEVER_STARTED = "never_started"
    """No process of the task ever ran. `record` is None if not even the spec was written."""
    LOST = "lost"
    """Its shim went without an end on record; what was left of its tree has been killed."""
    OTHER_BOOT = "other_boot"
    """It was under way when the host went down."""
    UNREADABLE = "unreadable"
    """The directory is not understood, for `reason`; it was left alone."""


@dataclass(frozen=True)
class Adopted:
    """One attempt directory. `left_pids` are processes of a lost run that SIGKILL has not removed in time."""

    directory: Path
    state: AdoptedState
    attempt_id: AttemptId | None = None
    run_no: RunNo | None = None
    record: RunRecord | None = None
    run: Run | None = None
    reason: str = ""
    left_pids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Found:
    """What a directory says by itself. `shim` is set while that process may be alive."""

    directory: Path
    state: AdoptedState
    attempt_id: AttemptId | None = None
    run_no: RunNo | None = None
    record: RunRecord | None = None
    reason: str = ""
    shim: ProcessIdentity | None = field(default=None)


def directory_name(attempt_id: str, run_no: int) -> str:
    """The name of a run's directory. Raises ValueError for an id that cannot be part of a path."""
    name = f"{attempt_id}.{run_no}"
    if not _DIRECTORY_NAME.fullmatch(name):
        raise ValueError(f"attempt id {attempt_id[:64]!r} with run number {run_no} cannot name a directory")
    return name


def survey(attempts_dir: Path, settled: Container[str] = ()) -> list[Found]:
    """Look at the attempt directories but for the `settled` ones, by name. Reads files: call it in a thread.

    Raises OSError.
    """
    if not attempts_dir.exists():
        return []
    names = sorted(name for name in os.listdir(attempts_dir) if name not in settled and not name.startswith("."))
    return [inspect(attempts_dir / name) for name in names]


def inspect(directory: Path) -> Found:
    """Look at one attempt directory. Never raises for what it holds. Raises OSError where it cannot look (SCARCE)."""
    match = _DIRECTORY_NAME.fullmatch(directory.name)
    if match is None or directory.is_symlink() or not directory.is_dir():
        return Found(directory, AdoptedState.UNREADABLE, reason="not a directory named <attempt id>.<run number>")
    attempt_id, run_no = AttemptId(match[1]), RunNo(int(match[2]))
    try:
        return _inspect(directory, attempt_id, run_no)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno in identity.SCARCE:
            raise  # the fault is this process's, not the directory's
        reason = " ".join(str(error).split())[: limits.WIRE_MESSAGE_MAX_CHARS]
        return Found(directory, AdoptedState.UNREADABLE, attempt_id, run_no, reason=reason)


def _inspect(directory: Path, attempt_id: AttemptId, run_no: RunNo) -> Found:
    lines, complaints = _read(directory)
    shim = _shim_of(lines)
    if shim is not None and "ended" not in lines and not identity.is_alive(shim):
        # It may have written its end between the reading and the look at it.
        lines, complaints = _read(directory)
    if not lines and not complaints:
        return Found(directory, AdoptedState.NEVER_STARTED, attempt_id, run_no, reason="its spec was never written")
    if "spec" not in lines:
        raise ValueError("; ".join(complaints) or "the run record has no spec")
    spec = RunSpec.model_validate(lines["spec"])
    if (spec.attempt_id, spec.run_no) != (attempt_id, run_no):
        raise ValueError(f"the record is that of {spec.attempt_id}.{spec.run_no}; the directory was copied or renamed")
    started = RunStarted.model_validate(lines["started"]) if "started" in lines else None
    ended = RunEnded.model_validate(lines["ended"]) if "ended" in lines else None
    state = _state_of(lines, shim)
    found_record = RunRecord(spec=spec, started=started, ended=ended, cgroup=record.cgroup_of(lines))
    return Found(directory, state, attempt_id, run_no, found_record, "; ".join(complaints), shim)


def _read(directory: Path) -> tuple[dict[str, dict[str, object]], list[str]]:
    try:
        return record.read(directory / record.FILE_NAME)
    except FileNotFoundError:
        return {}, []


def _shim_of(lines: dict[str, dict[str, object]]) -> ProcessIdentity | None:
    """Nothing starts without a `go`, and that follows the shim's line: no line, no start."""
    return ProcessIdentity.model_validate(lines["shim"]["shim"]) if "shim" in lines else None


def _state_of(lines: dict[str, dict[str, object]], shim: ProcessIdentity | None) -> AdoptedState:
    if "ended" in lines:
        return AdoptedState.ENDED
    if shim is None:
        return AdoptedState.NEVER_STARTED
    if identity.is_alive(shim):
        return AdoptedState.RUNNING
    if "starting" not in lines and "started" not in lines:
        return AdoptedState.NEVER_STARTED
    return AdoptedState.LOST if shim.boot_id == identity.boot_id() else AdoptedState.OTHER_BOOT
