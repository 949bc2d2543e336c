"""What a host must have before it takes on more: disk, inodes, memory. Pure: readings come in, blocks go out.

A block says why no task is claimed or started; it is shown in claims, heartbeats, `status` and metrics.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from remotegpu_schemas.limits import MIB


class BlockKind(enum.StrEnum):
    """What stands in the way, for machines; a label of bounded size in metrics."""

    DRAINING = "draining"
    UNREGISTERED = "unregistered"
    OUTBOX_FULL = "outbox_full"
    BREAKER_OPEN = "breaker_open"
    DISK_READ_ONLY = "disk_read_only"
    DISK_FULL = "disk_full"
    INODES_USED_UP = "inodes_used_up"
    MEMORY_SHORT = "memory_short"


@dataclass(frozen=True)
class Block:
    """A reason not to take on more; `reason` is a sentence for people."""

    kind: BlockKind
    reason: str


@dataclass(frozen=True)
class Readings:
    """What is free: bytes on the state directory's file system and of memory, and inodes where it counts them."""

    disk_free_bytes: int
    inodes_free: int | None
    memory_available_bytes: int
    is_read_only: bool = False
    """Nothing can be written to the state directory's file system, whatever is free."""


@dataclass(frozen=True)
class Floors:
    """Below these nothing is taken on; 0 switches one off."""

    disk_bytes: int
    inodes: int
    memory_bytes: int


STORAGE_KINDS: Final = frozenset({BlockKind.DISK_READ_ONLY, BlockKind.DISK_FULL, BlockKind.INODES_USED_UP})
"""With these not even a waiting task can be kept."""

_RELEASE_FACTOR: Final = 1.1
"""What was short must be back by so much more: a host at the edge does not flap."""


def host_blocks(readings: Readings, floors: Floors, held: Collection[BlockKind] = ()) -> tuple[Block, ...]:
    """What is short; `held` are the kinds that were short when it was last looked at."""

    def is_short(kind: BlockKind, free: float, floor: int) -> bool:
        return floor > 0 and free < floor * (_RELEASE_FACTOR if kind in held else 1.0)

    found = []
    if readings.is_read_only:
        sentence = "the state directory's file system is read-only: look for its errors in the kernel's log, remount it"
        found.append(Block(BlockKind.DISK_READ_ONLY, sentence))
    if is_short(BlockKind.DISK_FULL, readings.disk_free_bytes, floors.disk_bytes):
        free, floor = readings.disk_free_bytes // MIB, floors.disk_bytes // MIB
        sentence = f"{free} MiB of the state directory's disk are free, {floor} are needed (admission.disk_free_gb)"
        found.append(Block(BlockKind.DISK_FULL, sentence))
    if readings.inodes_free is not None and is_short(BlockKind.INODES_USED_UP, readings.inodes_free, floors.inodes):
        sentence = (
            f"{readings.inodes_free} inodes of the state directory's disk are free, {floors.inodes} are needed "
            "(admission.inodes_free)"
        )
        found.append(Block(BlockKind.INODES_USED_UP, sentence))
    if is_short(BlockKind.MEMORY_SHORT, readings.memory_available_bytes, floors.memory_bytes):
        free, floor = readings.memory_available_bytes // MIB, floors.memory_bytes // MIB
        sentence = f"{free} MiB of memory are available on this host, {floor} are needed (admission.memory_free_gb)"
        found.append(Block(BlockKind.MEMORY_SHORT, sentence))
    return tuple(found)
