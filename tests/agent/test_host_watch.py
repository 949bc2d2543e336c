"""What the host has left, as it is looked at."""

from __future__ import annotations

from pathlib import Path

from remotegpu_agent.host_watch import HostWatch, read_host
from remotegpu_queue.admission import BlockKind, Floors, Readings
from remotegpu_schemas.limits import GIB

FLOORS = Floors(GIB, 1000, GIB)
ENOUGH = Readings(2 * GIB, 2000, 2 * GIB)


class Scripted:
    """A host that says what it is told to, and who listens to its watch."""

    def __init__(self) -> None:
        self.says: Readings | OSError = ENOUGH
        self.changes = 0

    def read(self) -> Readings:
        """As it says."""
        if isinstance(self.says, OSError):
            raise self.says
        return self.says

    def on_changed(self) -> None:
        """One more."""
        self.changes += 1


async def test_whoever_waits_is_told_when_it_begins_and_when_it_ends() -> None:
    """Once each; further looks at the same want say nothing, whatever the figure."""
    host = Scripted()
    watch = HostWatch(FLOORS, host.read, on_changed=host.on_changed)
    seen = []
    for free in (2 * GIB, GIB // 2, GIB // 4, 2 * GIB, 2 * GIB):
        host.says = Readings(free, 2000, 2 * GIB)
        await watch.look()
        seen.append(([block.kind for block in watch.blocks], host.changes))
    short = [BlockKind.DISK_FULL]
    assert seen == [([], 0), (short, 1), (short, 1), ([], 2), ([], 2)]


async def test_what_cannot_be_read_changes_nothing() -> None:
    """A file system that fails for a moment neither blocks nor lets go."""
    host = Scripted()
    watch = HostWatch(FLOORS, host.read, on_changed=host.on_changed)
    host.says = Readings(0, 2000, 2 * GIB)
    await watch.look()
    host.says = OSError(5, "Input/output error")
    await watch.look()
    assert [block.kind for block in watch.blocks] == [BlockKind.DISK_FULL]


def test_this_host_has_something_left(tmp_path: Path) -> None:
    """Real figures."""
    found = read_host(tmp_path)
    assert found.disk_free_bytes > 0
    assert found.memory_available_bytes > 0
