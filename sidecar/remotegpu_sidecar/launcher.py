"""The agent's client of the spawner and of the shims: launches runs and takes over those of an earlier agent.

Files are written and read on the event loop where they are a few kilobytes in the page cache, since a hand-over to a
thread costs more; whatever grows with the host (all directories, all of /proc) goes to a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Container, Generator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from remotegpu_schemas.attempt import ProcessIdentity, RunSpec
from remotegpu_sidecar import identity, record, remains, shim
from remotegpu_sidecar.adoption import Adopted, AdoptedState, Found, directory_name, inspect, survey
from remotegpu_sidecar.placement import Placement, ProcessGroupPlacement
from remotegpu_sidecar.runs import Run, read_deadline, write_deadline
from remotegpu_sidecar.spawning import LaunchError, Spawner

__all__ = ["Adopted", "AdoptedState", "LaunchError", "Launcher", "Place", "Run"]

Place = Callable[[ProcessIdentity], Awaitable[str | None]]
"""Puts a shim where its run belongs before the task is started, and returns the control group that it made for it.

What it raises refuses the launch.
"""

HELLO_TIMEOUT_S: Final = 30.0
LOST_KILL_TIMEOUT_S: Final = 10.0

_LAUNCH_ATTEMPTS: Final = 3
# A shim's own lines beside the spec; the sum stays readable.
_SPEC_MAX_BYTES: Final = record.MAX_BYTES - 64 * 1024


class Launcher:
    """Owns the spawner and the placement. The runs it returns belong to the caller, and live on when it stops."""

    def __init__(self, attempts_dir: Path, placement: Placement | None = None, *, python: str = sys.executable) -> None:
        self._attempts_dir = attempts_dir.absolute()
        self._placement = placement or ProcessGroupPlacement()
        self._python = python
        self._spawner: Spawner | None = None
        self._spawner_lock = asyncio.Lock()
        self._is_started = False

    async def start(self) -> None:
        """Make the directory, what the placement needs, and the spawner. Raises LaunchError, OSError."""
        self._attempts_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        await self._placement.start()
        self._is_started = True
        await self._living_spawner()

    async def stop(self) -> None:
        """End the spawner. Runs stay as they are. Safe to repeat."""
        self._is_started = False
        async with self._spawner_lock:
            if self._spawner is not None:
                await self._spawner.stop()
                self._spawner = None
        await self._placement.close()

    @property
    def spawner_pid(self) -> int | None:
        """The spawner's pid, for `doctor` and tests."""
        return self._spawner.pid if self._spawner else None

    async def launch(self, spec: RunSpec, deadline_boottime_ns: int | None = None, place: Place | None = None) -> Run:
        """Tell a new shim to start the task, and return the run: `wait_started` says when the task executes.

        Raises LaunchError when nothing of it ever ran or will. A run directory is used once: repeat with another run
        number. If the caller is cancelled after the start, the run goes on and is there for `adopt`. `place` is for
        tests, in place of the placement's.
        """
        directory = self._make_directory(spec, deadline_boottime_ns)
        channel, hello = await self._obtain_shim(directory)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(channel))
            try:
                pidfd = identity.open_pidfd(hello)
            except OSError as error:
                raise LaunchError(f"the shim of {directory.name} was lost: {error}", error.errno) from error
            # Whatever can fail comes before the go: nothing that runs may be taken for not started.
            with _closed_on_error(pidfd):
                run = Run(
                    directory, spec, None, hello, pidfd, deadline_boottime_ns=deadline_boottime_ns, channel=channel
                )
            try:
                run.cgroup = await _put(place or partial(self._placement.place, spec), hello, directory)
                _say_go(channel, directory, run.cgroup)
            except BaseException:
                run.close()
                raise
            stack.pop_all()
            return run

    async def is_host_stopping(self) -> bool:
        """Whether the host is being shut down, as far as the placement can know."""
        return await self._placement.is_host_stopping()

    async def clear(self, attempt_id: str, run_no: int, main: ProcessIdentity | None) -> list[int]:
        """Kill what is left of a run that has no directory (any more); `main` if it is known. Safe to repeat.

        Returns the pids that are still there after LOST_KILL_TIMEOUT_S.
        """
        key: remains.RunKey = (attempt_id, run_no)
        group = self._placement.group_of(directory_name(attempt_id, run_no))
        groups = {key: group} if group is not None else {}
        left = (await remains.kill({key: main}, LOST_KILL_TIMEOUT_S, groups))[key]
        if not left:
            await remains.remove_groups(groups.values())
        return left

    async def adopt(self, settled: Container[str] = ()) -> list[Adopted]:
        """Take stock of the attempt directories, once, before the first launch. Kills what lost shims left behind.

        `settled` are names of directories whose runs are known to have ended: they are not looked at.
        """
        found = await asyncio.to_thread(survey, self._attempts_dir, settled)
        adopted = [self._take_over(each) for each in found]
        mains: dict[remains.RunKey, ProcessIdentity | None] = {
            (each.record.spec.attempt_id, each.record.spec.run_no): each.record.started.process
            if each.record.started
            else None
            for each in adopted
            if each.state is AdoptedState.LOST and each.record is not None
        }
        if mains:
            groups: dict[remains.RunKey, str] = {
                (each.record.spec.attempt_id, each.record.spec.run_no): each.record.cgroup
                for each in adopted
                if each.state is AdoptedState.LOST and each.record is not None and each.record.cgroup is not None
            }
            left = await remains.kill(mains, LOST_KILL_TIMEOUT_S, groups)
            adopted = [_with_left(each, left) for each in adopted]
        await remains.remove_groups(self._groups_left_by(adopted))
        return adopted

    def _groups_left_by(self, adopted: list[Adopted]) -> set[str]:
        """The groups of runs that are over, and of those that were placed and never told to go."""
        over = [each for each in adopted if each.run is None and not each.left_pids]
        by_record = {each.record.cgroup for each in over if each.record is not None}
        by_name = {self._placement.group_of(each.directory.name) for each in over}
        return {group for group in by_record | by_name if group is not None}

    async def look_again(self, attempt_id: str, run_no: int) -> Adopted | None:
        """One run's directory, as `adopt` looks at it; None if there is none."""
        directory = self._attempts_dir / directory_name(attempt_id, run_no)
        if not directory.exists():
            return None
        adopted = self._take_over(await asyncio.to_thread(inspect, directory))
        if adopted.state is AdoptedState.LOST and adopted.record is not None:
            key: remains.RunKey = (attempt_id, run_no)
            main = adopted.record.started.process if adopted.record.started else None
            groups = {key: adopted.record.cgroup} if adopted.record.cgroup is not None else {}
            adopted = _with_left(adopted, await remains.kill({key: main}, LOST_KILL_TIMEOUT_S, groups))
        await remains.remove_groups(self._groups_left_by([adopted]))
        return adopted

    def _take_over(self, found: Found) -> Adopted:
        run: Run | None = None
        if found.state is AdoptedState.RUNNING and found.record is not None and found.shim is not None:
            try:
                pidfd = identity.open_pidfd(found.shim)
            except ProcessLookupError:  # it has ended since the look at it
                return self._take_over(inspect(found.directory))
            with _closed_on_error(pidfd):
                run = Run(
                    found.directory,
                    found.record.spec,
                    found.record.started,
                    found.shim,
                    pidfd,
                    deadline_boottime_ns=read_deadline(found.directory),
                )
                run.cgroup = found.record.cgroup
        return Adopted(found.directory, found.state, found.attempt_id, found.run_no, found.record, run, found.reason)

    # --- the launch, step by step ---

    def _make_directory(self, spec: RunSpec, deadline_boottime_ns: int | None) -> Path:
        try:
            directory = self._attempts_dir / directory_name(spec.attempt_id, spec.run_no)
        except ValueError as error:
            raise LaunchError(str(error), errno.EINVAL) from None
        line = record.encode("spec", spec.model_dump_json().encode())
        if len(line) > _SPEC_MAX_BYTES:
            raise LaunchError(f"the run's spec has {len(line)} bytes, more than {_SPEC_MAX_BYTES}", errno.E2BIG)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            raise LaunchError(
                f"run {directory.name} exists already; a run is never started twice", errno.EEXIST
            ) from None
        except OSError as error:
            raise LaunchError(f"no directory for run {directory.name}: {error}", error.errno) from error
        try:
            if deadline_boottime_ns is not None:
                write_deadline(directory, deadline_boottime_ns)
            _write_record(directory, line)
        except OSError as error:
            for name in (shim.DEADLINE_FILE, record.FILE_NAME):
                (directory / name).unlink(missing_ok=True)
            directory.rmdir()
            raise LaunchError(f"the spec of run {directory.name} cannot be written: {error}", error.errno) from error
        return directory

    async def _obtain_shim(self, directory: Path) -> tuple[socket.socket, ProcessIdentity]:
        """A shim that waits for its go. One that said nothing has started nothing: a lost spawner costs a repeat."""
        number: int | None = None
        for _ in range(_LAUNCH_ATTEMPTS):
            living = await self._living_spawner()
            try:
                channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            except OSError as error:
                raise LaunchError(f"no channel for run {directory.name}: {error}", error.errno) from error
            try:
                channel.setblocking(False)
                with contextlib.closing(theirs):
                    await living.send(json.dumps({"dir": str(directory)}).encode(), theirs.fileno())
                async with asyncio.timeout(HELLO_TIMEOUT_S):
                    message = await _receive(channel)
            except TimeoutError:
                channel.close()
                await self._discard(living)
                raise LaunchError(f"the spawner did not answer within {HELLO_TIMEOUT_S:g} s", errno.ETIMEDOUT) from None
            except ConnectionError:
                channel.close()
                await self._discard(living)
            except BaseException:
                channel.close()
                raise
            else:
                if message is not None:
                    return channel, _hello_of(message, channel, directory)
                channel.close()
                number = living.complaint()
        why = f": {os.strerror(number)} in the spawner" if number is not None else ""
        raise LaunchError(f"the shim of run {directory.name} was lost before it could start anything{why}", number)

    async def _living_spawner(self) -> Spawner:
        async with self._spawner_lock:
            if not self._is_started:
                raise LaunchError("the launcher is stopped")
            if self._spawner is not None and self._spawner.has_ended:
                await self._spawner.stop()
                self._spawner = None
            if self._spawner is None:
                self._spawner = await self._placement.start_spawner(self._python)
            return self._spawner

    async def _discard(self, broken: Spawner) -> None:
        async with self._spawner_lock:
            if self._spawner is broken:
                self._spawner = None
        await broken.stop(is_stuck=True)


def _write_record(directory: Path, line: bytes) -> None:
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(directory / record.FILE_NAME, flags, 0o600)
    try:
        record.append(fd, line)
    finally:
        os.close(fd)


async def _receive(channel: socket.socket) -> dict[str, object] | None:
    """The next message; None when the other side is gone."""
    try:
        message = await asyncio.get_running_loop().sock_recv(channel, shim.MESSAGE_MAX_BYTES)
    except ConnectionError:
        return None
    value = json.loads(message) if message else None
    return value if isinstance(value, dict) else None


def _hello_of(message: dict[str, object], channel: socket.socket, directory: Path) -> ProcessIdentity:
    try:
        if "hello" in message:
            return ProcessIdentity.model_validate(message["hello"])
        raise _launch_error(message, directory)
    except (LaunchError, ValidationError):
        channel.close()
        raise


async def _put(place: Place, hello: ProcessIdentity, directory: Path) -> str | None:
    try:
        return await place(hello)
    except LaunchError:
        raise
    except Exception as error:
        raise LaunchError(
            f"run {directory.name} was refused its place: {error}", getattr(error, "errno", None)
        ) from error


def _say_go(channel: socket.socket, directory: Path, cgroup: str | None) -> None:
    try:
        channel.send(json.dumps({"go": {"cgroup": cgroup} if cgroup is not None else {}}).encode())
    except OSError as error:
        raise LaunchError(f"the shim of run {directory.name} was lost: {error}", error.errno) from error


def _launch_error(message: dict[str, object], directory: Path) -> LaunchError:
    number = message.get("errno")
    return LaunchError(f"run {directory.name}: {message.get('error')}", number if isinstance(number, int) else None)


@contextlib.contextmanager
def _closed_on_error(fd: int) -> Generator[None]:
    try:
        yield
    except BaseException:
        os.close(fd)
        raise


def _with_left(adopted: Adopted, left: dict[remains.RunKey, list[int]]) -> Adopted:
    if adopted.state is not AdoptedState.LOST or adopted.record is None:
        return adopted
    pids = left[adopted.record.spec.attempt_id, adopted.record.spec.run_no]
    if not pids:
        return adopted
    return replace(adopted, left_pids=tuple(pids), reason=f"processes that SIGKILL has not removed: {pids}")
