"""Who a process is: boot id, pid and start time, so that a pid that was given out again is never taken for it.

Who cannot look because descriptors or memory have run out must not believe that nobody is there: OSError (SCARCE).

Standard library only, and light: the spawner and every shim carry it.
"""

from __future__ import annotations

import errno
import os
import signal
import time

TYPE_CHECKING = False  # `typing` would cost every shim its memory
if TYPE_CHECKING:
    from typing import Protocol

    class ProcessId(Protocol):
        """What tells one process from every other: `Identity`, or the schema's ProcessIdentity."""

        @property
        def boot_id(self) -> str: ...
        @property
        def pid(self) -> int: ...
        @property
        def start_ticks(self) -> int: ...


SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class Identity:
    """A process, told apart from every other that ever had its number; `start_ticks` is field 22 of its stat."""

    __slots__ = ("boot_id", "pid", "start_ticks")

    def __init__(self, boot_id: str, pid: int, start_ticks: int) -> None:
        self.boot_id = boot_id
        self.pid = pid
        self.start_ticks = start_ticks

    def as_json(self) -> dict[str, object]:
        """As it stands in a record."""
        return {"boot_id": self.boot_id, "pid": self.pid, "start_ticks": self.start_ticks}


class Stat:
    """The fields of /proc/PID/stat (proc(5)) that the sidecar uses."""

    __slots__ = ("pid", "ppid", "session", "start_ticks", "state", "threads")

    def __init__(self, pid: int, text: bytes) -> None:
        # The command's name stands in brackets and may hold anything, brackets too.
        fields = text[text.rindex(b")") + 2 :].split()
        self.pid = pid
        self.state = fields[0].decode("ascii")
        self.ppid = int(fields[1])
        self.session = int(fields[3])
        self.threads = int(fields[17])
        self.start_ticks = int(fields[19])

    @property
    def is_dead(self) -> bool:
        """A zombie has ended, though nobody has reaped it; one whose other threads go on has not."""
        return self.state in "ZXx" and self.threads <= 1


def boot_id() -> str:
    """This boot's id (random(4))."""
    fd = os.open("/proc/sys/kernel/random/boot_id", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 64).decode("ascii").strip()
    finally:
        os.close(fd)


def boottime_ns() -> int:
    """Nanoseconds since boot, suspend included (CLOCK_BOOTTIME)."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def stat_of(pid: int) -> Stat | None:
    """What /proc says about a process, a zombie too; None if there is none. Raises OSError where that stays open."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in SCARCE:
            raise
        return None
    try:
        return Stat(pid, os.read(fd, 4096))
    except (ProcessLookupError, ValueError, IndexError):  # it ended meanwhile
        return None
    finally:
        os.close(fd)


def identify(pid: int, boot: str | None = None) -> Identity:
    """The identity of a process that is there, a zombie too. Raises ProcessLookupError."""
    stat = stat_of(pid)
    if stat is None:
        raise ProcessLookupError(f"there is no process {pid}")
    return Identity(boot or boot_id(), pid, stat.start_ticks)


def is_alive(identity: ProcessId) -> bool:
    """Whether exactly this process runs. A zombie is dead, and so is every process of another boot.

    Raises OSError when that cannot be found out: who is not proven dead must not be taken for it.
    """
    if identity.boot_id != boot_id():
        return False
    stat = stat_of(identity.pid)
    return stat is not None and stat.start_ticks == identity.start_ticks and not stat.is_dead


def has_started_at(pid: int, start_ticks: int) -> bool:
    """Whether a process with this pid and this start time runs now, in this boot."""
    stat = stat_of(pid)
    return stat is not None and stat.start_ticks == start_ticks and not stat.is_dead


def open_pidfd(identity: ProcessId) -> int:
    """A descriptor for exactly this process; readable once it has ended. Raises ProcessLookupError, OSError.

    The identity is checked after opening, when the descriptor can no longer come to mean another process.
    """
    fd = os.pidfd_open(identity.pid)
    if is_alive(identity):
        return fd
    os.close(fd)
    raise ProcessLookupError(f"process {identity.pid} has ended; its number may be another's now")


def hears(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, or blocks it to wait for it (SigCgt, SigBlk: proc(5))."""
    try:
        fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        status = os.read(fd, 8192)
    except OSError:  # it has ended
        return False
    finally:
        os.close(fd)
    masks = (line[7:] for line in status.split(b"\n") if line.startswith((b"SigCgt:", b"SigBlk:")))
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def send_signal(pid: int, start_ticks: int, number: int) -> bool:
    """Signal exactly the process of this boot that has this start time; False if it has ended. Raises OSError."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if not has_started_at(pid, start_ticks):
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True
