"""The audit log: one JSON line for each thing that somebody asked this host to do, in a file per day (UTC).

It knows nothing of HTTP. It never stops an operation: a line that cannot be written is logged as an error instead.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import structlog

from remotegpu_schemas.limits import AUDIT_LINE_MAX_BYTES

_VALUE_MAX_CHARS: Final = 1024
_VALUE_MIN_CHARS: Final = 64
_DAYS: Final = "[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9].jsonl"

log: structlog.typing.FilteringBoundLogger = structlog.get_logger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """Who asked for what, from where, and how it ended. No secrets: not tokens, not environments, not command lines."""

    who: str
    """The caller as it was recognised: `token:NAME`, `uid:N`, `legacy:NETWORK`."""
    what: str
    """The operation's name, for example `process_stop`."""
    source: str
    """The caller's address, or `unix`."""
    outcome: str
    """`ok`, or the business code of the refusal, for example `30010 PROCESS_NOT_MANAGED`."""
    detail: Mapping[str, str | int | None] = dataclasses.field(default_factory=dict)
    """What it was done to."""


class AuditLog:
    """Appends to `<directory>/YYYY-MM-DD.jsonl`; files are 0600, the directory 0700."""

    def __init__(self, directory: Path, *, now: Callable[[], float] = time.time) -> None:
        self._directory = directory
        self._now = now
        self._lock = threading.Lock()

    async def record(self, entry: AuditEntry) -> None:
        """Append a line without holding up the event loop; never raises for a failed write."""
        await asyncio.to_thread(self.append, entry)

    def drop_before(self, before_s: float) -> int:
        """Remove the files of days that were over before this time (seconds since the epoch); how many. Blocking."""
        first_kept = f"{datetime.datetime.fromtimestamp(before_s, datetime.UTC):%Y-%m-%d}.jsonl"
        dropped = 0
        for path in self._directory.glob(_DAYS):
            if path.name < first_kept:
                path.unlink(missing_ok=True)
                dropped += 1
        return dropped

    def drop_above(self, max_bytes: int, now_s: float) -> int:
        """Remove the files of the oldest days until all are within this size; how many. Blocking, safe to repeat.

        The file of the day of `now_s` (seconds since the epoch) counts, but stays whatever its size. Raises OSError.
        """
        today = f"{datetime.datetime.fromtimestamp(now_s, datetime.UTC):%Y-%m-%d}.jsonl"
        sizes = {path: path.lstat().st_size for path in sorted(self._directory.glob(_DAYS))}
        excess_bytes, dropped = sum(sizes.values()) - max_bytes, 0
        for path, size_bytes in sizes.items():
            if excess_bytes > 0 and path.name != today:
                path.unlink(missing_ok=True)
                excess_bytes -= size_bytes
                dropped += 1
        return dropped

    def append(self, entry: AuditEntry) -> None:
        """As `record`, blocking; safe to call from several threads."""
        moment = datetime.datetime.fromtimestamp(self._now(), datetime.UTC)
        line = format_line(entry, moment)
        path = self._directory / f"{moment:%Y-%m-%d}.jsonl"
        try:
            with self._lock:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                _append_whole(path, line)
        except OSError as error:
            log.error("audit_write_failed", path=str(path), error=str(error), line=line.decode("utf-8", "replace"))


def format_line(entry: AuditEntry, moment: datetime.datetime) -> bytes:
    """One line of JSON, at most AUDIT_LINE_MAX_BYTES with its newline.

    Long values are cut and then end in `…`; a detail of very many values is left out.
    """
    limit = _VALUE_MAX_CHARS
    while True:
        line = _dump(entry, moment, limit)
        if len(line) <= AUDIT_LINE_MAX_BYTES:
            return line
        if limit <= _VALUE_MIN_CHARS:
            return _dump(dataclasses.replace(entry, detail={"omitted": len(entry.detail)}), moment, limit)
        limit //= 2


def _dump(entry: AuditEntry, moment: datetime.datetime, limit: int) -> bytes:
    record = {
        "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "who": _cut(entry.who, limit),
        "what": _cut(entry.what, limit),
        "from": _cut(entry.source, limit),
        "outcome": _cut(entry.outcome, limit),
        "detail": {
            _cut(key, limit): _cut(value, limit) if isinstance(value, str) else value
            for key, value in entry.detail.items()
        },
    }
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


def _append_whole(path: Path, line: bytes) -> None:
    """Append the line or nothing: a disk that fills up in the middle leaves no half line for the next one to join."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        written = os.write(descriptor, line)
        if written != len(line):
            os.ftruncate(descriptor, size)
            raise OSError(f"only {written} of {len(line)} bytes could be written")
    finally:
        os.close(descriptor)
