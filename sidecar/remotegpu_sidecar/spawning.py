"""The agent's end of a spawner: its process, whoever started it, and the socket over which launches go to it.

Knows nothing of runs. What it sends is `spawner.py`'s business, what comes back arrives on each run's own channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from typing import Final

from remotegpu_schemas.errors import Retryable
from remotegpu_sidecar import spawner

STOP_TIMEOUT_S: Final = 5.0


class LaunchError(Retryable):
    """Not even the shim could be made, or it was refused its place; nothing of the task has run. `errno` if known."""

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


class Spawner:
    """A spawner's process and the socket to it. `reap` is called once it has ended, and does not wait."""

    def __init__(self, channel: socket.socket, pid: int, reap: Callable[[], object] = lambda: None) -> None:
        channel.setblocking(False)
        self.pid = pid
        self._socket = channel
        self._reap = reap
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._pidfd = os.pidfd_open(pid)
        self._loop.add_reader(self._pidfd, self._on_end)
        self._sending = asyncio.Lock()

    @property
    def has_ended(self) -> bool:
        """Whether it is known to be gone."""
        return self._ended.is_set()

    async def send(self, message: bytes, fd: int) -> None:
        """Hand over a launch. Raises ConnectionError when the spawner is gone."""
        async with self._sending:
            while True:
                try:
                    socket.send_fds(self._socket, [message], [fd])
                    return
                except BlockingIOError:
                    await self._until_writable()

    def complaint(self) -> int | None:
        """The errno for which a launch could not even be answered; None if there was none lately."""
        number = None
        with contextlib.suppress(OSError, ValueError):  # nothing there, or gone
            while message := self._socket.recv(spawner.LAUNCH_MAX_BYTES):
                number = int(json.loads(message)["errno"])
        return number

    async def stop(self, *, is_stuck: bool = False) -> None:
        """Let it go by itself, or kill it when it is stuck or slow. Safe to repeat."""
        self._socket.close()
        if is_stuck:
            self._kill()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._ended.wait()
        except TimeoutError:
            self._kill()
            await self._ended.wait()

    def _kill(self) -> None:
        if not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def _until_writable(self) -> None:
        writable = asyncio.Event()
        self._loop.add_writer(self._socket, writable.set)
        try:
            await writable.wait()
        finally:
            self._loop.remove_writer(self._socket)

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._reap()
        self._ended.set()


def command(python: str, fd: int) -> list[str]:
    """The spawner's arguments; `fd` is its number of its end of the socket."""
    return [python, "-I", "-S", "-X", "utf8", spawner.__file__, str(fd)]


def environment() -> dict[str, str]:
    """All that the spawner gets of the agent's environment: what the interpreter may need to start."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def start_child(python: str) -> Spawner:
    """A spawner as a child of the agent. Raises LaunchError, OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.closing(theirs):
        try:
            process = subprocess.Popen(
                command(python, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd="/",
                env=environment(),
            )
        except OSError as error:
            ours.close()
            raise LaunchError(f"the spawner cannot be started: {error}", error.errno) from error
    return Spawner(ours, process.pid, process.wait)
