"""Looks at what the host has left (disk, inodes, memory) and says what keeps it from taking on more.

Looks once before it is asked for the first time and then every few seconds, on a thread: a file system may hang. What
is too little is decided in `remotegpu_queue.admission`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import psutil
import structlog

from remotegpu_queue.admission import Block, Floors, Readings, host_blocks

log = structlog.get_logger(__name__)

LOOK_EVERY_S: Final = 5.0


def read_host(state_dir: Path) -> Readings:
    """What is free now. Raises OSError."""
    disk = os.statvfs(state_dir)
    return Readings(
        disk_free_bytes=disk.f_bavail * disk.f_frsize,
        inodes_free=disk.f_favail if disk.f_files else None,  # btrfs and others count none
        memory_available_bytes=int(psutil.virtual_memory().available),
        is_read_only=bool(disk.f_flag & os.ST_RDONLY),  # after an error of the disk the kernel remounts it so
    )


class HostWatch:
    """`blocks` is what stands in the way now; `on_changed` is called when that is something else than before."""

    def __init__(
        self,
        floors: Floors,
        read: Callable[[], Readings],
        *,
        on_changed: Callable[[], None],
        every_s: float = LOOK_EVERY_S,
    ) -> None:
        self._floors = floors
        self._read = read
        self._on_changed = on_changed
        self._every_s = every_s
        self.readings: Readings | None = None
        self.blocks: tuple[Block, ...] = ()

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await self.look()
            await asyncio.sleep(self._every_s)

    async def look(self) -> None:
        """Look now. What cannot be read blocks nothing: whoever writes there says so."""
        try:
            self.readings = await asyncio.to_thread(self._read)
        except OSError as error:
            log.warning("what this host has left cannot be read", error=str(error))
            return
        before, held = self.blocks, {block.kind for block in self.blocks}
        self.blocks = host_blocks(self.readings, self._floors, held)
        kinds = {block.kind for block in self.blocks}
        if kinds != held:
            for block in self.blocks:
                if block.kind not in held:
                    log.error("this host takes on no more tasks", reason=block.reason)
            for block in before:
                if block.kind not in kinds:
                    log.info("this host has room again", was=block.reason)
            self._on_changed()
