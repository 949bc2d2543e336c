"""A simulated host and the agent process on it: clocks, boots, the attempts directory, and what may be done to them.

The agent is the real one, put together by `daemon.py`; only its surroundings are simulated.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from remotegpu_agent.agent_operations import AgentOperations
from remotegpu_agent.config import Config
from remotegpu_agent.daemon import Agent, Surroundings
from remotegpu_agent.directory_watch import DirectoryWatcher
from remotegpu_agent.executor import Executor
from remotegpu_agent.names import Names
from remotegpu_agent.restoration import Restoration, Restored
from remotegpu_agent.supervise import Loops
from remotegpu_queue.admission import Readings
from remotegpu_queue.store import Store, StoreUnavailable
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import ProcessIdentity, RunSpec
from remotegpu_schemas.wire import JsonObject, RegisterRequest
from remotegpu_sidecar.launcher import Adopted
from tests.simulation.disk import Disk, DiskExecutor
from tests.simulation.network import Network, SimulatedControlPlane
from tests.simulation.plane import EPOCH_S
from tests.simulation.processes import FIRST_PID, RunDirectory, Script, Shim, SimulatedLauncher
from tests.simulation.timeline import Timeline, VirtualLoop

if TYPE_CHECKING:
    from tests.simulation.invariants import Judge

_UNWIND_STEPS_MAX = 2000
_RESTART_S = 2.0
_FLUSH_S = 5.0
"""So much of what was written last may be lost in a power cut."""


class _NoWatcher(DirectoryWatcher):
    """Task files of progress are not simulated: nothing ever changes."""

    def __init__(self) -> None:
        """Without a descriptor."""

    def close(self) -> None:
        """Nothing to close."""

    async def run(self) -> None:
        """For ever."""
        await asyncio.Event().wait()

    @contextlib.contextmanager
    def listen(self, directory: Path, changed: asyncio.Event) -> Generator[bool]:
        """Nobody will tell, and nobody need look."""
        yield True


class SimulatedAgent(Agent):
    """The real agent, started without its API and its sockets."""

    operations: AgentOperations

    async def live(self, network: Network, process: Process, stack: contextlib.AsyncExitStack) -> None:
        """As `Agent.start`, from where the outside is there."""
        self.operations = self._operations
        timeout_s = self._config.control_plane.timeout
        self._use_plane(
            SimulatedControlPlane(network, process, self._clock, timeout_s=timeout_s, on_reconnect=self._on_reconnect)
        )
        stack.push_async_callback(self._loops.close)
        await self._take_over()
        self._start_loops()

    @property
    def executor(self) -> Executor:
        """Who owns the runs."""
        return self._executor

    @property
    def failures(self) -> dict[str, int]:
        """Parts that have raised."""
        return self._loops.failures

    async def _restore_later(self, restoration: Restoration, restored: Restored, found: Sequence[Adopted]) -> None:
        """As the real one, but without directories that could be stray, or that somebody could tidy."""
        await restoration.restore_later(restored)
        self._on_report()

    async def _describe(self) -> RegisterRequest:
        return RegisterRequest(
            agent_id=self._names.agent_id,
            machine_id=self._names.machine_id,
            version="0",
            hostname=self._names.machine_id,
            ip_address="192.0.2.1",
            agent_port=0,
            max_workers=1,
        )


class Process:
    """One agent process, from its start to its end."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.machine_id = machine.id
        self.attempts_dir = machine.config.agent.state_dir / "attempts"
        self.loop = VirtualLoop(machine.timeline, self._is_at_fault)  # type: ignore[abstract]  # no sockets, no signals
        self.agent: SimulatedAgent | None = None
        self.is_alive = True
        self._thawed: list[Callable[[], object]] = []
        self._stopping = asyncio.Event()
        self.task = self.loop.create_task(self._live())

    def _is_at_fault(self, what: str) -> None:
        self.machine.judge.violated(f"{self.machine_id}: {what}")

    async def _live(self) -> None:
        machine = self.machine
        try:
            async with contextlib.AsyncExitStack() as stack:
                writer = DiskExecutor(machine.disk, self, machine.timeline, is_reader=False)
                store = Store(writer, DiskExecutor(machine.disk, self, machine.timeline, is_reader=True))
                store.start()
                stack.push_async_callback(store.close)
                names = Names(machine.agent_id, machine.id, machine.boot_id)
                agent = SimulatedAgent(machine.config, names, store, Loops(), machine.surroundings(self))
                await agent.live(machine.network, self, stack)
                self.agent = agent
                await self._stopping.wait()
        except StoreUnavailable:
            pass  # systemd starts it again
        except Exception as error:  # noqa: BLE001 - whatever it is, the agent has crashed
            self._is_at_fault(f"the agent has crashed: {error!r}")
        if self.is_alive:
            machine.agent_is_gone(self)

    def stop(self) -> None:
        """SIGTERM."""
        self.loop.call_soon(self._stopping.set)

    def kill(self) -> None:
        """SIGKILL."""
        self.is_alive = False
        self.loop.kill()

    def freeze(self) -> None:
        """SIGSTOP."""
        self.loop.freeze()

    def thaw(self) -> None:
        """SIGCONT."""
        if self.loop.is_frozen:
            self.loop.thaw()
            waiting, self._thawed = self._thawed, []
            for callback in waiting:
                callback()

    def when_thawed(self, callback: Callable[[], object]) -> None:
        """A thread of a frozen process goes on later."""
        self._thawed.append(callback)

    async def pause(self, seconds: float) -> None:
        """Something outside takes up to so long."""
        await asyncio.sleep(seconds * self.machine.random.random())

    def settle(self, future: asyncio.Future[Any], result: object = None, *, error: Exception | None = None) -> bool:
        """Let a future of this process have its result; false if nobody waits for it any more."""
        if not self.is_alive or future.done():
            return False
        if error is not None:
            future.set_exception(error)
            future.exception()  # whoever was cancelled at this moment does not take it
        else:
            future.set_result(result)
        return True

    def unwind(self) -> None:
        """After the schedule."""
        self.is_alive = False
        self.loop.unwind(_UNWIND_STEPS_MAX)


@dataclass
class Trap:
    """Something that is done when the host has come to a point for the `count`-th time from now on."""

    point: str
    count: int
    act: Callable[[object], object]


@dataclass
class Machine:
    """A host. `process` is its agent, while there is one."""

    id: str
    timeline: Timeline
    random: Random
    config: Config
    disk: Disk
    network: Network
    judge: Judge
    new_id: Callable[[], str]
    script_of: Callable[[RunSpec], Script]
    directories: dict[str, RunDirectory] = field(default_factory=dict)
    shims: dict[str, Shim] = field(default_factory=dict)
    """The living ones."""
    process: Process | None = None
    processes: list[Process] = field(default_factory=list)
    launch_failures: float = 0.0
    is_broken: bool = False
    """Every task fails at once."""
    boots: int = 0
    is_off: bool = False
    ahead_s: float = 0.0
    """How far the clock on the wall is ahead; it may jump."""
    traps: list[Trap] = field(default_factory=list)
    _booted_s: float = -1000.0
    _pids: int = FIRST_PID

    @property
    def agent_id(self) -> str:
        """The agent's name."""
        return f"agent-{self.id}"

    @property
    def boot_id(self) -> str:
        """This boot."""
        return f"{self.id}-boot-{self.boots}"

    # --- Clock ---

    def boottime_ns(self) -> int:
        """Nanoseconds since boot."""
        return round((self.timeline.now_s - self._booted_s) * 1e9)

    def wall_ms(self) -> int:
        """Milliseconds since 1970, by a clock that may jump."""
        return int((EPOCH_S + self.timeline.now_s + self.ahead_s) * 1000)

    def time_of(self, boottime_ns: int) -> float:
        """When the boottime clock shows that; not in the past."""
        return max(self.timeline.now_s, boottime_ns / 1e9 + self._booted_s + 1e-9)

    # --- processes ---

    def new_process(self) -> ProcessIdentity:
        """A number that no process of this boot has had."""
        self._pids += 1
        return ProcessIdentity(boot_id=self.boot_id, pid=self._pids, start_ticks=int(self.boottime_ns() / 1e7))

    def has_ended(self, shim: Shim) -> None:
        """The shim is gone."""
        self.shims.pop(shim.directory.name, None)

    def check_writable(self) -> None:
        """Raises OSError while the disk is full."""
        if self.disk.is_full and self.random.random() < 0.5:  # a write over what is there may still work
            raise OSError(28, "No space left on device")

    def reached(self, point: str, what: object = None) -> None:
        """It has come to a point; whoever waits for that is told."""
        for trap in list(self.traps):
            if trap.point == point:
                trap.count -= 1
                if trap.count <= 0:
                    self.traps.remove(trap)
                    trap.act(what)

    def read_host(self) -> Readings:
        """What is free."""
        return Readings(0 if self.disk.is_full else 100 * limits.GIB, 1_000_000, 8 * limits.GIB)

    # --- the agent ---

    def surroundings(self, process: Process) -> Surroundings:
        """What the agent meets."""
        return Surroundings(
            clock=self,
            random=self.random.random,
            new_id=self.new_id,
            launcher=SimulatedLauncher(process),
            watcher=_NoWatcher(),
            metrics=_no_metrics,
            read_host=self.read_host,
        )

    def start_agent(self) -> None:
        """Start it, unless one runs or the host is off."""
        if self.process is None and not self.is_off:
            self.process = Process(self)
            self.processes.append(self.process)

    def agent_is_gone(self, process: Process) -> None:
        """It has ended by itself; whoever supervises it starts it again."""
        process.kill()
        self._abandon_shims()
        self.judge.agent_ended(self, process)
        self.process = None
        self.timeline.after(_RESTART_S, self.start_agent)

    def kill_agent(self, down_s: float) -> None:
        """SIGKILL; started again after a while."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            self._abandon_shims()
            self.judge.agent_ended(self, process)
        self.timeline.after(down_s, self.start_agent)

    def _abandon_shims(self) -> None:
        """Those that wait for their go see the end of their channel."""
        for shim in list(self.shims.values()):
            shim.run = None
            shim.abandon()

    def cut_power(self, down_s: float) -> None:
        """Everything dies; of what was written in the last seconds and not synced a part is lost. When off: nothing."""
        if self.is_off:
            return  # else it would boot again, under the agent that runs by then
        for shim in list(self.shims.values()):
            shim.run = None
            shim.die()
        lost_since_s = self.timeline.now_s - _FLUSH_S * self.random.random()
        self.directories = {
            name: directory for name, directory in self.directories.items() if directory.lose_since(lost_since_s)
        }
        self.is_off = True
        self.kill_agent(down_s + 1.0)
        self.timeline.after(down_s, self._boot)

    def _boot(self) -> None:
        self.is_off = False
        self.boots += 1
        self._booted_s = self.timeline.now_s - 5.0
        self.start_agent()


async def _no_metrics() -> JsonObject:
    return {}
