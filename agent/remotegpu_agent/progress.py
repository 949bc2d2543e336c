"""Follows the progress files of running tasks by inotify; the last line, `PERCENT MESSAGE`, is the progress.

The file belongs to the task: it is opened without following links and without blocking, read only if it is a regular
file of the task's user, and only its tail.
"""

from __future__ import annotations

import asyncio
import math
import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
from asyncinotify import Inotify, Mask, Watch

from remotegpu_agent.runspec import PROGRESS_NAME
from remotegpu_agent.supervise import Loops
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.wire import clean_text

log = structlog.get_logger(__name__)

_TAIL_BYTES: Final = 4096
_REPORT_EVERY_S: Final = 1.0

Progress = tuple[float, str]


def parse_progress(tail: bytes) -> Progress | None:
    """The last whole line `PERCENT MESSAGE`; None when there is none. The percentage is cut to 0-100."""
    text, newline, rest = tail.rpartition(b"\n")
    line = clean_text((text if newline else rest).rpartition(b"\n")[2]).strip()
    number, _, message = line.partition(" ")
    try:
        percent = float(number.rstrip("%"))
    except ValueError:
        return None
    if not math.isfinite(percent):
        return None
    return min(max(percent, 0.0), 100.0), message.strip()[: limits.PROGRESS_MESSAGE_MAX_CHARS]


def read_progress(path: Path, owner_uid: int) -> Progress | None:
    """The progress in the file, or None where there is nothing to read: absent, a link, a device, somebody else's."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != owner_uid:
            return None
        return parse_progress(os.pread(fd, _TAIL_BYTES, max(0, info.st_size - _TAIL_BYTES)))
    except OSError:
        return None
    finally:
        os.close(fd)


@dataclass
class _Followed:
    directory: Path
    owner_uid: int
    watch: Watch | None
    last: Progress | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class ProgressWatcher:
    """Calls `report(attempt_id, percent, message)` when a task's progress changed, at most once a second each."""

    def __init__(self, loops: Loops, report: Callable[[AttemptId, float, str], Awaitable[None]]) -> None:
        self._loops = loops
        self._report = report
        self._inotify = Inotify()
        self._followed: dict[AttemptId, _Followed] = {}

    def close(self) -> None:
        """Let go of inotify."""
        self._inotify.close()

    def follow(self, attempt_id: AttemptId, directory: Path, owner_uid: int) -> None:
        """Follow the progress file in the task's directory until `forget`."""
        if attempt_id in self._followed:
            return
        try:
            watch = self._inotify.add_watch(directory, Mask.MODIFY | Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.CREATE)
        except OSError as error:
            log.warning("progress cannot be followed", attempt_id=attempt_id, error=str(error))
            return
        followed = _Followed(directory, owner_uid, watch)
        self._followed[attempt_id] = followed
        followed.changed.set()
        followed.task = self._loops.spawn(f"progress-{attempt_id}", lambda: self._report_changes(attempt_id, followed))

    def forget(self, attempt_id: AttemptId) -> None:
        """Stop following."""
        followed = self._followed.pop(attempt_id, None)
        if followed is None:
            return
        if followed.task is not None:
            followed.task.cancel()
        others = any(other.watch is followed.watch for other in self._followed.values())
        if followed.watch is not None and not others:
            try:
                self._inotify.rm_watch(followed.watch)
            except OSError:
                log.debug("a watch was gone already", attempt_id=attempt_id)

    async def run(self) -> None:
        """Hand events on for ever."""
        async for event in self._inotify:
            if event.name is None or event.name.name != PROGRESS_NAME:
                continue
            for followed in self._followed.values():
                if followed.watch is event.watch:
                    followed.changed.set()

    async def _report_changes(self, attempt_id: AttemptId, followed: _Followed) -> None:
        while True:
            await followed.changed.wait()
            followed.changed.clear()
            progress = read_progress(followed.directory / PROGRESS_NAME, followed.owner_uid)
            if progress is not None and progress != followed.last:
                followed.last = progress
                await self._report(attempt_id, *progress)
                await asyncio.sleep(_REPORT_EVERY_S)
