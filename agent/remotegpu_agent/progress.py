"""Follows the progress files of running tasks; the last line, `PERCENT MESSAGE`, is the progress.

The file belongs to the task: it is opened with the rights of the task's user, without following links and without
blocking, read only if it is a regular file of that user, and only its tail.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeAlias

import structlog

from remotegpu_agent.directory_watch import DirectoryWatcher
from remotegpu_agent.supervise import Loops
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId, TaskUser
from remotegpu_schemas.errors import Retryable
from remotegpu_schemas.wire import clean_text
from remotegpu_sidecar.privileges import rights_of

log = structlog.get_logger(__name__)

_REPORT_EVERY_S: Final = 1.0
_UNWATCHED_LOOK_S: Final = 5.0
_WATCHED_LOOK_S: Final = 60.0
"""The task may put another directory in the watched one's place, or write in ways that nobody is told of (mmap)."""

Progress: TypeAlias = tuple[float, str]


def parse_progress(tail: bytes) -> Progress | None:
    """The last whole line `PERCENT MESSAGE`; None when there is none. The percentage is cut to 0-100."""
    whole, newline, _unfinished = tail.rpartition(b"\n")
    line = clean_text((whole if newline else tail).rpartition(b"\n")[2]).strip()
    number, _, message = line.partition(" ")
    try:
        percent = float(number.rstrip("%"))
    except ValueError:
        return None
    if not math.isfinite(percent):
        return None
    return min(max(percent, 0.0), 100.0), message.strip()[: limits.PROGRESS_MESSAGE_MAX_CHARS]


def read_progress(path: Path, user: TaskUser | None) -> Progress | None:
    """The progress in the file, or None where there is nothing to read: absent, a link, a device, somebody else's.

    `user` is the task's, None the agent's own.
    The last directory and the file are the task's: neither is followed if it is a link, into a file system that never
    answers, say.
    """
    owner_uid = os.geteuid() if user is None else user.uid
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(rights_of(user))
            folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, folder)
            fd = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            stack.callback(os.close, fd)
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_uid != owner_uid:
                return None
            bound = limits.PROGRESS_TAIL_MAX_BYTES
            return parse_progress(os.pread(fd, bound, max(0, info.st_size - bound)))
        except OSError:
            return None


class ProgressFollower:
    """Calls `report(attempt_id, percent, message)` when a task's progress changed, at most once a second each."""

    def __init__(
        self, loops: Loops, watcher: DirectoryWatcher, report: Callable[[AttemptId, float, str], Awaitable[None]]
    ) -> None:
        self._loops = loops
        self._watcher = watcher
        self._report = report
        self._followed: dict[AttemptId, asyncio.Task[None]] = {}

    def follow(self, attempt_id: AttemptId, path: Path, user: TaskUser | None) -> None:
        """Follow the progress file of a run until `forget`."""
        if attempt_id not in self._followed:
            self._followed[attempt_id] = self._loops.spawn(
                f"progress-{attempt_id}", lambda: self._report_changes(attempt_id, path, user)
            )

    def forget(self, attempt_id: AttemptId) -> None:
        """Stop following. Safe to repeat."""
        task = self._followed.pop(attempt_id, None)
        if task is not None:
            task.cancel()

    async def _report_changes(self, attempt_id: AttemptId, path: Path, user: TaskUser | None) -> None:
        # Most tasks are shorter; their last word is read when they end.
        await asyncio.sleep(_REPORT_EVERY_S)
        changed = asyncio.Event()
        last: Progress | None = None
        with contextlib.ExitStack() as stack:
            with rights_of(user):
                is_told = stack.enter_context(self._watcher.listen(path.parent, changed))
            while True:
                progress = read_progress(path, user)
                if progress is not None and progress != last:
                    try:
                        await self._report(attempt_id, *progress)
                        last = progress
                    except Retryable as error:
                        log.warning("progress cannot be stored yet", attempt_id=attempt_id, error=str(error))
                    await asyncio.sleep(_REPORT_EVERY_S)
                else:
                    await _until(changed, _WATCHED_LOOK_S if is_told else _UNWATCHED_LOOK_S)
                changed.clear()


async def _until(changed: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await changed.wait()
    except TimeoutError:
        return
