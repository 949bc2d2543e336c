"""Forks one shim per run, from an interpreter so small that a fork is cheap. Knows nothing of runs.

Executed by the agent, or as a service for it, as `python -I -S -X utf8 spawner.py FD`, FD being one end of a SEQPACKET
socket pair. A launch is the message {"dir": RUN_DIRECTORY} with one descriptor, the run's channel, which is handed to
the shim. A launch that fails is answered on that channel with {"error": sentence, "errno": N}; one whose channel did
not arrive, because no descriptor was free, is answered with {"errno": N} on the socket. At its end the agent is gone,
and so is the spawner; the shims stay. Standard library only, single-threaded.
"""

from __future__ import annotations

import array
import contextlib
import errno
import gc
import json
import os
import select
import signal
import socket
import sys

# Isolated, the interpreter does not know this package's folder. At the end, so that it hides nothing of the library's.
sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from remotegpu_sidecar import kernel, shim

sys.path.pop()

COMM = b"remotegpu-spawn"
LAUNCH_MAX_BYTES = 16 * 1024
_FDS_MAX = 8


def main() -> None:
    """Serve launches until the agent is gone."""
    fd = _above_standard_streams(int(sys.argv[1]))
    agent = socket.socket(fileno=fd)
    agent.set_inheritable(False)
    _close_all_but(fd)
    kernel.prctl(kernel.PR_SET_NAME, COMM)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    # The kernel reaps the shims: their ends are on record, and the agent watches them by pidfd.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    shim.rehearse()
    gc.collect()
    gc.freeze()
    gc.disable()
    serve(agent)


def _above_standard_streams(fd: int) -> int:
    """What a service is given as its standard input is not for the shims."""
    if fd > 2:
        return fd
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    moved = os.dup(fd)  # above `null`
    os.dup2(null, fd)
    return moved


def serve(agent: socket.socket) -> None:
    """Fork a shim for each launch message. Whatever a message holds, the next one is served."""
    while True:
        try:
            message, ancillary, flags, _address = agent.recvmsg(
                LAUNCH_MAX_BYTES, socket.CMSG_SPACE(_FDS_MAX * 4), socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            return
        fds = _descriptors(ancillary)
        if not message and not fds and _has_hung_up(agent):
            return
        if flags & socket.MSG_CTRUNC and not fds:
            _complain(agent, errno.EMFILE)
            continue
        try:
            _launch(agent, message, fds)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _answer(fds, error)
        finally:
            for fd in fds:
                os.close(fd)


def _launch(agent: socket.socket, message: bytes, fds: list[int]) -> None:
    directory = json.loads(message)["dir"]
    if not isinstance(directory, str) or not directory.startswith("/"):
        raise ValueError("a launch message names an absolute directory")
    if len(fds) != 1:
        raise ValueError(f"a launch message brings one descriptor, not {len(fds)}")
    if os.fork() == 0:
        try:
            agent.close()
            shim.main(directory, socket.socket(fileno=fds[0]))
        finally:
            os._exit(1)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) // 4 * 4])
    return list(fds)


def _has_hung_up(agent: socket.socket) -> bool:
    """Tell the end of the socket from a message of no bytes."""
    poll = select.poll()
    poll.register(agent, select.POLLIN)
    return any(events & (select.POLLHUP | select.POLLERR) for _fd, events in poll.poll(0))


def _answer(fds: list[int], error: Exception) -> None:
    number = error.errno if isinstance(error, OSError) else None
    answer = json.dumps({"error": f"no shim could be forked: {error}"[:1000], "errno": number}).encode("ascii")
    for fd in fds[:1]:
        with contextlib.suppress(OSError):  # nobody listens
            os.write(fd, answer)


def _complain(agent: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody reads them: the agent has been told often enough
        agent.send(json.dumps({"errno": number}).encode("ascii"), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _close_all_but(kept: int) -> None:
    """Nothing of the agent's reaches a shim, be it opened without close-on-exec."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd != kept:
            with contextlib.suppress(OSError):  # the listing's own descriptor
                os.close(fd)


if __name__ == "__main__":
    main()
