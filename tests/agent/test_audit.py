"""The audit log: whole bounded lines in a file per day, and no harm when it cannot be written."""

from __future__ import annotations

import asyncio
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import structlog.testing

from remotegpu_agent.audit import AuditEntry, AuditLog
from remotegpu_schemas.limits import AUDIT_LINE_MAX_BYTES

NOON = 1_770_292_800.0
"""2026-02-05T12:00:00Z."""


def entry(**changes: Any) -> AuditEntry:
    """A use of /process/stop."""
    fields: dict[str, Any] = {
        "who": "token:ci",
        "what": "process_stop",
        "source": "10.0.0.1",
        "outcome": "ok",
        "detail": {"process_id": 4711, "signal": "SIGTERM", "task_id": None},
    }
    return AuditEntry(**(fields | changes))


def lines(directory: Path) -> list[dict[str, Any]]:
    """All lines of all days."""
    return [json.loads(line) for file in sorted(directory.iterdir()) for line in file.read_bytes().splitlines()]


async def test_a_line(tmp_path: Path) -> None:
    """Who, what, when, from where, how it ended; in a closed file of its day in a closed directory."""
    log = AuditLog(tmp_path / "audit", now=lambda: NOON + 0.25)
    await log.record(entry())
    path = tmp_path / "audit" / "2026-02-05.jsonl"
    assert json.loads(path.read_text()) == {
        "time": "2026-02-05T12:00:00.250Z",
        "who": "token:ci",
        "what": "process_stop",
        "from": "10.0.0.1",
        "outcome": "ok",
        "detail": {"process_id": 4711, "signal": "SIGTERM", "task_id": None},
    }
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_file_per_day(tmp_path: Path) -> None:
    """The day is that of UTC, whatever the host's time zone; a new object appends to what is there."""
    for moment in (NOON, NOON + 43_199.9, NOON + 43_200):
        AuditLog(tmp_path, now=lambda moment=moment: moment).append(entry())  # type: ignore[misc]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["2026-02-05.jsonl", "2026-02-06.jsonl"]
    assert len(lines(tmp_path)) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": "x" * 100_000},
        {"outcome": "\0" * 100_000, "who": "\U0001f600" * 100_000},
        {"detail": {f"key{number}": "y" * 1000 for number in range(100)}},
        {"detail": {"k" * 100_000: "v" * 100_000}},
        {"detail": {f"{number}": number for number in range(10_000)}},
    ],
)
def test_lines_are_bounded(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Whatever comes in, a line stays within its bound, is JSON, and keeps who did what."""
    AuditLog(tmp_path, now=lambda: NOON).append(entry(**changes))
    (path,) = tmp_path.iterdir()
    assert len(path.read_bytes()) <= AUDIT_LINE_MAX_BYTES
    (line,) = lines(tmp_path)
    assert line["what"] == "process_stop"


def test_newlines_and_odd_text_stay_in_their_line(tmp_path: Path) -> None:
    """Nobody can forge a line by what they send."""
    AuditLog(tmp_path, now=lambda: NOON).append(entry(outcome='x"}\n{"who": "root"}', detail={"id": "\udcff\u2028"}))
    (line,) = lines(tmp_path)
    assert line["outcome"] == 'x"}\n{"who": "root"}'
    assert line["detail"] == {"id": "?\u2028"}


async def test_many_at_once(tmp_path: Path) -> None:
    """Lines from several threads never mix."""
    log = AuditLog(tmp_path, now=lambda: NOON)
    await asyncio.gather(*(log.record(entry(detail={"number": number})) for number in range(200)))
    assert {line["detail"]["number"] for line in lines(tmp_path)} == set(range(200))


def test_a_failed_write_is_logged_not_raised(tmp_path: Path) -> None:
    """The operation goes on; the log has the line that the file lacks."""
    (tmp_path / "file").write_text("")
    with structlog.testing.capture_logs() as logs:
        AuditLog(tmp_path / "file" / "audit", now=lambda: NOON).append(entry())
    assert [record["event"] for record in logs] == ["audit_write_failed"]
    assert "process_stop" in logs[0]["line"]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    """Nobody can make the agent append to another file."""
    target = tmp_path / "target"
    target.write_text("")
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "2026-02-05.jsonl").symlink_to(target)
    with structlog.testing.capture_logs() as logs:
        AuditLog(tmp_path / "audit", now=lambda: NOON).append(entry())
    assert logs[0]["event"] == "audit_write_failed"
    assert target.read_text() == ""


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F24: a write that is cut short is taken back, so that the next line stands by itself."""
    log = AuditLog(tmp_path, now=lambda: NOON)
    log.append(entry())
    size = next(tmp_path.iterdir()).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        with structlog.testing.capture_logs() as logs:
            log.append(entry())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert logs[0]["error"].startswith("only 10 of ")
    log.append(entry())
    assert len(lines(tmp_path)) == 2
    assert os.listdir(tmp_path) == ["2026-02-05.jsonl"]
