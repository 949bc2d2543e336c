"""What a host must have before it takes on more."""

from __future__ import annotations

import pytest

from remotegpu_queue.admission import STORAGE_KINDS, BlockKind, Floors, Readings, host_blocks
from remotegpu_schemas.limits import GIB

FLOORS = Floors(disk_bytes=GIB, inodes=10_000, memory_bytes=GIB // 4)
ENOUGH = Readings(disk_free_bytes=2 * GIB, inodes_free=20_000, memory_available_bytes=GIB)


def kinds(readings: Readings, floors: Floors = FLOORS, held: set[BlockKind] | None = None) -> set[BlockKind]:
    """What is short."""
    return {block.kind for block in host_blocks(readings, floors, held or set())}


def test_a_host_with_enough_of_everything_is_not_blocked() -> None:
    """Nothing is short, nor where a file system counts no inodes."""
    assert kinds(ENOUGH) == set()
    assert kinds(Readings(GIB, None, GIB)) == set()


@pytest.mark.parametrize(
    ("readings", "kind", "sentence"),
    [
        (Readings(3 << 20, 20_000, GIB), BlockKind.DISK_FULL, "3 MiB of the state directory's disk are free, 1024 are"),
        (Readings(2 * GIB, 17, GIB), BlockKind.INODES_USED_UP, "17 inodes of the state directory's disk are free"),
        (Readings(2 * GIB, None, 5 << 20), BlockKind.MEMORY_SHORT, "5 MiB of memory are available on this host, 256"),
    ],
)
def test_each_want_is_told_with_figure_floor_and_key(readings: Readings, kind: BlockKind, sentence: str) -> None:
    """Whoever reads it knows how much is there, how much is needed, and which setting says so."""
    [block] = host_blocks(readings, FLOORS)
    assert block.kind is kind
    assert block.reason.startswith(sentence)
    assert "(admission." in block.reason


def test_a_floor_of_nothing_is_switched_off() -> None:
    """0 asks for nothing, even of a full disk."""
    assert kinds(Readings(0, 0, 0), Floors(0, 0, 0)) == set()


def test_f25_a_disk_that_is_read_only_blocks_whatever_is_free() -> None:
    """F25: no setting switches that off: not even a waiting task could be kept."""
    [block] = host_blocks(Readings(2 * GIB, 20_000, GIB, is_read_only=True), Floors(0, 0, 0))
    assert block.kind is BlockKind.DISK_READ_ONLY
    assert block.kind in STORAGE_KINDS
    assert "is read-only" in block.reason


def test_a_host_at_the_edge_does_not_flap() -> None:
    """What was short is enough only a tenth above the floor."""
    edge = Readings(GIB + GIB // 20, 20_000, GIB)
    assert kinds(edge) == set()
    assert kinds(edge, held={BlockKind.DISK_FULL}) == {BlockKind.DISK_FULL}
    assert kinds(edge, held={BlockKind.MEMORY_SHORT}) == set()
    assert kinds(ENOUGH, held={BlockKind.DISK_FULL}) == set()
