"""File work with the rights of a task's user: what a task may write is read, and written to, with no more than that.

The kernel keeps rights per thread (credentials(7)); the calls here change those of the calling thread only, as file
servers do for their clients. The C library's wrapper of setgroups changes all threads, so that one goes to the kernel
itself. Leaving root's file-system uid takes the capabilities to read and write everybody's files along
(capabilities(7)); coming back to it brings them again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Generator, Sequence
from typing import Final

from remotegpu_schemas.attempt import TaskUser

_SYS_SETGROUPS: Final = {"x86_64": 116, "aarch64": 159}
_UNCHANGED: Final = 0xFFFF_FFFF
"""What no uid and no gid is: the call then only tells the present one (setfsuid(2))."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.setfsuid.argtypes = _libc.setfsgid.argtypes = (ctypes.c_uint32,)


@contextlib.contextmanager
def rights_of(user: TaskUser | None) -> Generator[None]:
    """Do the file work of the block as `user`; None, and an agent that is not root, change nothing.

    The block must not wait: whatever else ran on this thread meanwhile would run with these rights. Raises
    PermissionError, with the rights as before, where they cannot be taken on. If they cannot be given back the process
    ends: nothing may go on with the wrong ones.
    """
    if user is None or os.geteuid() != 0 or user.uid == 0:
        yield
        return
    with contextlib.ExitStack() as back:
        try:
            before_groups = os.getgroups()
            _set_groups([user.gid, *user.groups])
            back.callback(_surely, lambda: _set_groups(before_groups))
            _set(_libc.setfsgid, user.gid)
            back.callback(_surely, lambda: _set(_libc.setfsgid, os.getegid()))
            _set(_libc.setfsuid, user.uid)
            back.callback(_surely, lambda: _set(_libc.setfsuid, os.geteuid()))
        except (OSError, KeyError) as error:
            raise PermissionError(f"the rights of uid {user.uid} cannot be taken on: {error}") from error
        yield


def _surely(give_back: Callable[[], None]) -> None:
    try:
        give_back()
    except BaseException:  # noqa: BLE001 - there is nothing to go on with
        os._exit(70)  # EX_SOFTWARE of sysexits.h


def _set(call: Callable[[int], int], number: int) -> None:
    call(number)
    # It never fails visibly: a second call tells what is so.
    if call(_UNCHANGED) & _UNCHANGED != number:
        raise OSError(1, os.strerror(1))


def _set_groups(groups: Sequence[int]) -> None:
    array = (ctypes.c_uint32 * len(groups))(*groups)
    if _libc.syscall(_SYS_SETGROUPS[platform.machine()], len(groups), array) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
