"""What must hold at every step of every schedule.

Looked at where it could break: at each start and end of a tree, each change of a stored state, each request and answer,
each end of a lease; and as a whole when everything has come to rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from remotegpu_schemas.attempt import EndedBy, RunEnded
from remotegpu_schemas.states import (
    RUN_TRANSITIONS,
    TASK_TRANSITIONS,
    Cause,
    RunState,
    TaskState,
)
from remotegpu_schemas.wire import JsonObject

if TYPE_CHECKING:
    from tests.simulation.machine import Machine, Process
    from tests.simulation.plane import Plane, PlaneAttempt, PlaneTask
    from tests.simulation.processes import Shim

_TASK_MOVES: Final = {(str(state), str(after)) for (state, _), after in TASK_TRANSITIONS.items()}
_RUN_MOVES: Final = {(str(state), str(after)) for (state, _), after in RUN_TRANSITIONS.items()}
_FIRST: Final = {
    "attempts": {str(TaskState.PENDING), str(TaskState.ASSIGNED)},
    "runs": {str(RunState.STARTING)},
}
_MOVES: Final = {"attempts": _TASK_MOVES, "runs": _RUN_MOVES}
_AFTERMATH_MS: Final = 30_000
"""So long after the mending something may still be on its way."""
_CAUSES_OF: Final = {
    EndedBy.EXIT: {Cause.SUCCEEDED, Cause.EXIT_CODE, Cause.SIGNAL},
    EndedBy.STOP: {Cause.CANCELLED, Cause.STOPPED, Cause.LEASE_LOST, Cause.SUPERSEDED},
    EndedBy.TIMEOUT: {Cause.TIMED_OUT},
    EndedBy.LEASE: {Cause.LEASE_LOST},
    EndedBy.LAUNCH: {Cause.LAUNCH_FAILED},
    EndedBy.ABANDONED: {Cause.AGENT_LOST, Cause.CANCELLED, Cause.LEASE_LOST, Cause.STOPPED},
}


class Violation(Exception):
    """A promise was broken; the message says which, and by whom."""


@dataclass
class _Asked:
    """A claim as its sender sees it."""

    process: Process
    has_answer: bool = False
    was_given: bool = False


@dataclass
class Judge:
    """Watches one schedule. `violated` raises, and what is raised inside of the agent is kept all the same."""

    plane: Plane = field(init=False)
    machines: list[Machine] = field(default_factory=list)
    say: Callable[..., None] = lambda *_: None
    violation: str | None = None
    healed_ms: int | None = None
    """When everything was mended, by the plane's clock."""
    gives_up_promise_2: bool = False
    """`lease.on_unreachable: continue`: a run may outlive its lease, and another one of its task may begin."""
    seen: Counter[str] = field(default_factory=Counter)
    """How often what happened: a test of a fault has to see that fault."""
    local_tasks: dict[str, str] = field(default_factory=dict)
    """Local tasks whose submission was acknowledged, and on which machine."""
    suspects: set[str] = field(default_factory=set)
    """Attempts whose record lost lines in a power cut."""
    _trees: dict[str, list[tuple[Machine, Shim]]] = field(default_factory=dict)
    _ends: dict[str, list[RunEnded | None]] = field(default_factory=dict)
    _heard: set[tuple[str, str, int | None]] = field(default_factory=set)
    _refused: set[tuple[str, str]] = field(default_factory=set)
    _asked: dict[str, _Asked] = field(default_factory=dict)
    _last_request: dict[int, str] = field(default_factory=dict)

    def violated(self, what: str) -> None:
        """The first one counts."""
        if self.violation is None:
            self.violation = what
            self.say("judge", f"VIOLATED: {what}")

    # --- processes ---

    def tree_started(self, machine: Machine, shim: Shim) -> None:
        """At most one tree per task, within its lease, and none beyond the host's capacity."""
        spec = shim.directory.spec
        self.say(machine.id, "tree starts", shim.directory.name)
        self.seen["trees"] += 1
        trees = self._trees.setdefault(spec.task_id, [])
        for other, living in trees:
            ids = spec.attempt_id, living.directory.spec.attempt_id
            may_be_two = self.gives_up_promise_2 or any(self._was_taken_away(each) for each in ids)
            if not may_be_two or other is machine:
                self.violated(
                    f"two process trees of task {spec.task_id}: {shim.directory.name} on {machine.id}, "
                    f"{living.directory.name} on {other.id}"
                )
        trees.append((machine, shim))
        attempt = self.plane.attempts.get(spec.attempt_id)
        if attempt is not None and not self._holds(attempt):
            self.violated(f"{shim.directory.name} was started after its lease")
        self._check_capacity(machine)

    def _holds(self, attempt: PlaneAttempt) -> bool:
        """Whether the plane's lease still holds, or was not this agent's to keep."""
        if attempt.was_taken_away or self.plane.is_down:
            return True
        task = attempt.task
        return task.attempt is attempt and attempt.state.is_open and (task.lease_expires_ms or 0) > self.plane.now_ms

    def _was_taken_away(self, attempt_id: str) -> bool:
        attempt = self.plane.attempts.get(attempt_id)
        return attempt is not None and attempt.was_taken_away

    def _check_capacity(self, machine: Machine) -> None:
        """Slots and CPUs; GPUs by their UUIDs belong here as soon as runs have any."""
        living = [shim.directory.spec for shim in machine.shims.values() if shim.has_tree]
        slots = machine.config.capacity.max_concurrent or 0
        cpus = sum(spec.run_limits.cpus or 0.0 for spec in living)
        if len(living) > slots or cpus > (machine.config.capacity.cpus or 0.0) + 1e-6:
            self.violated(f"{machine.id} runs {len(living)} trees on {cpus:g} CPUs: more than it has")

    def tree_ended(self, machine: Machine, shim: Shim) -> None:
        """The tree is empty."""
        spec, ended = shim.directory.spec, shim.directory.ended
        self.say(machine.id, "tree ends", shim.directory.name, ended.ended_by if ended else "without a word")
        self.seen["ended by their lease"] += ended is not None and ended.ended_by is EndedBy.LEASE
        trees = self._trees[spec.task_id]
        trees[:] = [each for each in trees if each[1] is not shim]
        self._ends.setdefault(spec.attempt_id, []).append(ended)

    # --- the plane ---

    def claimed(self, attempt: PlaneAttempt) -> None:
        """The plane has given a task away."""
        self.say("plane", "gives", attempt.task.id, "as", attempt.id, "to", attempt.agent_id)
        asked = self._asked.get(attempt.request_id)
        if asked is not None:
            asked.was_given = True

    def lapsed(self, attempt: PlaneAttempt) -> None:
        """A lease has ended: its tree is dead by now (promise 2)."""
        self.say("plane", "lease ends of", attempt.id)
        self.seen["leases lapsed"] += 1
        if self.healed_ms is not None and attempt.claimed_at_ms > self.healed_ms + _AFTERMATH_MS:
            self._check_lapse_without_fault(attempt)
        for machine, shim in self._trees.get(attempt.task.id, []):
            if shim.directory.spec.attempt_id == attempt.id and not self.gives_up_promise_2:
                self.violated(f"{shim.directory.name} on {machine.id} lives on after the end of its lease")

    def _check_lapse_without_fault(self, attempt: PlaneAttempt) -> None:
        """Only what its agent has, and could not start before the lease's end, may lapse when all is well.

        (Its slot was taken by a retry while the claim was on its way, or the long poll has outlasted the lease.)
        """
        machine = next(each for each in self.machines if each.id == attempt.machine_id)
        if not machine.disk.count("SELECT count(*) FROM attempts WHERE attempt_id = ? AND run_no = 0", attempt.id):
            self.violated(f"{attempt.id} has lapsed, and all was well since long before it was claimed")

    def taken_away(self, attempt: PlaneAttempt) -> None:
        """An operator of the plane has given the task to others while this attempt may still run."""
        self.say("plane", "takes away", attempt.task.id, "from", attempt.id)
        self.seen["taken away"] += 1

    def accepted(self, attempt: PlaneAttempt, status: str, body: JsonObject) -> None:
        """A result counts: from the task's last attempt, once, and it is what has happened."""
        self.say("plane", "accepts", attempt.id, status, body.get("cause"))
        self.seen["results accepted"] += 1
        task = attempt.task
        if task.attempt is not attempt:
            self.violated(
                f"the result of {attempt.id} was accepted; the task is with {task.attempt and task.attempt.id}"
            )
        if task.completions != 1:
            self.violated(f"task {task.id} was completed {task.completions} times")
        self._check_truth(attempt.id, body)

    def _check_truth(self, attempt_id: str, body: JsonObject) -> None:
        ends = self._ends.get(attempt_id, [])
        cause = Cause(body["cause"])
        if cause is Cause.SUCCEEDED and not any(_succeeded(ended) for ended in ends):
            self.violated(f"{attempt_id} is reported as succeeded, and no process of it has")
        if not ends or ends[-1] is None or attempt_id in self.suspects:
            return
        ended = ends[-1]
        if cause in {Cause.AGENT_LOST, Cause.HOST_REBOOTED, Cause.LEASE_LOST, Cause.CANCELLED, Cause.STOPPED}:
            if _succeeded(ended) and body.get("runs") == len(ends) and cause is not Cause.LEASE_LOST:
                self.violated(f"{attempt_id} has succeeded, and is reported as {cause}")
            return
        if cause is Cause.LAUNCH_FAILED:
            return
        if cause is Cause.HOST_SHUTDOWN and ended.ended_by is EndedBy.STOP:
            return  # a stop that could not be stored, and then another boot: nobody can tell the two apart
        if cause not in _CAUSES_OF[ended.ended_by]:
            self.violated(f"{attempt_id} was ended by {ended.ended_by}, and is reported as {cause}")
        elif cause is Cause.EXIT_CODE and ended.exit_code != body["exit_code"]:
            self.violated(f"{attempt_id} exited with {ended.exit_code}, and is reported with {body['exit_code']}")

    def task_ended(self, task: PlaneTask) -> None:
        """The plane knows how it ended."""
        self.say("plane", "task ends", task.id, task.status)

    # --- requests ---

    def sent(self, process: Process, path: str, body: JsonObject) -> None:
        """What is told is on disk; a claim is asked for until it is answered."""
        if path == "/tasks/claim":
            self._claim_sent(process, body["request_id"])
        kind = path.rpartition("/")[2]
        if kind in {"start", "progress", "complete", "release"}:
            disk, attempt_id = process.machine.disk, body["attempt_id"]
            query = "SELECT count(*) FROM outbox WHERE attempt_id = ? AND kind = ? AND is_dead = 0"
            if not disk.count(query, attempt_id, kind):
                self.violated(f"{process.machine_id} sends the {kind} of {attempt_id} before it is on its disk")
            self.say(process.machine_id, "sends", kind, attempt_id)

    def _claim_sent(self, process: Process, request_id: str) -> None:
        last_id = self._last_request.get(id(process))
        if last_id is not None and last_id != request_id:
            last = self._asked[last_id]
            if last.was_given and not last.has_answer and not self.plane.is_deployed:
                self.violated(f"{process.machine_id} asks anew, and has not heard what it was given for {last_id}")
        self._last_request[id(process)] = request_id
        self._asked.setdefault(request_id, _Asked(process))

    def arrived(self, process: Process, path: str, body: JsonObject) -> None:
        """The plane has a request."""
        kind, name = path.rpartition("/")[2], body.get("attempt_id") or body.get("request_id") or ""
        self.say("plane", "hears", path, name)
        if kind in {"claim", "start", "complete"}:
            key = (kind, name, body.get("run_no"))
            self.seen[f"{kind}s repeated"] += key in self._heard
            self._heard.add(key)

    def answered(self, process: Process, path: str, body: JsonObject, status: int) -> None:
        """An answer has come back to its sender."""
        self.say(process.machine_id, "hears", status, "to", path)
        if status in {400, 404, 409, 410}:
            self._refused.add((body.get("attempt_id", ""), path.rpartition("/")[2]))
        if path == "/tasks/claim" and status == 200:
            self._asked[body["request_id"]].has_answer = True

    # --- the store ---

    def moved(self, machine: str, table: str, attempt_id: str, before: str | None, after: str) -> None:
        """States move only along the table."""
        self.say(machine, table, attempt_id, before, "->", after)
        if before is None:
            if after not in _FIRST[table]:
                self.violated(f"{table} of {machine}: {attempt_id} begins as {after}")
        elif (before, after) not in _MOVES[table]:
            self.violated(f"{table} of {machine}: {attempt_id} goes from {before} to {after}")

    def agent_ended(self, machine: Machine, process: Process) -> None:
        """Nothing of it has failed."""
        self.say(machine.id, "agent is gone")
        self.seen["agents killed"] += 1
        self._check_failures(machine, process)

    def _check_failures(self, machine: Machine, process: Process) -> None:
        if process.agent is not None and process.agent.failures:
            self.violated(f"parts of the agent on {machine.id} have failed: {process.agent.failures}")

    # --- the end ---

    def open_matters(self) -> list[str]:
        """What has not come to rest: tasks that have not ended, reports that wait, processes that live."""
        found = [f"task {task.id} is {task.status}" for task in self.plane.tasks.values() if not task.is_final]
        for machine in self.machines:
            found += [f"{machine.id}: {name} lives" for name in machine.shims]
            disk = machine.disk
            open_rows = disk.db.execute(
                "SELECT attempt_id, state FROM attempts WHERE state NOT IN ('completed', 'failed', 'cancelled')"
            ).fetchall()
            found += [f"{machine.id}: attempt {row['attempt_id']} is {row['state']}" for row in open_rows]
            reports = disk.db.execute("SELECT attempt_id, kind, last_error FROM outbox WHERE is_dead = 0").fetchall()
            found += [f"{machine.id}: {row['kind']} of {row['attempt_id']} waits: {row[2]}" for row in reports]
            agent = machine.process.agent if machine.process is not None else None
            if agent is None:
                found.append(f"{machine.id} has no agent")
            else:
                found += [f"{machine.id}: {attempt_id} is held" for attempt_id in agent.executor.active]
        return found

    def check_rest(self) -> None:
        """When everything has come to rest, nothing is lost, and both sides say the same."""
        for machine in self.machines:
            if machine.process is not None:
                self._check_failures(machine, machine.process)
            self._check_attempts(machine)
        for task_id, machine_id in self.local_tasks.items():
            machine = next(each for each in self.machines if each.id == machine_id)
            if not machine.disk.count("SELECT count(*) FROM attempts WHERE task_id = ?", task_id):
                self.violated(f"local task {task_id} was acknowledged by {machine_id}, and is lost")

    def _check_attempts(self, machine: Machine) -> None:
        for row in machine.disk.db.execute("SELECT * FROM outbox WHERE is_dead = 1"):
            self._check_dead_letter(machine, row["attempt_id"], row["kind"])
        for row in machine.disk.db.execute("SELECT attempt_id, state, cause, exit_code FROM attempts"):
            attempt = self.plane.attempts.get(row["attempt_id"])
            result: dict[str, Any] | None = attempt.result if attempt is not None else None
            if result is not None and (result["cause"], result["exit_code"]) != (row["cause"], row["exit_code"]):
                self.violated(
                    f"{machine.id} says that {row['attempt_id']} ended by {row['cause']}, the plane {result['cause']}"
                )

    def _check_dead_letter(self, machine: Machine, attempt_id: str, kind: str) -> None:
        """Only what the plane has refused may be one."""
        if (attempt_id, kind) not in self._refused:
            self.violated(f"{machine.id}: the {kind} of {attempt_id} is a dead letter, and was never refused")


def _succeeded(ended: RunEnded | None) -> bool:
    return ended is not None and ended.ended_by is EndedBy.EXIT and ended.exit_code == 0
