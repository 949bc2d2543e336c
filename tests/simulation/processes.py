"""Processes of a simulated host: shims with their trees and their directories, and the agent's launcher of them.

A shim enforces by the real `Enforcement`, lives on when the agent is killed, and leaves in its directory what the real
one leaves. Only fork, signals and files are simulated. (Pids are above every kernel's pid_max: none is ever real.)
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from remotegpu_schemas.attempt import EndedBy, ProcessIdentity, RunEnded, RunRecord, RunSpec, RunStarted, RunUsage
from remotegpu_sidecar.adoption import Adopted, AdoptedState, directory_name
from remotegpu_sidecar.enforcement import Enforcement
from remotegpu_sidecar.launcher import Launcher, LaunchError, Place, Run

if TYPE_CHECKING:
    from tests.simulation.machine import Machine, Process
    from tests.simulation.timeline import Timer

FIRST_PID: Final = 10_000_000


@dataclass(frozen=True)
class Script:
    """What a task's main process does in one run; durations in seconds."""

    duration_s: float
    exit_code: int = 0
    term_s: float | None = 0.1
    """How long it takes to heed its stop signal; None never does."""
    linger_s: float = 0.0
    """How long what it leaves behind would live."""
    is_missing: bool = False
    """Its program does not exist."""


@dataclass
class RunDirectory:
    """`attempts/<attempt>.<run>/`: what agent and shim tell each other. Lines carry the time of their writing."""

    spec: RunSpec
    deadline_ns: int | None
    is_suspended: bool = False
    shim: ProcessIdentity | None = None
    has_starting: bool = False
    started: RunStarted | None = None
    ended: RunEnded | None = None
    written_s: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The directory's name."""
        return directory_name(self.spec.attempt_id, self.spec.run_no)

    def record(self) -> RunRecord:
        """As it is read."""
        return RunRecord(spec=self.spec, started=self.started, ended=self.ended)

    def lose_since(self, time_s: float) -> bool:
        """A power cut: lines that were written later are gone. False if nothing of the directory is left."""
        for line, written_s in self.written_s.items():
            if written_s <= time_s:
                continue
            match line:
                case "shim":
                    self.shim = None
                case "starting":
                    self.has_starting = False
                case "started":
                    self.started = None
                case "ended":
                    self.ended = None
                case _:
                    return False
        return True


class Shim:
    """One run's supervisor and its tree, as `shim.py` lives it."""

    def __init__(self, machine: Machine, directory: RunDirectory) -> None:
        self._machine = machine
        self.directory = directory
        self.identity = machine.new_process()
        self.run: SimulatedRun | None = None
        self.main: ProcessIdentity | None = None
        self.is_alive = True
        self._is_waiting = True
        self._script: Script | None = None
        self._enforcement: Enforcement | None = None
        self._exit_at_ns: int | None = None
        self._gone_at_ns: int | None = None
        self._left_ns: int | None = None
        """Of a suspended main process: how long it still has to run."""
        self._heeds: int | None = None
        """The signal that the main process is about to end by."""
        self._exit_code: int | None = None
        self._signal: int | None = None
        self._alarm: Timer | None = None
        directory.shim = self.identity
        self._write("shim")

    @property
    def exits_at_s(self) -> float:
        """When the main process will end by itself, if nobody interferes."""
        return self._machine.time_of(self._exit_at_ns or 0)

    @property
    def has_tree(self) -> bool:
        """Whether a process of the task lives."""
        return self.main is not None and self.is_alive

    def _write(self, line: str) -> None:
        self.directory.written_s[line] = self._machine.timeline.now_s

    # --- the start ---

    def abandon(self) -> None:
        """The agent went away before it said go."""
        if self._is_waiting and self.is_alive:
            self._is_waiting = False
            self._finish(EndedBy.ABANDONED)

    def go(self) -> None:
        """Start the task, unless its lease is about to end."""
        if not self._is_waiting or not self.is_alive:
            return
        self._is_waiting = False
        spec, now_ns = self.directory.spec, self._machine.boottime_ns()
        self._enforcement = Enforcement(
            now_ns=now_ns,
            timeout_s=spec.timeout_s,
            grace_period_s=spec.grace_period_s,
            lease_grace_s=spec.lease_grace_s,
            deadline_ns=self.directory.deadline_ns,
            warn_before_s=spec.warn_before_s,
            lease_warn_s=spec.lease_warn_s,
        )
        if self._enforcement.strike(now_ns):
            self._finish(EndedBy(self._enforcement.ended_by or ""))
            return
        self.directory.has_starting = True
        self._write("starting")
        script = self._machine.script_of(spec)
        if self._machine.is_broken:
            script = Script(duration_s=0.05, exit_code=1)
        self._script = script
        if script.is_missing:
            self._finish(EndedBy.LAUNCH, errno=errno.ENOENT, error="no such program")
            return
        self.main = self._machine.new_process()
        self._exit_at_ns = now_ns + round(script.duration_s * 1e9)
        self._machine.judge.tree_started(self._machine, self)
        self._machine.reached("tree", self)
        self._machine.timeline.after(0.001 + 0.004 * self._machine.random.random(), self._executes)
        self._arm()

    def _executes(self) -> None:
        if self.main is None or not self.is_alive or self.directory.started is not None:
            return
        now_ns = self._machine.boottime_ns()
        self.directory.started = RunStarted(
            process=self.main,
            shim=self.identity,
            started_wall_ns=self._machine.wall_ms() * 1_000_000,
            started_boottime_ns=now_ns,
        )
        self._write("started")
        if self.run is not None:
            self.run.tell_started()

    # --- while it runs ---

    def obey(self, *, is_kill: bool) -> None:
        """A stop signal, or the one for a kill."""
        enforcement = self._enforcement
        if enforcement is None or not self.is_alive:
            return
        now_ns = self._machine.boottime_ns()
        self._look(now_ns)
        if not self.is_alive:
            return
        if is_kill:
            enforcement.request_kill(now_ns)
        elif enforcement.request_stop(now_ns):
            self._told_to_stop(now_ns)
        self._look(now_ns)
        self._arm()

    def reread(self) -> None:
        """The directory is to be looked at."""
        enforcement = self._enforcement
        if enforcement is None or not self.is_alive:
            return
        now_ns = self._machine.boottime_ns()
        enforcement.move_deadline(self.directory.deadline_ns, now_ns)
        if self.directory.is_suspended:
            if enforcement.suspend(now_ns) and self._exit_at_ns is not None:
                self._left_ns, self._exit_at_ns = max(0, self._exit_at_ns - now_ns), None
        elif enforcement.resume(now_ns):
            self._go_on(now_ns)
        self._look(now_ns)
        self._arm()

    def _go_on(self, now_ns: int) -> None:
        if self._left_ns is not None:
            self._exit_at_ns, self._left_ns = now_ns + self._left_ns, None

    def _told_to_stop(self, now_ns: int) -> None:
        """The stop signal has reached the tree, which moves again for it."""
        self._go_on(now_ns)
        term_s = self._script.term_s if self._script is not None else None
        if term_s is not None and self._exit_at_ns is not None:
            heeded_ns = now_ns + round(term_s * 1e9)
            if heeded_ns < self._exit_at_ns:
                self._exit_at_ns, self._heeds = heeded_ns, 15

    def _arm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        if not self.is_alive or self._enforcement is None:
            return
        times = [self._enforcement.next_ns(), self._exit_at_ns, self._gone_at_ns]
        due_ns = min((time_ns for time_ns in times if time_ns is not None), default=None)
        if due_ns is not None:
            self._alarm = self._machine.timeline.at(self._machine.time_of(due_ns), self._strike)

    def _strike(self) -> None:
        self._look(self._machine.boottime_ns())
        self._arm()

    def _look(self, now_ns: int) -> None:
        """What has ended by itself first, then the clock: `Shim._follow` in the same order."""
        enforcement = self._enforcement
        if enforcement is None or not self.is_alive:
            return
        if self._exit_at_ns is not None and now_ns >= self._exit_at_ns:
            self._main_exited(enforcement, now_ns)
        if self._gone_at_ns is not None and now_ns >= self._gone_at_ns:
            self._finish(EndedBy(enforcement.ended_by or ""))
            return
        due_ns = enforcement.next_ns()
        if due_ns is not None and now_ns >= due_ns and enforcement.ended_by is None:
            enforcement.move_deadline(self.directory.deadline_ns, now_ns)
            if enforcement.strike(now_ns):
                self._told_to_stop(now_ns)
            else:
                enforcement.warn(now_ns)
        if enforcement.is_kill_due(now_ns):
            if self._gone_at_ns is None:  # the main process has not ended yet
                self._signal = 9
            self._finish(EndedBy(enforcement.ended_by or ""))

    def _main_exited(self, enforcement: Enforcement, now_ns: int) -> None:
        self._exit_at_ns = None
        script = self._script
        if script is None:
            return
        self._exit_code, self._signal = (script.exit_code, None) if self._heeds is None else (None, self._heeds)
        enforcement.main_exited(now_ns)
        self._gone_at_ns = now_ns + round(script.linger_s * 1e9)

    # --- the end ---

    def _finish(self, ended_by: EndedBy, *, errno: int | None = None, error: str | None = None) -> None:
        machine = self._machine
        self.directory.ended = RunEnded(
            ended_by=ended_by,
            exit_code=self._exit_code,
            signal=self._signal,
            errno=errno,
            error=error,
            ended_wall_ns=machine.wall_ms() * 1_000_000,
            usage=RunUsage(),
        )
        self._write("ended")
        self.die()

    def die(self) -> None:
        """It is gone, and its tree with it; without an end on record, if it has not written one."""
        had_tree, self.is_alive = self.has_tree, False
        if self._alarm is not None:
            self._alarm.cancel()
        self._machine.has_ended(self)
        if had_tree:
            self._machine.reached("end")
            self._machine.judge.tree_ended(self._machine, self)
        if self.run is not None:
            self.run.tell_ended()


class SimulatedRun(Run):
    """A run as the agent holds it."""

    def __init__(self, process: Process, shim: Shim) -> None:
        self._process = process
        self._shim = shim
        self._run_directory = shim.directory
        self.directory = process.attempts_dir / shim.directory.name
        self.spec = shim.directory.spec
        self.started = shim.directory.started
        self.shim = shim.identity
        self._deadline_ns = shim.directory.deadline_ns
        self._is_closed = False
        self._was_told = asyncio.Event()
        self._has_ended = asyncio.Event()
        shim.run = self
        if not shim.is_alive:
            self._has_ended.set()

    def tell_started(self) -> None:
        """The shim says so, over its channel."""
        self._tell(self._was_told)

    def tell_ended(self) -> None:
        """The shim is gone."""
        self._tell(self._has_ended)

    def _tell(self, event: asyncio.Event) -> None:
        if self._process.is_alive and not self._is_closed:
            self._process.loop.call_soon(event.set)

    async def wait_started(self) -> RunStarted | None:
        """Until the task executes, or never will."""
        while self.started is None and not self._has_ended.is_set():
            told = asyncio.ensure_future(self._was_told.wait())
            ended = asyncio.ensure_future(self._has_ended.wait())
            try:
                await asyncio.wait((told, ended), return_when=asyncio.FIRST_COMPLETED)
            finally:
                told.cancel()
                ended.cancel()
            if self._was_told.is_set():
                self.started = self._run_directory.started
        return self.started

    async def wait(self) -> RunRecord:
        """Until the run is over."""
        await self._has_ended.wait()
        if self._is_closed:
            raise RuntimeError(f"run {self.directory.name} was closed while it was waited for")
        return self._run_directory.record()

    def extend(self, deadline_boottime_ns: int) -> None:
        """Move the deadline; only an earlier one is told."""
        if self._has_ended.is_set():
            return
        self._process.machine.check_writable()
        before_ns, self._deadline_ns = self._deadline_ns, deadline_boottime_ns
        self._run_directory.deadline_ns = deadline_boottime_ns
        if before_ns is None or deadline_boottime_ns < before_ns:
            self._send(self._shim.reread)

    def stop(self) -> None:
        """SIGTERM to the shim."""
        self._send(lambda: self._shim.obey(is_kill=False))

    def kill(self) -> None:
        """SIGUSR1 to the shim."""
        self._send(lambda: self._shim.obey(is_kill=True))

    @property
    def is_to_be_suspended(self) -> bool:
        """Whether the file is there."""
        return self._run_directory.is_suspended

    def suspend(self) -> None:
        """Make the file and tell the shim."""
        self._process.machine.check_writable()
        self._run_directory.is_suspended = True
        self._send(self._shim.reread)

    def resume(self) -> None:
        """Remove the file and tell the shim."""
        self._run_directory.is_suspended = False
        self._send(self._shim.reread)

    def contains(self, pid: int) -> bool:
        """Only the main process is simulated."""
        return self._shim.has_tree and self._shim.main is not None and self._shim.main.pid == pid

    def close(self) -> None:
        """Let go of the run."""
        if not self._is_closed:
            self._is_closed = True
            self._has_ended.set()
            if self._shim.run is self:
                self._shim.run = None

    def _send(self, act: Callable[[], None]) -> None:
        """A signal arrives in a moment."""
        if not self._is_closed:
            self._process.machine.timeline.after(0.001 * self._process.machine.random.random(), act)


class SimulatedLauncher(Launcher):
    """Launches shims on a simulated host, and takes over those of an earlier agent."""

    def __init__(self, process: Process) -> None:
        super().__init__(process.attempts_dir)
        self._process = process
        self._machine = process.machine

    async def start(self) -> None:
        """Nothing to start."""

    async def stop(self) -> None:
        """Nothing to stop; shims that wait see the end of their channel."""

    async def launch(self, spec: RunSpec, deadline_boottime_ns: int | None = None, place: Place | None = None) -> Run:
        """As the real one: directory, shim, go."""
        machine = self._machine
        name = directory_name(spec.attempt_id, spec.run_no)
        if name in machine.directories:
            raise LaunchError(f"run {name} exists already; a run is never started twice", errno.EEXIST)
        if machine.disk.is_full:
            raise LaunchError(f"no directory for run {name}: no space left", errno.ENOSPC)
        directory = RunDirectory(spec, deadline_boottime_ns)
        directory.written_s["spec"] = machine.timeline.now_s
        machine.directories[name] = directory
        machine.reached("directory")
        await self._process.pause(0.002)
        if machine.random.random() < machine.launch_failures:
            raise LaunchError(f"run {name}: the spawner was lost", errno.EAGAIN)
        shim = Shim(machine, directory)
        machine.shims[name] = shim
        machine.reached("shim")
        try:
            await self._process.pause(0.003)
        except BaseException:
            shim.abandon()
            raise
        if not shim.is_alive:
            raise LaunchError(f"the shim of run {name} was lost")
        run = SimulatedRun(self._process, shim)
        machine.timeline.after(0.0005 * machine.random.random(), shim.go)
        return run

    async def is_host_stopping(self) -> bool:
        """Hosts of the simulation lose power; they do not shut down."""
        return False

    async def adopt(self, settled: Container[str] = ()) -> list[Adopted]:
        """Look at every directory but the settled ones."""
        await self._process.pause(0.02)
        names = sorted(name for name in self._machine.directories if name not in settled)
        return [self._inspect(self._machine.directories[name]) for name in names]

    async def look_again(self, attempt_id: str, run_no: int) -> Adopted | None:
        """One directory."""
        await self._process.pause(0.005)
        directory = self._machine.directories.get(directory_name(attempt_id, run_no))
        return self._inspect(directory) if directory is not None else None

    async def clear(self, attempt_id: str, run_no: int, main: ProcessIdentity | None) -> list[int]:
        """Nobody removes directories here: there is nothing of a run that has none."""
        await self._process.pause(0.005)
        return []

    def _inspect(self, directory: RunDirectory) -> Adopted:
        """`adoption._state_of`, on what is simulated."""
        spec, run = directory.spec, None
        shim = self._machine.shims.get(directory.name)
        if directory.ended is not None:
            state = AdoptedState.ENDED
        elif directory.shim is None:
            state = AdoptedState.NEVER_STARTED
        elif shim is not None and shim.is_alive:
            state, run = AdoptedState.RUNNING, SimulatedRun(self._process, shim)
            self._machine.judge.seen["runs adopted"] += 1
        elif not directory.has_starting and directory.started is None:
            state = AdoptedState.NEVER_STARTED
        elif directory.shim.boot_id == self._machine.boot_id:
            state = AdoptedState.LOST
        else:
            state = AdoptedState.OTHER_BOOT
        path = Path(self._process.attempts_dir / directory.name)
        return Adopted(path, state, spec.attempt_id, spec.run_no, directory.record(), run)
