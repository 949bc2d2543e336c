"""The faults of the simulation, by name: each begins at its time on its host, and ends by itself or when all is healed.

What a fault does follows from the schedule's seed alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from tests.simulation.disk import Disk
from tests.simulation.machine import Machine, Trap
from tests.simulation.network import Link
from tests.simulation.processes import Shim

if TYPE_CHECKING:
    from tests.simulation.simulator import Simulation

_POINTS: Final = (
    "directory",
    "shim",
    "tree",
    "end",
    "commit",
    "arrive claim",
    "send start",
    "arrive start",
    "arrive renew",
    "send complete",
    "arrive complete",
    "arrive release",
)


@dataclass(frozen=True)
class Fault:
    """What happens, where, when, and for how long (seconds)."""

    kind: str
    machine: Machine
    at_s: float
    for_s: float

    def __str__(self) -> str:
        """For people."""
        return f"{self.at_s:8.3f} {self.kind} on {self.machine.id} for {self.for_s:.1f} s"


_CALM: Final[dict[tuple[type, str], object]] = {
    **{(Link, name): value for name, value in vars(Link()).items()},
    (Disk, "is_full"): False,
    (Disk, "slowness_s"): 0.0,
    (Machine, "launch_failures"): 0.0,
    (Machine, "is_broken"): False,
}
"""How things are without faults; two at once end together."""

Begin = Callable[["Simulation", Fault], Callable[[], object] | None]
"""Lets a fault begin; gives what ends it, unless it is over by then."""


def _down_s(sim: Simulation, fault: Fault) -> float:
    return 0.5 + fault.for_s * sim.random.random()


def _kill(sim: Simulation, fault: Fault) -> None:
    fault.machine.kill_agent(_down_s(sim, fault))


def _kill_after_steps(sim: Simulation, fault: Fault) -> None:
    process = fault.machine.process
    if process is not None:
        process.loop.steps_left = 1 + int(60 * sim.random.random())
        process.loop.on_spent = partial(fault.machine.kill_agent, _down_s(sim, fault))


def _kill_at(point: str, sim: Simulation, fault: Fault) -> None:
    count = 1 + int(2.5 * sim.random.random())
    down_s = _down_s(sim, fault)
    fault.machine.traps.append(Trap(point, count, lambda _: fault.machine.kill_agent(down_s)))


def _kill_at_a_point(sim: Simulation, fault: Fault) -> None:
    _kill_at(sim.random.choice(_POINTS), sim, fault)


def _stop(sim: Simulation, fault: Fault) -> None:
    if fault.machine.process is not None:
        fault.machine.process.stop()


def _freeze(sim: Simulation, fault: Fault) -> Callable[[], object] | None:
    process = fault.machine.process
    if process is None:
        return None
    process.freeze()
    return process.thaw


def _cut_power(sim: Simulation, fault: Fault) -> None:
    for name, directory in fault.machine.directories.items():
        if sim.timeline.now_s - max(directory.written_s.values()) < sim.flush_s:
            sim.judge.suspects.add(name.rpartition(".")[0])
    fault.machine.cut_power(1.0 + fault.for_s * sim.random.random())


def _lose_shim(sim: Simulation, fault: Fault) -> None:
    shims = [shim for shim in fault.machine.shims.values() if shim.has_tree]
    if shims:
        sim.random.choice(shims).die()


JUMP_MAX_S: float = 86400.0
"""A wall clock is wrong by up to a day."""


def _jump_clock(sim: Simulation, fault: Fault) -> None:
    fault.machine.ahead_s += sim.random.uniform(-JUMP_MAX_S, JUMP_MAX_S)
    sim.judge.seen["clocks jumped"] += 1


def _attribute(
    owner: Callable[[Simulation, Fault], Link | Disk | Machine], **changes: Callable[[Simulation], object]
) -> Begin:
    """A fault that is nothing but some values, for a while."""

    def begin(sim: Simulation, fault: Fault) -> Callable[[], object]:
        thing = owner(sim, fault)
        before = {name: _CALM[type(thing), name] for name in changes}
        for name, draw in changes.items():
            setattr(thing, name, draw(sim))

        def end() -> None:
            for name, value in before.items():
                setattr(thing, name, value)

        return end

    return begin


def _sometimes(sim: Simulation) -> bool:
    return sim.random.random() < 0.4


def _link(sim: Simulation, fault: Fault) -> Link:
    return sim.network.links[fault.machine.id]


def _share(low: float, high: float) -> Callable[[Simulation], float]:
    return lambda sim: sim.random.uniform(low, high)


def _slow_then_cut_off(sim: Simulation, fault: Fault) -> Callable[[], object]:
    """What the agent has heard of its next task it heard late, and then nothing more for longer than a lease."""
    link = sim.network.links[fault.machine.id]
    link.late_answers_s = sim.random.uniform(2.0, 7.0)

    def cut(_: object) -> None:
        link.is_cut = True

    trap = Trap("tree", 1, cut)
    fault.machine.traps.append(trap)

    def end() -> None:
        if trap in fault.machine.traps:
            fault.machine.traps.remove(trap)
        link.late_answers_s, link.is_cut = 0.0, False

    return end


def _restart_plane(sim: Simulation, fault: Fault) -> Callable[[], object]:
    for reply in sim.plane.go_down():
        reply(0, b"")
    return lambda: sim.plane.come_up() if sim.plane.is_down else None


def _drain(sim: Simulation, fault: Fault) -> Callable[[], object]:
    sim.plane.draining.add(fault.machine.id)
    return lambda: sim.plane.draining.discard(fault.machine.id)


def _forget_agents(sim: Simulation, fault: Fault) -> None:
    sim.plane.agents.clear()


def _take_away(sim: Simulation, fault: Fault) -> None:
    held = [task.id for task in sim.plane.tasks.values() if task.status in {"assigned", "running"}]
    if held:
        sim.plane.take_away(sim.random.choice(held))


def _cancel(sim: Simulation, fault: Fault) -> None:
    wanted = [task.id for task in sim.plane.tasks.values() if not task.is_final]
    if wanted:
        sim.plane.cancel(sim.random.choice(wanted))


def _cancel_here(sim: Simulation, fault: Fault) -> None:
    sim.operate(fault.machine, "cancel")


def _stop_process(sim: Simulation, fault: Fault) -> None:
    sim.operate(fault.machine, "stop")


def _suspend(sim: Simulation, fault: Fault) -> Callable[[], object]:
    sim.operate(fault.machine, "suspend")
    return lambda: sim.operate(fault.machine, "resume")


def _collide(sim: Simulation, fault: Fault) -> None:
    """A cancellation or a stop at the very moment of the end."""
    verb = sim.random.choice(("cancel", "stop", "kill"))

    def arm(shim: object) -> None:
        if isinstance(shim, Shim):
            at_s = shim.exits_at_s + sim.random.choice((0.0, sim.random.uniform(-0.01, 0.01)))
            task_id = shim.directory.spec.task_id
            sim.timeline.at(max(at_s, sim.timeline.now_s), lambda: sim.operate(fault.machine, verb, task_id))

    fault.machine.traps.append(Trap("tree", 1, arm))


FAULTS: Final[dict[str, Begin]] = {
    "kill": _kill,
    "kill after steps": _kill_after_steps,
    "kill at a point": _kill_at_a_point,
    **{f"kill at {point}": partial(_kill_at, point) for point in _POINTS},
    "stop": _stop,
    "freeze": _freeze,
    "cut power": _cut_power,
    "lose shim": _lose_shim,
    "jump clock": _jump_clock,
    "cut off": _attribute(_link, is_cut=lambda _: True, cut_refuses=_sometimes),
    "lose requests": _attribute(_link, drop_request=_share(0.1, 0.7)),
    "lose answers": _attribute(_link, drop_answer=_share(0.1, 0.7)),
    "duplicate": _attribute(_link, duplicate=_share(0.1, 0.6)),
    "slow network": _attribute(_link, slowness_s=_share(1.0, 12.0)),
    "slow, then cut off": _slow_then_cut_off,
    "overload": _attribute(_link, overload=_share(0.2, 1.0)),
    "hiccups": _attribute(_link, hiccup=_share(0.1, 0.7)),
    "garble": _attribute(_link, garble=_share(0.1, 0.7)),
    "wrong token": _attribute(_link, unauthorized=_share(0.3, 1.0)),
    "lies": _attribute(_link, lie=_share(0.02, 0.2)),
    "restart plane": _restart_plane,
    "forget agents": _forget_agents,
    "drain": _drain,
    "full disk": _attribute(lambda _, fault: fault.machine.disk, is_full=lambda _: True),
    "slow disk": _attribute(lambda _, fault: fault.machine.disk, slowness_s=_share(0.1, 5.0)),
    "failing launches": _attribute(lambda _, fault: fault.machine, launch_failures=_share(0.2, 1.0)),
    "broken host": _attribute(lambda _, fault: fault.machine, is_broken=lambda _: True),
    "take away": _take_away,
    "cancel": _cancel,
    "cancel here": _cancel_here,
    "stop process": _stop_process,
    "suspend": _suspend,
    "collide": _collide,
}

LONG: Final = frozenset({"slow, then cut off"})
"""These mean nothing unless they outlast a lease."""

USUAL: Final = tuple(kind for kind in FAULTS if not kind.startswith("kill at ") or kind == "kill at a point")
