"""A control plane in memory: strict fencing, idempotent claims, leases that lapse, as protocol.md says.

Or as deployed planes do, whose claims are not idempotent, who tell no lease's end, and renew only what has started. The
same decisions as `examples/control_plane/store`, without its database, which is too slow for thousands of schedules a
minute; `test_plane.py` holds the two against each other, call by call.

Long, because it is a whole control plane.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from typing import Any, Protocol

from remotegpu_schemas import limits
from remotegpu_schemas.errors import CODES, Code
from remotegpu_schemas.states import Cause
from remotegpu_schemas.wire import JsonObject, format_time
from tests.simulation.timeline import Timeline, Timer

EPOCH_S = 1_770_000_000.0
_LEASE_MAX_S = 86_400
_ADDITIONS = frozenset({"resources", "grace_period_sec", "lease_ttl_sec", "renew_interval_sec"})
_FINAL = frozenset({"completed", "failed", "cancelled"})

Reply = Callable[[int, bytes], None]


class AttemptState(enum.StrEnum):
    """Where an attempt is, as the plane sees it."""

    CLAIMED = "claimed"
    STARTED = "started"
    COMPLETED = "completed"
    RELEASED = "released"
    LAPSED = "lapsed"
    GIVEN_UP = "given_up"

    @property
    def is_open(self) -> bool:
        """It may still bring a result."""
        return self in {AttemptState.CLAIMED, AttemptState.STARTED}


@dataclass
class PlaneTask:
    """A task; the attempt is the latest one."""

    id: str
    spec: JsonObject
    machine_id: str | None
    priority: int
    seq: int
    created_at_ms: int
    status: str = "pending"
    attempt: PlaneAttempt | None = None
    lease_expires_ms: int | None = None
    is_cancel_requested: bool = False
    lapses: int = 0
    ended_at_ms: int | None = None
    completions: int = 0

    @property
    def is_final(self) -> bool:
        """It has ended."""
        return self.status in _FINAL


@dataclass
class PlaneAttempt:
    """One claim of a task."""

    id: str
    task: PlaneTask
    agent_id: str
    machine_id: str
    request_id: str
    claimed_at_ms: int
    ttl_ms: int
    state: AttemptState = AttemptState.CLAIMED
    started_at_ms: int | None = None
    run_no: int | None = None
    result: JsonObject | None = None
    was_taken_away: bool = False
    """An operator has given the task to others while its lease held."""


class Witness(Protocol):
    """Who is told what the plane does."""

    def claimed(self, attempt: PlaneAttempt) -> None: ...
    def lapsed(self, attempt: PlaneAttempt) -> None: ...
    def taken_away(self, attempt: PlaneAttempt) -> None: ...
    def accepted(self, attempt: PlaneAttempt, status: str, body: JsonObject) -> None: ...
    def task_ended(self, task: PlaneTask) -> None: ...


class _Refused(Exception):
    def __init__(self, code: Code | int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class _Poll:
    """A claim that is held until there is something."""

    machine_id: str
    body: JsonObject
    reply: Reply
    timer: Timer | None = None


@dataclass
class Plane:
    """The plane. `is_down` refuses every connection; leases do not lapse meanwhile, and hold for a while afterwards."""

    timeline: Timeline
    witness: Witness
    new_id: Callable[[], str]
    lease_ttl_s: float = 60.0
    attempts_max: int = 1000
    offers_release: bool = True
    is_deployed: bool = False
    """As deployed planes do (protocol.md); the two that follow matter only then."""
    repeats_held: bool = True
    hides_lease: bool = False
    ahead_s: float = 0.0
    """How far its clock is ahead of the schedule's."""
    is_down: bool = False
    tasks: dict[str, PlaneTask] = field(default_factory=dict)
    attempts: dict[str, PlaneAttempt] = field(default_factory=dict)
    agents: set[tuple[str, str]] = field(default_factory=set)
    draining: set[str] = field(default_factory=set)
    open_tasks: int = 0
    _polls: list[_Poll] = field(default_factory=list)

    @property
    def now_ms(self) -> int:
        """The plane's clock."""
        return int((EPOCH_S + self.timeline.now_s + self.ahead_s) * 1000)

    def headers(self) -> dict[str, str]:
        """What comes with every answer."""
        return {"Date": _date(self.now_ms // 1000)}

    # --- for operators ---

    def submit(self, spec: JsonObject, machine_id: str | None = None) -> PlaneTask:
        """Add a task and wake who waits for one."""
        task = PlaneTask(spec["id"], spec, machine_id, int(spec.get("priority", 5)), len(self.tasks) + 1, self.now_ms)
        self.tasks[task.id] = task
        self.open_tasks += 1
        self._ring()
        return task

    def cancel(self, task_id: str) -> None:
        """Cancel a task, or ask its agent to."""
        task = self.tasks.get(task_id)
        if task is None or task.is_final or task.is_cancel_requested:
            return
        task.is_cancel_requested = True
        if task.status == "pending":
            self._end(task, "cancelled")

    def take_away(self, task_id: str) -> None:
        """Give a task that somebody holds to others, at once."""
        task = self.tasks.get(task_id)
        attempt = task.attempt if task is not None else None
        if task is not None and attempt is not None and attempt.state.is_open and not task.is_final:
            attempt.was_taken_away = True
            self.witness.taken_away(attempt)
            self._give_back(attempt, AttemptState.LAPSED)

    def go_down(self) -> list[Reply]:
        """Stop: what was held is dropped, and returned."""
        self.is_down = True
        dropped = [poll.reply for poll in self._polls]
        for poll in self._polls:
            if poll.timer is not None:
                poll.timer.cancel()
        self._polls.clear()
        return dropped

    def come_up(self) -> None:
        """Serve again; every lease holds for a while, since nobody could renew it."""
        self.is_down = False
        until_ms = self.now_ms + int(self.lease_ttl_s * 1000)
        for task in self.tasks.values():
            if task.lease_expires_ms is not None:
                task.lease_expires_ms = max(task.lease_expires_ms, until_ms)
                self._watch(task)

    # --- for agents ---

    def call(self, machine_id: str, path: str, body: JsonObject, reply: Reply) -> None:
        """Answer a request, now or, if it is a long poll, later."""
        if path == "/tasks/claim":
            self._claim(_Poll(machine_id, body, reply))
            return
        parts = path.split("/")
        data: JsonObject | None
        try:
            match parts[1:]:
                case ["register"]:
                    data = self._register(machine_id, body)
                case ["heartbeat"]:
                    data = self._heartbeat(machine_id, body)
                case ["tasks", task_id, "start"]:
                    data = self._start(self._look_up(machine_id, task_id, body), body)
                case ["tasks", task_id, "lease", "renew"]:
                    data = self._renew(self._look_up(machine_id, task_id, body), body)
                case ["tasks", task_id, "progress"]:
                    self._fence(self._look_up(machine_id, task_id, body))
                    data = {"task_id": task_id, "progress": body["percent"]}
                case ["tasks", task_id, "complete"]:
                    data = self._complete(self._look_up(machine_id, task_id, body), body)
                case ["tasks", task_id, "release"] if self.offers_release and not self.is_deployed:
                    data = self._release(self._look_up(machine_id, task_id, body))
                case _:
                    reply(404, b"404: Not Found")
                    return
        except _Refused as refusal:
            code = refusal.code
            reply(CODES[code].http_status if isinstance(code, Code) else code, envelope(code, str(refusal)))
            return
        reply(200, envelope(0, "ok", data))

    def _register(self, machine_id: str, body: JsonObject) -> JsonObject:
        self.agents.add((body["agent_id"], machine_id))
        if self.is_deployed:
            return {"status": "online", "machine_id": machine_id}
        features = ["release"] if self.offers_release else []
        return {"status": "registered", "machine_id": machine_id, "features": features}

    def _heartbeat(self, machine_id: str, body: JsonObject) -> JsonObject | None:
        agent_id = body["agent_id"]
        if self.is_deployed:
            return None
        if (agent_id, machine_id) not in self.agents:
            return {"status": "unknown", "needs_collect": True}
        cancelled = [
            {"task_id": task.id, "attempt_id": task.attempt.id}
            for task in self.tasks.values()
            if task.is_cancel_requested
            and task.status in {"assigned", "running"}
            and task.attempt is not None
            and task.attempt.agent_id == agent_id
        ]
        data: JsonObject = {"status": "ok", "cancelled": cancelled}
        return data | {"drain": True} if machine_id in self.draining else data

    def _claim(self, poll: _Poll) -> None:
        tasks = self._claimed(poll)
        wait_s = 0 if self.is_deployed else poll.body.get("wait_sec") or 0
        if tasks or not wait_s:
            poll.reply(200, envelope(0, "ok", {"tasks": tasks}))
            return
        self._polls.append(poll)
        poll.timer = self.timeline.after(wait_s, lambda: self._give_up_waiting(poll))

    def _give_up_waiting(self, poll: _Poll) -> None:
        self._polls.remove(poll)
        poll.reply(200, envelope(0, "ok", {"tasks": []}))

    def _ring(self) -> None:
        for poll in list(self._polls):
            tasks = self._claimed(poll)
            if tasks:
                self._polls.remove(poll)
                if poll.timer is not None:
                    poll.timer.cancel()
                poll.reply(200, envelope(0, "ok", {"tasks": tasks}))

    def _claimed(self, poll: _Poll) -> list[JsonObject]:
        """A repeated request gets what it got the first time, as far as that is still its own."""
        body = poll.body
        agent_id, request_id = body["agent_id"], body["request_id"]
        before = [a for a in self.attempts.values() if a.agent_id == agent_id and a.request_id == request_id]
        if before and not self.is_deployed:
            return [self._claimed_task(attempt) for attempt in self._live(before)]
        slots = body["limit"] if self.is_deployed else (body.get("capacity") or {}).get("slots", body["limit"])
        count = min(body["limit"], slots, limits.CLAIM_MAX_TASKS)
        held = []
        if self.is_deployed and self.repeats_held:
            held = self._live([a for a in self.attempts.values() if a.agent_id == agent_id])
        ready = [t for t in self.tasks.values() if t.status == "pending" and t.machine_id in {None, poll.machine_id}]
        ready.sort(key=lambda task: (task.priority, task.seq))
        given = [self._assign(task, poll) for task in ready[: max(count, 0)]]
        return [self._claimed_task(attempt) for attempt in held + given]

    def _live(self, attempts: list[PlaneAttempt]) -> list[PlaneAttempt]:
        """Those that hold their tasks; in the order of the tasks."""
        now_ms = self.now_ms
        live = [a for a in attempts if a.task.attempt is a and (a.task.lease_expires_ms or 0) > now_ms]
        return sorted(live, key=lambda attempt: (attempt.task.priority, attempt.task.seq))

    def _assign(self, task: PlaneTask, poll: _Poll) -> PlaneAttempt:
        agent_id, request_id = poll.body["agent_id"], poll.body["request_id"]
        ttl_ms = int((task.spec.get("lease_ttl_sec") or self.lease_ttl_s) * 1000)
        attempt = PlaneAttempt(self.new_id(), task, agent_id, poll.machine_id, request_id, self.now_ms, ttl_ms)
        self.attempts[attempt.id] = attempt
        task.attempt, task.status, task.lease_expires_ms = attempt, "assigned", self.now_ms + ttl_ms
        self._watch(task)
        self.witness.claimed(attempt)
        return attempt

    def _claimed_task(self, attempt: PlaneAttempt) -> JsonObject:
        task = attempt.task
        if self.is_deployed:
            spec = {key: value for key, value in task.spec.items() if key not in _ADDITIONS}
            told = {
                "machine_id": attempt.machine_id,
                "attempt_id": attempt.id,
                "assigned_at": _time(attempt.claimed_at_ms) or "",
            }
            if not self.hides_lease:
                told["lease_expires_at"] = _time(task.lease_expires_ms) or ""
            return spec | told
        return {
            "renew_interval_sec": attempt.ttl_ms / 3000,
            **task.spec,
            "status": "assigned",
            "machine_id": attempt.machine_id,
            "assigned_agent_id": attempt.agent_id,
            "attempt_id": attempt.id,
            "assigned_at": _time(attempt.claimed_at_ms),
            "created_at": _time(task.created_at_ms),
            "lease_expires_at": _time(task.lease_expires_ms),
            "lease_ttl_sec": attempt.ttl_ms / 1000,
        }

    def _look_up(self, machine_id: str, task_id: str, body: JsonObject) -> PlaneAttempt:
        task, attempt = self.tasks.get(task_id), self.attempts.get(body["attempt_id"])
        if task is None:
            raise _Refused(Code.TASK_NOT_FOUND, f"there is no task {task_id}")
        if attempt is None or attempt.task is not task:
            raise _superseded(task)
        if attempt.agent_id != body["agent_id"] or attempt.machine_id != machine_id:
            raise _Refused(Code.ATTEMPT_MISMATCH, "the attempt was not given to this agent")
        return attempt

    def _refusal(self, attempt: PlaneAttempt) -> _Refused | None:
        """Why this attempt may not speak for its task any more."""
        task = attempt.task
        if task.attempt is not attempt or attempt.state is AttemptState.RELEASED:
            return _superseded(task)
        if task.is_final:
            return _Refused(Code.TASK_FINISHED, f"task {task.id} has ended: {task.status}")
        if not attempt.state.is_open or task.lease_expires_ms is None or task.lease_expires_ms <= self.now_ms:
            return _Refused(Code.LEASE_EXPIRED, f"the lease of attempt {attempt.id} has ended")
        return None

    def _fence(self, attempt: PlaneAttempt) -> None:
        refusal = self._refusal(attempt)
        if refusal is not None:
            raise refusal

    def _start(self, attempt: PlaneAttempt, body: JsonObject) -> JsonObject:
        self._fence(attempt)
        run_no = body.get("run_no", 1)
        if attempt.run_no is None or run_no > attempt.run_no:
            attempt.started_at_ms = self.now_ms if attempt.started_at_ms is None else attempt.started_at_ms
            attempt.state, attempt.run_no = AttemptState.STARTED, run_no
            if attempt.task.status == "assigned":
                attempt.task.status = "running"
        return {
            "task_id": attempt.task.id,
            "status": "running",
            "attempt_id": attempt.id,
            "started_at": _time(attempt.started_at_ms),
        }

    def _renew(self, attempt: PlaneAttempt, body: JsonObject) -> JsonObject:
        self._fence(attempt)
        task = attempt.task
        if self.is_deployed and attempt.state is not AttemptState.STARTED:
            raise _Refused(409, "lease not renewed")
        extended_ms = self.now_ms + min(body["extend_sec"], _LEASE_MAX_S) * 1000
        task.lease_expires_ms = max(extended_ms, task.lease_expires_ms or 0)
        self._watch(task)
        if self.is_deployed:
            return {"task_id": task.id, "renewed": True}
        return {
            "task_id": task.id,
            "lease_expires_at": _time(task.lease_expires_ms),
            "cancel_requested": task.is_cancel_requested,
        }

    def _complete(self, attempt: PlaneAttempt, body: JsonObject) -> JsonObject:
        task = attempt.task
        if attempt.state is AttemptState.COMPLETED:
            return _ended(task)
        refusal = self._refusal(attempt)
        is_late = refusal is not None and refusal.code is Code.LEASE_EXPIRED
        knows_cause = not self.is_deployed
        if knows_cause and body.get("cause") == Cause.LEASE_LOST and (refusal is None or is_late):
            ended_at_ms = task.ended_at_ms
            if attempt.state.is_open:
                self._give_back(attempt, AttemptState.GIVEN_UP)
            elif attempt.state is AttemptState.LAPSED:
                attempt.state = AttemptState.GIVEN_UP
            return _ended(task) | {"ended_at": _time(ended_at_ms)}
        if refusal is not None and not is_late:
            raise refusal
        status = (knows_cause and body.get("status")) or ("completed" if body["exit_code"] == 0 else "failed")
        task.completions += 1
        attempt.state, attempt.result = AttemptState.COMPLETED, body
        self._end(task, status)
        self.witness.accepted(attempt, status, body)
        return _ended(task)

    def _release(self, attempt: PlaneAttempt) -> JsonObject:
        if attempt.state is not AttemptState.RELEASED:
            self._fence(attempt)
            if attempt.state is AttemptState.STARTED:
                raise _Refused(Code.INVALID_PARAMETERS, "the attempt has started; it can only be completed")
            self._give_back(attempt, AttemptState.RELEASED)
        return {"task_id": attempt.task.id, "status": attempt.task.status}

    # --- leases ---

    def _watch(self, task: PlaneTask) -> None:
        """Look when the lease ends."""
        expires_ms = task.lease_expires_ms
        if expires_ms is not None:
            at_s = expires_ms / 1000 - EPOCH_S - self.ahead_s
            self.timeline.at(max(at_s, self.timeline.now_s), lambda: self._reap(task, expires_ms))

    def _reap(self, task: PlaneTask, expires_ms: int) -> None:
        attempt = task.attempt
        if self.is_down or task.lease_expires_ms != expires_ms or attempt is None or not attempt.state.is_open:
            return
        self.witness.lapsed(attempt)
        self._give_back(attempt, AttemptState.LAPSED)

    def _give_back(self, attempt: PlaneAttempt, state: AttemptState) -> None:
        """The attempt is over without a result: the task can be claimed again, or ends if that was asked or due."""
        task = attempt.task
        attempt.state, task.lease_expires_ms = state, None
        task.lapses += state is not AttemptState.RELEASED
        if task.is_cancel_requested:
            self._end(task, "cancelled")
        elif state is not AttemptState.RELEASED and task.lapses >= self.attempts_max:
            self._end(task, "failed")
        else:
            task.status = "pending"
            self.timeline.at(self.timeline.now_s, self._ring)

    def _end(self, task: PlaneTask, status: str) -> None:
        self.open_tasks -= not task.is_final
        task.status, task.ended_at_ms, task.lease_expires_ms = status, self.now_ms, None
        self.witness.task_ended(task)


def envelope(code: int, message: str, data: Any = None) -> bytes:
    """An answer's body."""
    return json.dumps({"code": int(code), "message": message, "data": data}).encode()


def _superseded(task: PlaneTask) -> _Refused:
    if task.is_final:
        return _Refused(Code.TASK_FINISHED, f"task {task.id} has ended: {task.status}")
    return _Refused(Code.ATTEMPT_MISMATCH, f"not the present attempt of task {task.id}")


def _ended(task: PlaneTask) -> JsonObject:
    return {"task_id": task.id, "status": task.status, "ended_at": _time(task.ended_at_ms)}


def _time(at_ms: int | None) -> str | None:
    return None if at_ms is None else format_time(at_ms / 1000)


@lru_cache(maxsize=1024)
def _date(epoch_s: int) -> str:
    return formatdate(epoch_s, usegmt=True)
