"""One schedule: hosts, tasks and faults drawn from a seed, run to the end, judged at every step.

    run_schedule(seed)                  raises Violation with the command that replays it
    run_schedule(seed, focus=(...))     only these kinds of faults

After the last fault everything is mended; then all tasks have to end, and all reports to arrive.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import shlex
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from remotegpu_agent.config import (
    AgentSection,
    ApiSection,
    BreakerSection,
    CapacitySection,
    Config,
    ControlPlaneSection,
    LeaseSection,
    TasksSection,
)
from remotegpu_queue.store import StoreUnavailable
from remotegpu_schemas.api import ProcessStopRequest, StopSignal
from remotegpu_schemas.attempt import AttemptId, RunSpec
from remotegpu_schemas.errors import Refused
from remotegpu_schemas.task import Backoff, OnUnreachable, RetryPolicy, Task
from remotegpu_schemas.wire import JsonObject
from tests.simulation.disk import Disk
from tests.simulation.faults import FAULTS, LONG, USUAL, Fault
from tests.simulation.invariants import Judge, Violation
from tests.simulation.machine import Machine, SimulatedAgent
from tests.simulation.network import Link, Network
from tests.simulation.plane import Plane
from tests.simulation.processes import Script
from tests.simulation.timeline import Timeline
from tests.simulation.undisturbed import undisturbed

_FAULTS_BEGIN_UNTIL_S: Final = 30.0
_REST_WITHIN_S: Final = 1200.0
"""Back-offs and slow retries are bounded by five minutes; many of them may follow one another."""
_STEPS_MAX: Final = 400_000
_STEPS_AT_ONCE: Final = 20
_TTLS_S: Final = (8.0, 15.0, 30.0, 45.0)
_DEFAULT_TTL_S: Final = 60.0
_MACHINES_MAX: Final = 3
_CANARY: Final = Script(duration_s=0.02)
_COLLECT_EVERY: Final = 50
"""Schedules leave cycles behind."""


@functools.cache
def _state_dir() -> Path:
    """Where the agents make the directories of tasks; the same for all schedules."""
    return Path(tempfile.mkdtemp(prefix="remotegpu-simulation-"))


@functools.cache
def _disks() -> list[Disk]:
    return [Disk(_state_dir() / f"{number}.db") for number in range(_MACHINES_MAX)]


@functools.cache
def _config(slots: int, on_unreachable: OnUnreachable, has_defaults: bool) -> Config:
    if has_defaults:
        return Config(
            agent=AgentSection(state_dir=_state_dir()),
            control_plane=ControlPlaneSection(url="http://plane.invalid"),
            lease=LeaseSection(on_unreachable=on_unreachable),
            capacity=CapacitySection(max_concurrent=slots, cpus=float(slots), memory_gb=8.0),
            api=ApiSection(listen=None, socket=None),
        )
    return Config(
        agent=AgentSection(state_dir=_state_dir()),
        control_plane=ControlPlaneSection(
            url="http://plane.invalid", timeout=10.0, poll_interval=5.0, long_poll=20.0, heartbeat_interval=30.0
        ),
        lease=LeaseSection(ttl=_DEFAULT_TTL_S, renew_interval=20.0, margin=1.0, on_unreachable=on_unreachable),
        capacity=CapacitySection(max_concurrent=slots, cpus=float(slots), memory_gb=8.0),
        tasks=TasksSection(grace_period=5.0),
        breaker=BreakerSection(failures=3, within=5.0, probe_interval=5.0, probe_max_interval=20.0),
        api=ApiSection(listen=None, socket=None),
    )


@dataclass(frozen=True)
class Scene:
    """Instead of a drawn schedule: one host, one task, and one loss of contact. Durations in seconds."""

    lease_ttl_s: float
    task_s: float
    cut_at_s: float
    cut_s: float
    term_s: float | None = 0.1
    continues: bool = False
    """`lease.on_unreachable: continue`."""
    cut_refuses: bool | None = None
    """Whether connections are refused at once, or hang; None is by chance."""
    has_defaults: bool = False
    """The agent has the durations of the default config, and the task its grace period, not shorter ones."""


class Simulation:
    """A schedule under way."""

    flush_s: Final = 6.0

    def __init__(
        self,
        seed: int,
        focus: Sequence[str] = (),
        say: Callable[[str], None] | None = None,
        *,
        scene: Scene | None = None,
    ) -> None:
        self.random = Random(seed)
        self.timeline = Timeline(self.random)
        self._write = say
        self.judge = Judge(say=self._say if say is not None else lambda *_: None)
        self._ids = 0
        is_deployed = self.random.random() < 0.2
        hides_lease = is_deployed and self.random.random() < 0.3
        self.plane = Plane(
            self.timeline,
            self.judge,
            self._new_id,
            lease_ttl_s=_DEFAULT_TTL_S if hides_lease else self.random.choice(_TTLS_S),
            offers_release=self.random.random() < 0.7,
            is_deployed=is_deployed,
            repeats_held=self.random.random() < 0.5,
            hides_lease=hides_lease,
            ahead_s=self.random.uniform(-100_000, 100_000),
        )
        self.judge.plane = self.plane
        self.network = Network(self.timeline, self.random, self.plane, self.judge)
        self._scripts: dict[str, list[Script]] = {}
        self._kinds = tuple(focus) or USUAL
        if scene is not None:
            self.plane.lease_ttl_s, self.plane.is_deployed, self.plane.hides_lease = scene.lease_ttl_s, False, False
        continues = scene.continues if scene is not None else self.random.random() < 0.05
        self.judge.gives_up_promise_2 = continues
        self._on_unreachable = OnUnreachable.CONTINUE if continues else OnUnreachable.STOP
        self._has_defaults = scene is not None and scene.has_defaults
        self._ends: list[Callable[[], object]] = []
        self._has_healed = False
        self._rest_until_s = self._longest_s = 0.0
        count = 1 if scene is not None else self.random.choice((1, 2, 2, 3))
        self.machines = [self._machine(number) for number in range(count)]
        self.judge.machines = self.machines
        self.faults: list[Fault] = []
        if scene is None:
            self.faults = self._draw_faults()
            self._draw_tasks()
        else:
            self._stage(scene)

    def _say(self, who: str, *words: object) -> None:
        if self._write is not None:
            self._write(f"{self.timeline.now_s:10.4f}  {who:<6} {' '.join(map(str, words))}")

    def _new_id(self) -> str:
        self._ids += 1
        return f"id-{self._ids}"

    # --- drawing ---

    def _machine(self, number: int) -> Machine:
        machine_id, disk = f"m{number + 1}", _disks()[number]
        disk.format(functools.partial(self.judge.moved, machine_id))
        self.network.links[machine_id] = Link()
        machine = Machine(
            machine_id,
            self.timeline,
            self.random,
            _config(self.random.choice((1, 2, 3)), self._on_unreachable, self._has_defaults),
            disk,
            self.network,
            self.judge,
            self._new_id,
            self._script_of,
            ahead_s=self.random.uniform(-1000, 1000),
        )
        self.timeline.after(self.random.random(), machine.start_agent)
        return machine

    def _draw_faults(self) -> list[Fault]:
        random = self.random
        count = random.choice((3, 4, 6, 8) if self._kinds is not USUAL else (1, 1, 2, 2, 3, 4, 6))
        faults = []
        for _ in range(count):
            kind, at_s = random.choice(self._kinds), random.uniform(0.3, _FAULTS_BEGIN_UNTIL_S)
            length_s = random.choice((0.5, 3.0, 10.0, 25.0, 50.0)) * random.random()
            length_s += 40.0 if kind in LONG else 0.0
            faults.append(Fault(kind, random.choice(self.machines), at_s, length_s))
        faults.sort(key=lambda fault: fault.at_s)
        for fault in faults:
            self.timeline.at(fault.at_s, functools.partial(self._begin, fault))
        last_s = max(fault.at_s + fault.for_s for fault in faults)
        self.timeline.at(last_s + 1.0, self._heal)
        return faults

    def _stage(self, scene: Scene) -> None:
        self._scripts["t1"] = [Script(duration_s=scene.task_s, term_s=scene.term_s)]
        self._longest_s = 2 * scene.task_s
        spec: JsonObject = {"id": "t1", "command": "true"}
        self.plane.submit(spec if scene.has_defaults else {**spec, "grace_period_sec": 5})
        link = self.network.links["m1"]

        def cut() -> None:
            self._say("fault", "cut off")
            by_chance = self.random.random() < 0.5
            link.is_cut, link.cut_refuses = True, by_chance if scene.cut_refuses is None else scene.cut_refuses

        def mend() -> None:
            link.is_cut = False
            self._say("fault", "contact again")

        self.timeline.at(scene.cut_at_s, cut)
        self.timeline.at(scene.cut_at_s + scene.cut_s, mend)
        self.timeline.at(scene.cut_at_s + scene.cut_s, self._heal)

    def _draw_tasks(self) -> None:
        random = self.random
        for number in range(random.choice((1, 2, 3, 4, 5))):
            task_id, at_s = f"t{number + 1}", random.choice((0.0, random.uniform(0, 25)))
            retries = random.choice((0, 0, 1, 2))
            self._scripts[task_id] = [self._draw_script() for _ in range(retries + 1)]
            timeout_s = self._draw_timeout(task_id)
            if random.random() < 0.15:
                task = Task(
                    id=task_id,
                    command="true",
                    timeout_s=timeout_s,
                    retry=RetryPolicy(max=retries, delay_s=random.choice((0.0, 3.0)), backoff=Backoff.EXPONENTIAL),
                )
                machine = random.choice(self.machines)
                self.timeline.at(at_s, functools.partial(self._submit_here, machine, task))
                continue
            spec: JsonObject = {
                "id": task_id,
                "command": "true",
                "timeout": timeout_s,
                "priority": random.choice((1, 5, 5, 9)),
                "max_retries": retries,
                "retry_delay": random.choice((0, 3)),
                "grace_period_sec": random.choice((1, 5)),
            }
            if random.random() < 0.3:
                spec["resources"] = {"cpus": random.choice((0.5, 1))}
            if random.random() < 0.3 and not self.plane.is_deployed:
                spec["lease_ttl_sec"] = random.choice(_TTLS_S)
            machine_id = random.choice(self.machines).id if random.random() < 0.2 else None
            self.timeline.at(at_s, functools.partial(self.plane.submit, spec, machine_id))

    def _draw_script(self) -> Script:
        random = self.random
        return Script(
            duration_s=random.choice((0.05, 1.0, 5.0, 20.0, 30.0)) * random.random(),
            exit_code=random.choice((0, 0, 0, 0, 1, 3)),
            term_s=random.choice((0.0, 0.1, 0.1, 2.0, None)),
            linger_s=random.choice((0.0, 0.0, 0.0, 1.0, 10.0)),
            is_missing=random.random() < 0.03,
        )

    def _draw_timeout(self, task_id: str) -> float:
        chance = self.random.random()
        if chance < 0.7:
            return 0.0
        first = self._scripts[task_id][0].duration_s
        return max(0.1, first if chance < 0.85 else first * 0.7)

    def _script_of(self, spec: RunSpec) -> Script:
        """Asked for when the task starts; some tasks say how far they are."""
        scripts = self._scripts.get(spec.task_id) or [_CANARY]
        if self.random.random() < 0.3:
            for percent in (10.0, 60.0):
                self.timeline.after(6.0 * self.random.random(), functools.partial(self._progress, spec, percent))
        return scripts[min(spec.run_no, len(scripts)) - 1]

    # --- what happens ---

    def _begin(self, fault: Fault) -> None:
        self._say("fault", fault)
        end = FAULTS[fault.kind](self, fault)
        if end is not None:
            self._ends.append(end)
            self.timeline.after(fault.for_s, functools.partial(self._end, fault, end))

    def _end(self, fault: Fault, end: Callable[[], object]) -> None:
        if end in self._ends:
            self._ends.remove(end)
            self._say("fault", fault.kind, "is over")
            end()

    def _heal(self) -> None:
        """Everything is mended, at once."""
        self._say("fault", "all is mended")
        self._has_healed = True
        self.judge.healed_ms = self.plane.now_ms
        self._rest_until_s = self.timeline.now_s + _REST_WITHIN_S + self._longest_s
        for end in self._ends:
            end()
        self._ends.clear()
        for machine in self.machines:
            machine.traps.clear()
            if machine.process is not None:
                machine.process.loop.steps_left = None
            self._resume_all(machine)

    def _resume_all(self, machine: Machine) -> None:
        """Nobody leaves a task suspended: looked for until all has come to rest."""
        self.operate(machine, "resume")
        self.timeline.after(20.0, lambda: self._resume_all(machine))

    def operate(self, machine: Machine, verb: str, task_id: str | None = None) -> None:
        """An operator asks the agent for something, by its operations; refusals are his to bear."""
        process = machine.process
        agent = process.agent if process is not None else None
        if process is None or agent is None or not process.is_alive:
            return
        active = [run for run in agent.executor.active.values() if task_id in {None, run.task_id}]
        if verb == "resume":
            active = [run for run in active if run.is_suspended]
        if not active:
            return
        chosen = active if verb == "resume" else [self.random.choice(active)]
        operations = agent.operations

        async def ask() -> None:
            for run in chosen:
                try:
                    match verb:
                        case "cancel":
                            await operations.cancel_task(run.task_id)
                        case "suspend":
                            await operations.suspend_task(run.task_id)
                        case "resume":
                            await operations.resume_task(run.task_id)
                        case _:
                            if run.started is None:
                                return
                            signal = StopSignal.SIGKILL if verb == "kill" else StopSignal.SIGTERM
                            request = ProcessStopRequest(process_id=run.started.process.pid, signal=signal)
                            await operations.stop_process(request)
                except (Refused, StoreUnavailable) as refusal:
                    self._say(machine.id, verb, run.task_id, "is refused:", refusal)

        self._say(machine.id, "is asked to", verb, ", ".join(run.task_id for run in chosen))
        process.loop.call_soon(lambda: process.loop.create_task(ask()))

    def _progress(self, spec: RunSpec, percent: float) -> None:
        """What `ProgressFollower` does when a task has written a line."""
        for machine in self.machines:
            process = machine.process
            agent = process.agent if process is not None else None
            if process is not None and agent is not None and spec.attempt_id in agent.executor.active:
                process.loop.call_soon(process.loop.create_task, self._store_progress(agent, spec.attempt_id, percent))

    async def _store_progress(self, agent: SimulatedAgent, attempt_id: AttemptId, percent: float) -> None:
        with contextlib.suppress(StoreUnavailable):
            await agent.executor.store_progress(attempt_id, percent, "on its way")

    def _submit_here(self, machine: Machine, task: Task) -> None:
        process = machine.process
        agent = process.agent if process is not None else None
        if process is None or agent is None:
            if not self._has_healed:
                self.timeline.after(1.0, lambda: self._submit_here(machine, task))
            return
        operations = agent.operations

        async def submit() -> None:
            try:
                await operations.submit([task], None)
            except (Refused, StoreUnavailable) as refusal:
                self._say(machine.id, "refuses", task.id, refusal)
            else:
                self.judge.local_tasks[task.id] = machine.id

        process.loop.call_soon(lambda: process.loop.create_task(submit()))

    # --- running ---

    def run(self) -> None:
        """To the end. Raises Violation."""
        step, judge = self.timeline.step, self.judge
        while judge.violation is None:
            for _ in range(_STEPS_AT_ONCE):
                if not step():
                    judge.violated("nothing happens any more")
                    break
            if not self._has_healed:
                continue
            if self._is_at_rest():
                judge.check_rest()
                break
            if self.timeline.now_s > self._rest_until_s or self.timeline.steps > _STEPS_MAX:
                matters = "; ".join(judge.open_matters())
                judge.violated(f"no rest {self.timeline.now_s:.0f} s after the begin: {matters}")
        if judge.violation is not None:
            raise Violation(judge.violation)

    def _is_at_rest(self) -> bool:
        if self.plane.open_tasks or any(machine.shims for machine in self.machines):
            return False
        return not self.judge.open_matters()

    def unwind(self) -> None:
        """Let go of all that hangs."""
        for machine in self.machines:
            for process in machine.processes:
                process.unwind()


def run_schedule(
    seed: int,
    focus: Sequence[str] = (),
    *,
    say: Callable[[str], None] | None = None,
    replay: str = "",
) -> Simulation:
    """Run one schedule to its end. Raises Violation, whose message has the command that replays it."""
    simulation = Simulation(seed, focus, say)
    try:
        simulation.run()
    except Violation as violation:
        command = f"python -m tests.simulation --seed {seed} -v"
        if focus:
            command += f" --focus {shlex.quote(','.join(focus))}"
        raise Violation(f"seed {seed}: {violation}\n  replay: {command}{replay}") from None
    finally:
        simulation.unwind()
    return simulation


def run_schedules(seeds: Iterable[int], focus: Sequence[str] = (), *, replay: str = "") -> int:
    """Run one after the other, and return how many. Raises Violation for the first that breaks a promise."""
    count = 0
    with undisturbed():
        for seed in seeds:
            run_schedule(seed, focus, replay=replay)
            count += 1
            if count % _COLLECT_EVERY == 0:
                gc.collect()
    return count
