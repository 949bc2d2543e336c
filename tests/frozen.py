"""A process that stands still whatever it is sent, as if the kernel had forgotten it: held by ptrace(2)."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Generator
from typing import Final

_SEIZE: Final = 0x4206
_INTERRUPT: Final = 0x4207
_DETACH: Final = 17
_WALL: Final = 0x4000_0000
"""Numbers of linux/ptrace.h and linux/wait.h."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
_libc.ptrace.restype = ctypes.c_long


@contextlib.contextmanager
def frozen(pid: int) -> Generator[None]:
    """Hold a process while the block lasts. Unlike after SIGSTOP, no SIGCONT wakes it; what is sent to it waits.

    Whoever waits for another of this process's children meanwhile must not wait for any. Raises OSError.
    """
    _ptrace(_SEIZE, pid)
    try:
        _ptrace(_INTERRUPT, pid)
        os.waitpid(pid, _WALL)
        yield
    finally:
        _ptrace(_DETACH, pid)


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")
