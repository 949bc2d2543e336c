"""How the plane speaks to agents: what both dialects have in common, and the dialect of protocol.md.

The other one is `compat`. Handlers know neither.
"""

from __future__ import annotations

from typing import Protocol

from aiohttp import web

from control_plane.answers import Bare, answer
from control_plane.requests import ClaimBody, Completion, parse
from control_plane.store.attempts import Renewed
from control_plane.store.claims import ClaimedTask
from control_plane.store.tables import Status
from remotegpu_schemas.wire import JsonObject, format_time


class Dialect(Protocol):
    """What differs between planes."""

    offers_release: bool
    offers_uploads: bool
    is_idempotent: bool
    repeats_held: bool

    def success(self, data: JsonObject | None) -> web.Response:
        """An answer with its data."""
        ...

    def failure(self, code: int, status: int, message: str) -> web.Response:
        """A refusal."""
        ...

    def time(self, at_ms: int | None) -> str | None:
        """A time."""
        ...

    def check_machine(self, claimed: str, actual: str) -> bool:
        """Whether tasks may be given to a machine that calls itself so; may raise Bare."""
        ...

    def read_claim(self, body: JsonObject) -> ClaimBody:
        """What a claim asks for."""
        ...

    def check_heartbeat(self, body: JsonObject) -> None:
        """Raises Bare for a heartbeat that is refused whole."""
        ...

    def read_completion(self, body: JsonObject) -> tuple[Status, JsonObject]:
        """How the task ended, and the result that is kept."""
        ...

    def registered(self, machine_id: str) -> JsonObject | None:
        """The data of a register's answer."""
        ...

    def heartbeat(self, cancelled: list[tuple[str, str]] | None, /) -> JsonObject | None:
        """The data of a heartbeat's answer; None means that the agent is not registered."""
        ...

    def claimed_task(self, task: ClaimedTask) -> JsonObject:
        """One task of a claim's answer."""
        ...

    def renewed(self, task_id: str, renewed: Renewed | None) -> JsonObject:
        """The data of a renewal's answer; may raise Bare."""
        ...


class Strict:
    """protocol.md, with all of its additions that this plane has."""

    offers_release = True
    is_idempotent = True
    repeats_held = False

    def __init__(self, *, offers_uploads: bool = False) -> None:
        self.offers_uploads = offers_uploads

    def success(self, data: JsonObject | None) -> web.Response:
        """Code 0."""
        return answer({"code": 0, "message": "ok", "data": data if data is not None else {}})

    def failure(self, code: int, status: int, message: str) -> web.Response:
        """The code, with its HTTP status."""
        return answer({"code": code, "message": message, "data": None}, status)

    def time(self, at_ms: int | None) -> str | None:
        """Milliseconds and Z; null is "not set"."""
        return None if at_ms is None else format_time(at_ms / 1000)

    def check_machine(self, claimed: str, actual: str) -> bool:
        """A token speaks for its own machine only."""
        if claimed != actual:
            raise Bare(403, f"this token was given to machine {actual}, not to {claimed}")
        return True

    def read_claim(self, body: JsonObject) -> ClaimBody:
        """As it stands."""
        return parse(ClaimBody, body)

    def check_heartbeat(self, body: JsonObject) -> None:
        """All of them will do."""

    def read_completion(self, body: JsonObject) -> tuple[Status, JsonObject]:
        """`status` decides; without it the exit code."""
        completion = parse(Completion, body)
        status = Status(completion.status) if completion.status else status_of(completion.exit_code)
        return status, completion.model_dump(mode="json", exclude={"agent_id", "attempt_id", "status"})

    def registered(self, machine_id: str) -> JsonObject | None:
        """With the calls that not every plane has."""
        features = ["release", "upload-url"] if self.offers_uploads else ["release"]
        return {"status": "registered", "machine_id": machine_id, "features": features}

    def heartbeat(self, cancelled: list[tuple[str, str]] | None) -> JsonObject | None:
        """With what is to be cancelled."""
        if cancelled is None:
            return {"status": "unknown", "needs_collect": True}
        pairs = [{"task_id": task_id, "attempt_id": attempt_id} for task_id, attempt_id in cancelled]
        return {"status": "ok", "cancelled": pairs}

    def claimed_task(self, task: ClaimedTask) -> JsonObject:
        """The task as it was submitted, with its attempt and lease."""
        return {
            "renew_interval_sec": task.lease_ttl_ms / 3000,
            **task.spec,
            **assignment(task),
            "assigned_at": self.time(task.claimed_at_ms),
            "created_at": self.time(task.created_at_ms),
            "lease_expires_at": self.time(task.lease_expires_ms),
            "lease_ttl_sec": task.lease_ttl_ms / 1000,
        }

    def renewed(self, task_id: str, renewed: Renewed | None) -> JsonObject:
        """With the new end of the lease."""
        if renewed is None:
            raise Bare(409, "nothing was renewed")
        return {
            "task_id": task_id,
            "lease_expires_at": self.time(renewed.lease_expires_ms),
            "cancel_requested": renewed.cancel_requested,
        }


def status_of(exit_code: int) -> Status:
    """Success as the oldest planes read it."""
    return Status.COMPLETED if exit_code == 0 else Status.FAILED


def assignment(task: ClaimedTask) -> JsonObject:
    """What the plane says about the attempt, in every dialect."""
    return {
        "status": Status.ASSIGNED.value,
        "machine_id": task.machine_id,
        "assigned_agent_id": task.agent_id,
        "attempt_id": task.attempt_id,
    }
