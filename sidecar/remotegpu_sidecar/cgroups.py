"""A run's control group (cgroup v2; cgroup-v2.rst of the kernel): its two leaves, who is in it, killing, freezing, use.

`task` holds the task, `shim` its shim. Only `task` is killed, frozen or limited: a shim that shared it would die with
the task, and could keep no deadline while it is frozen. Standard library only, since every shim carries it; knows
neither runs nor systemd, and not where groups are made.
"""

from __future__ import annotations

import contextlib
import os

TASK, SHIM = "task", "shim"

_PROCS = "cgroup.procs"
_FILE_MAX_BYTES = 64 * 1024


class TaskGroup:
    """The leaf of a run's group that holds its task, as the shim uses it while the run lasts.

    `events_fd` is for poll(2): POLLPRI when the leaf has become empty or has come to a stop; any look resets it.
    """

    __slots__ = ("events_fd", "path")

    def __init__(self, group: str) -> None:
        self.path = f"{group}/{TASK}"
        self.events_fd = os.open(f"{self.path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)

    def is_populated(self) -> bool:
        """Whether a living process is in it or below; zombies do not count, and a removed group has none."""
        return b"populated 1" in self._events()

    def is_frozen(self) -> bool:
        """Whether everyone in it has come to a stop."""
        return b"frozen 1" in self._events()

    def kill(self) -> bool:
        """SIGKILL everyone in it, frozen and forking ones too."""
        return kill(self.path)

    def freeze(self) -> None:
        """Ask everyone in it to stop; `is_frozen` says when. Raises OSError."""
        write(f"{self.path}/cgroup.freeze", "1")

    def thaw(self) -> None:
        """Let everyone in it go on; signals that came meanwhile arrive. Safe to repeat. Raises OSError."""
        write(f"{self.path}/cgroup.freeze", "0")

    def _events(self) -> bytes:
        try:
            return os.pread(self.events_fd, _FILE_MAX_BYTES, 0)
        except OSError:  # ENODEV: removed
            return b""


def make(group: str, shim_pid: int, controllers: list[str], limits: dict[str, str]) -> None:
    """Make the leaves in a run's group, put the shim into its own, and limit the other one. Raises OSError.

    `limits` are names of files with what is written into them; a file that this kernel does not have is left out. The
    shim goes first: a group that holds processes itself cannot hand controllers on. Safe to repeat.
    """
    for leaf in (SHIM, TASK):
        with contextlib.suppress(FileExistsError):
            os.mkdir(f"{group}/{leaf}")
    write(f"{group}/{SHIM}/{_PROCS}", str(shim_pid))
    if controllers:
        write(f"{group}/cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))
    for name, value in limits.items():
        with contextlib.suppress(FileNotFoundError):
            write(f"{group}/{TASK}/{name}", value)


def join(leaf: str) -> None:
    """Move the calling process into a group, which must not have groups below it. Raises OSError."""
    write(f"{leaf}/{_PROCS}", "0")


def pids(group: str) -> list[int]:
    """Who is in a group or below it; empty if there is no such group. Zombies are not listed."""
    found: list[int] = []
    for path in _tree(group):
        found += [int(pid) for pid in read(f"{path}/{_PROCS}").split()]
    return found


def kill(group: str) -> bool:
    """SIGKILL everyone in a group and below, forking ones too (Linux 5.14). False where that cannot be done."""
    try:
        write(f"{group}/cgroup.kill", "1")
    except OSError:
        return False
    return True


def oom_kills(group: str) -> int:
    """How many processes of the group the kernel has killed for want of memory; 0 without the memory controller."""
    return _number(f"{group}/memory.events", "oom_kill") or 0


def memory_peak_bytes(group: str) -> int | None:
    """The most memory that the group has had at once (Linux 5.19); None without the memory controller."""
    text = read(f"{group}/memory.peak").strip()
    return int(text) if text.isdigit() else None


def cpu_s(group: str) -> float | None:
    """Processor time of all that ever ran in the group; None if there is no such group."""
    usec = _number(f"{group}/cpu.stat", "usage_usec")
    return None if usec is None else usec / 1_000_000


def io_bytes(group: str) -> tuple[int, int] | None:
    """Bytes read from and written to block devices; None without the io controller."""
    if not os.path.exists(f"{group}/io.stat"):
        return None
    done = {"rbytes": 0, "wbytes": 0}
    for word in read(f"{group}/io.stat").split():
        name, _, value = word.partition("=")
        if name in done and value.isdigit():
            done[name] += int(value)
    return done["rbytes"], done["wbytes"]


def remove(group: str) -> bool:
    """Remove a group and all below it, as far as nobody is in there. True if it is gone."""
    for path in reversed(_tree(group)):
        with contextlib.suppress(OSError):  # EBUSY: somebody is in it
            os.rmdir(path)
    return not os.path.exists(group)


def read(path: str) -> str:
    """What a file of the kernel's says; nothing if it is not there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    content = b""
    try:
        while part := os.read(fd, _FILE_MAX_BYTES):
            content += part
    except OSError:  # removed meanwhile
        pass
    finally:
        os.close(fd)
    return content.decode("ascii", "replace")


def write(path: str, text: str) -> None:
    """Write into a file of the kernel's, which takes or refuses it as a whole. Raises OSError with the path."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode("ascii"))
    except OSError as error:
        raise OSError(error.errno, f"{os.strerror(error.errno or 0)}, writing {text!r}", path) from None
    finally:
        os.close(fd)


def _number(path: str, key: str) -> int | None:
    for line in read(path).splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.isdigit():
            return int(value)
    return None


def _tree(group: str) -> list[str]:
    """A group and all below it, parents first. A task may have made some itself."""
    found, waiting = [], [group]
    while waiting:
        path = waiting.pop()
        try:
            names = [entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        found.append(path)
        waiting += [f"{path}/{name}" for name in names]
    return found
