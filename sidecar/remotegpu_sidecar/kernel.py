"""The system calls that Python 3.11 has no function for, through ctypes. Standard library only; no decisions.

Numbers are those of the kernel's headers and the same on x86-64 and arm64.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
CLOCK_BOOTTIME = 7
TFD_TIMER_ABSTIME = 1
FALLOC_FL_KEEP_SIZE = 1
SYS_CLOSE_RANGE = 436

_NS_PER_S = 1_000_000_000
_FD_MAX = 0x7FFF_FFFF
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_TimerSpec = ctypes.c_long * 4


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def prctl(option: int, value: int | bytes) -> None:
    """Set a property of this process, one argument (prctl(2)). Raises OSError."""
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    none = ctypes.c_ulong(0)
    _checked(_libc.prctl(option, argument, none, none, none))


def timerfd() -> int:
    """A timer on CLOCK_BOOTTIME, unarmed, non-blocking, close-on-exec (timerfd_create(2)). Raises OSError."""
    return _checked(_libc.timerfd_create(CLOCK_BOOTTIME, os.O_CLOEXEC | os.O_NONBLOCK))


def arm_timer(fd: int, boottime_ns: int | None) -> None:
    """Let the timer strike once at that time, at once if it is over; None disarms it. Raises OSError."""
    seconds, ns = (0, 0) if boottime_ns is None else divmod(max(boottime_ns, 1), _NS_PER_S)
    _checked(_libc.timerfd_settime(fd, TFD_TIMER_ABSTIME, _TimerSpec(0, 0, seconds, ns), None))


def reserve(fd: int, length: int) -> bool:
    """Reserve disk blocks for `length` more bytes at the end of a file, whose size stays (fallocate(2)).

    False where the file system cannot do that; raises OSError when the disk is full.
    """
    try:
        _checked(_libc.fallocate(fd, FALLOC_FL_KEEP_SIZE, os.fstat(fd).st_size, length))
    except OSError as error:
        if error.errno in {28, 122}:  # ENOSPC, EDQUOT
            raise
        return False
    return True


def close_from(first: int) -> None:
    """Close every descriptor from `first` on (close_range(2), Linux 5.9; else one by one)."""
    if _libc.syscall(SYS_CLOSE_RANGE, first, _FD_MAX, 0) == 0:
        return
    for name in os.listdir("/proc/self/fd"):
        if int(name) >= first:
            with contextlib.suppress(OSError):  # the listing's own descriptor
                os.close(int(name))
