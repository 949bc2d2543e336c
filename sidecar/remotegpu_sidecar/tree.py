"""A process's descendants, from /proc. Standard library only; signals nobody.

Raises OSError where descriptors or memory have run out: an empty list is a statement.

Under a subreaper this is the whole tree: an orphan becomes the subreaper's child. A listing may miss one that is born
or handed over meanwhile, so whoever must be sure lists again until nothing is left.
"""

from __future__ import annotations

import os

from remotegpu_sidecar.identity import SCARCE, Stat, boottime_ns, stat_of

_CLIMBS = 2
# The kernel may be built without it (CONFIG_PROC_CHILDREN); every distribution's has it.
_HAS_CHILDREN_FILES = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def children(pid: int) -> list[int]:
    """The pids of a process's children, zombies too; empty if there is no such process."""
    if not _HAS_CHILDREN_FILES:
        return [stat.pid for stat in all_processes() if stat.ppid == pid]
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError as error:
        if error.errno in SCARCE:
            raise
        return []
    return [child for thread in threads for child in _children_of_thread(pid, thread)]


def own_children() -> list[int]:
    """The children of this process, which has one thread: as `children`, in fewer calls."""
    pid = os.getpid()
    return _children_of_thread(pid, pid) if _HAS_CHILDREN_FILES else children(pid)


def _children_of_thread(pid: int, thread: int | str) -> list[int]:
    try:
        fd = os.open(f"/proc/{pid}/task/{thread}/children", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in SCARCE:
            raise
        return []  # it has ended
    try:
        content = part = os.read(fd, 4096)
        while part:
            part = os.read(fd, 65536)
            content += part
    except OSError:
        return []
    finally:
        os.close(fd)
    return [int(child) for child in content.split()]


def descendants(root_pid: int, within_ms: int | None = None) -> list[Stat]:
    """The living descendants of a living process, parents first; those found `within_ms`: a family may grow for ever.

    One counts only while its parent is proven to be the process that was listed: a pid that was given to a stranger
    meanwhile has another parent. `root_pid` must not be reaped by others meanwhile.
    """
    found: list[Stat] = []
    waiting: list[tuple[int, int | None]] = [(root_pid, None)]
    seen = {root_pid}
    give_up_ns = None if within_ms is None else boottime_ns() + within_ms * 1_000_000
    while waiting and (give_up_ns is None or boottime_ns() < give_up_ns):
        parent, parent_ticks = waiting.pop()
        stats = [stat for stat in map(stat_of, children(parent)) if stat is not None and stat.ppid == parent]
        if parent_ticks is not None:
            now = stat_of(parent)
            if now is None or now.start_ticks != parent_ticks:
                continue
        for stat in stats:
            if stat.pid not in seen:
                seen.add(stat.pid)
                waiting.append((stat.pid, stat.start_ticks))
                if not stat.is_dead:
                    found.append(stat)
    return found


def is_descendant(pid: int, root_pid: int) -> bool:
    """Whether a process is below another one, at any depth; a process is not below itself."""
    # One that is between them may end during the climb; its children have moved up by the next one.
    return any(_climb(pid, root_pid) for _ in range(_CLIMBS))


def _climb(pid: int, root_pid: int) -> bool:
    seen: set[int] = set()
    while pid > 1 and pid not in seen:
        seen.add(pid)
        stat = stat_of(pid)
        if stat is None:
            return False
        if stat.ppid == root_pid:
            return True
        pid = stat.ppid
    return False


def all_processes() -> list[Stat]:
    """Every process of the system, zombies too."""
    stats = (stat_of(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [stat for stat in stats if stat is not None]
