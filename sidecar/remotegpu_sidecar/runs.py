"""A run as the agent holds it: waits for its end, stops it, moves its deadline.

The shim does the rest, with the agent or without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import math
import os
import signal
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from remotegpu_schemas.attempt import ProcessIdentity, RunEnded, RunRecord, RunSpec, RunStarted
from remotegpu_sidecar import identity, record, remains, shim, tree

_DEADLINE_BYTES = 8
_UNREADABLE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES})
"""Somebody has removed, replaced or closed the record or its directory: waiting does not bring it back."""
_LOOK_AGAIN_S: Final = 0.25
_READ_AGAIN_S: Final = 1.0


def read_deadline(directory: Path) -> int | None:
    """The deadline on CLOCK_BOOTTIME in ns that the shim of this run keeps; None without a lease."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(directory / shim.DEADLINE_FILE, flags)
    except FileNotFoundError:
        return None
    try:
        content = os.read(fd, _DEADLINE_BYTES + 1)
    finally:
        os.close(fd)
    return int.from_bytes(content, "little", signed=True) if len(content) == _DEADLINE_BYTES else None


def write_deadline(directory: Path, deadline_boottime_ns: int) -> None:
    """Set the deadline, in one write over the old one: a reader sees either. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(directory / shim.DEADLINE_FILE, flags, 0o600)
    try:
        os.pwrite(fd, deadline_boottime_ns.to_bytes(_DEADLINE_BYTES, "little", signed=True), 0)
    finally:
        os.close(fd)


class Run:
    """A run whose shim lived when this was made; made by `Launcher`, closed by whoever got it.

    `started` is None until `wait_started` has returned it. A launched run brings the `channel` that its shim tells on.
    """

    def __init__(
        self,
        directory: Path,
        spec: RunSpec,
        started: RunStarted | None,
        shim_identity: ProcessIdentity,
        pidfd: int,
        *,
        deadline_boottime_ns: int | None,
        channel: socket.socket | None = None,
    ) -> None:
        self.directory = directory
        self.spec = spec
        self.started = started
        self.shim = shim_identity
        self.cgroup: str | None = None
        """The control group that the run was given: what is in there goes with it, whatever becomes of the record."""
        self._pidfd = pidfd
        self._deadline_ns = deadline_boottime_ns
        self._channel = channel
        self._record: RunRecord | None = None
        self._has_ended = asyncio.Event()
        self._concluding = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._on_end)

    @property
    def deadline_boottime_ns(self) -> int | None:
        """The deadline as this agent last read or set it; None without a lease."""
        return self._deadline_ns

    async def wait_started(self) -> RunStarted | None:
        """Wait until the task executes; None if it never does: `wait` says why. One caller at a time.

        That may take as long as the file system of its program or its directory takes.
        """
        while self.started is None and not self._has_ended.is_set():
            if self._channel is not None:
                channel, self._channel = self._channel, None
                with contextlib.closing(channel):
                    self.started = _started_in(await self._until_end(_message(channel)))
            else:
                # Of a run that was taken over nobody tells: its record does.
                self.started = self._started_on_record()
                if self.started is None:
                    await self._until_end(asyncio.sleep(_LOOK_AGAIN_S, b""))
        return self.started

    async def _until_end(self, work: Coroutine[None, None, bytes]) -> bytes:
        """What the work gives; nothing if the run ends first."""
        working = asyncio.ensure_future(work)
        ending = asyncio.ensure_future(self._has_ended.wait())
        try:
            await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else b""
        finally:
            working.cancel()
            ending.cancel()
            await asyncio.gather(working, ending, return_exceptions=True)

    def _started_on_record(self) -> RunStarted | None:
        try:
            lines, _complaints = record.read(self.directory / record.FILE_NAME)
            return RunStarted.model_validate(lines["started"]) if "started" in lines else None
        except (OSError, ValidationError):
            return None

    async def wait(self) -> RunRecord:
        """Wait until the run is over and return its record. No `ended`: the shim was lost, and its tree is gone by now.

        Any number of callers may wait, and again. Raises RuntimeError if the run is closed meanwhile.
        """
        await self._has_ended.wait()
        async with self._concluding:
            if self._record is None:
                if self._pidfd < 0:
                    raise RuntimeError(f"run {self.directory.name} was closed while it was waited for")
                self._record = await self._conclude()
        return self._record

    def extend(self, deadline_boottime_ns: int) -> None:
        """Move the lease's deadline, later or earlier. A stop that it has caused already goes on. Raises OSError.

        Does nothing once the run has ended.
        """
        if self._has_ended.is_set():
            return
        write_deadline(self.directory, deadline_boottime_ns)
        before_ns, self._deadline_ns = self._deadline_ns, deadline_boottime_ns
        # When its timer strikes the shim looks whether the deadline has moved on; only an earlier one must be told.
        if before_ns is None or deadline_boottime_ns < before_ns:
            self._signal(shim.REREAD_SIGNAL)

    def stop(self) -> None:
        """Ask for an end: stop signal, grace period, SIGKILL, for the whole tree. Safe to repeat, and after the end."""
        self._signal(shim.STOP_SIGNAL)

    def kill(self) -> None:
        """Kill the whole tree now. Safe to repeat, and after the end."""
        self._signal(shim.KILL_SIGNAL)

    @property
    def is_to_be_suspended(self) -> bool:
        """Whether the tree is to stand still; it does a moment after this was asked for."""
        return (self.directory / shim.SUSPEND_FILE).exists()

    def suspend(self) -> None:
        """Let the whole tree stand still, and the timeout's clock with it. Safe to repeat. Raises OSError.

        Holds over restarts of the agent. An end is not held up: a run that is being stopped goes on ending.
        """
        (self.directory / shim.SUSPEND_FILE).touch(mode=0o600)
        self._signal(shim.REREAD_SIGNAL)

    def resume(self) -> None:
        """Let a suspended tree go on. Safe to repeat, and for one that is not suspended. Raises OSError."""
        (self.directory / shim.SUSPEND_FILE).unlink(missing_ok=True)
        self._signal(shim.REREAD_SIGNAL)

    def contains(self, pid: int) -> bool:
        """Whether a process is a living member of the task's tree; the shim itself is not."""
        return identity.is_alive(self.shim) and tree.is_descendant(pid, self.shim.pid)

    def close(self) -> None:
        """Let go of the run, which goes on. Safe to repeat."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
            self._has_ended.set()
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _on_end(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._has_ended.set()

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)
                # One that somebody has stopped (a task of the agent's own user, say) obeys only when it is woken.
                signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    async def _conclude(self) -> RunRecord:
        lines, ended = await self._lines(), None
        cgroup = record.cgroup_of(lines) or self.cgroup
        try:
            if "started" in lines:
                self.started = RunStarted.model_validate(lines["started"])
            if "ended" in lines:
                ended = RunEnded.model_validate(lines["ended"])
        except ValidationError:  # damaged under us: what counts is that nothing is left
            pass
        key = (self.spec.attempt_id, self.spec.run_no)
        groups: dict[remains.RunKey, str] = {key: cgroup} if cgroup is not None else {}
        if ended is None:
            main = self.started.process if self.started else None
            await remains.kill({key: main}, math.inf, groups)
        await remains.remove_groups(groups.values())
        return RunRecord(spec=self.spec, started=self.started, ended=ended, cgroup=cgroup)

    async def _lines(self) -> dict[str, dict[str, object]]:
        """The record. While it cannot be read for want of descriptors or memory the end is there, and waits."""
        while True:
            try:
                # A few kilobytes from the page cache: cheaper here than a thread's hand-over.
                return record.read(self.directory / record.FILE_NAME)[0]
            except OSError as error:
                if error.errno in _UNREADABLE:
                    return {}
                await asyncio.sleep(_READ_AGAIN_S)


async def _message(channel: socket.socket) -> bytes:
    """The shim's next message; nothing when it has closed its end, or is gone."""
    try:
        return await asyncio.get_running_loop().sock_recv(channel, shim.MESSAGE_MAX_BYTES)
    except ConnectionError:
        return b""


def _started_in(message: bytes) -> RunStarted | None:
    try:
        value = json.loads(message) if message else {}
        return RunStarted.model_validate(value["started"]) if "started" in value else None
    except (ValueError, TypeError):
        return None
