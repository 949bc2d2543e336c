"""Tells when something in a directory has changed, by inotify(7); one descriptor for the whole agent.

Knows neither tasks nor files: who is told looks for himself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import structlog
from asyncinotify import Inotify, Mask, Watch

log = structlog.get_logger(__name__)

_MASK: Final = Mask.MODIFY | Mask.CREATE | Mask.CLOSE_WRITE | Mask.MOVED_TO | Mask.ONLYDIR | Mask.DONT_FOLLOW
"""A task may put a link in its directory's place; the kernel has one watch for both ends of it, and would end both."""


@dataclass
class _Watched:
    watch: Watch
    listeners: set[asyncio.Event] = field(default_factory=set)


class DirectoryWatcher:
    """Sets events; `run` must be running. A directory has one watch, however many listen."""

    def __init__(self) -> None:
        self._inotify = Inotify()
        self._watched: dict[Path, _Watched] = {}

    def close(self) -> None:
        """Let go of the descriptor. Safe to repeat."""
        self._inotify.close()

    async def run(self) -> None:
        """Hand changes on for ever."""
        async for event in self._inotify:
            # Without a watch the kernel's queue has overflowed: anything may have changed.
            for watched in list(self._watched.values()):
                if event.watch is None or event.watch is watched.watch:
                    for listener in watched.listeners:
                        listener.set()

    @contextlib.contextmanager
    def listen(self, directory: Path, changed: asyncio.Event) -> Generator[bool]:
        """Set `changed` whenever a file in the directory is made or written to, while the block lasts.

        Gives False where the directory cannot be watched (it is not there or a link, or the host is out of watches):
        then nobody tells, and the caller has to look from time to time.
        """
        try:
            watched = self._watched.get(directory) or _Watched(self._inotify.add_watch(directory, _MASK))
        except OSError as error:
            log.warning("a directory cannot be watched", directory=str(directory), error=str(error))
            yield False
            return
        self._watched[directory] = watched
        watched.listeners.add(changed)
        try:
            yield True
        finally:
            watched.listeners.discard(changed)
            if not watched.listeners and self._watched.get(directory) is watched:
                del self._watched[directory]
                with contextlib.suppress(OSError, ValueError):  # the directory, or the descriptor, is gone
                    self._inotify.rm_watch(watched.watch)
