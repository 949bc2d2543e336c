"""The dialect of deployed planes: every line of "Deployed peers" in protocol.md that a plane, not a network, does.

Fields with a * in the tables of protocol.md are neither read nor sent.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Final

from aiohttp import web

from control_plane.answers import Bare, answer
from control_plane.dialect import assignment, status_of
from control_plane.requests import ClaimBody, PlainCompletion, parse
from control_plane.settings import Settings
from control_plane.store.attempts import Renewed
from control_plane.store.claims import ClaimedTask
from control_plane.store.tables import Status
from remotegpu_schemas.wire import JsonObject

NOT_SET: Final = "0001-01-01T00:00:00Z"
_LIMIT_FOR_ZERO: Final = 10
_ADDITIONS: Final = frozenset({"resources", "grace_period_sec", "lease_ttl_sec", "renew_interval_sec"})
_ALWAYS_SENT: Final[JsonObject] = {
    "name": "",
    "type": "shell",
    "workdir": "",
    "timeout": 0,
    "priority": 5,
    "max_retries": 0,
    "retry_count": 0,
    "retry_delay": 0,
    "group_id": "",
    "parent_id": "",
    "process_id": 0,
    "error_msg": "",
    "progress": 0,
}
"""Planes that know each field send it, set or not; the last three are nobody's business but theirs."""


class Compat:
    """As deployed planes speak."""

    offers_release = False
    offers_uploads = False
    is_idempotent = False

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.repeats_held = settings.compat_repeats_held

    def success(self, data: JsonObject | None) -> web.Response:
        """`msg`, and null for no data."""
        return answer({"code": 0, "msg": "success", "data": data})

    def failure(self, code: int, status: int, message: str) -> web.Response:
        """With its HTTP status, or with HTTP 200 and the code in the body alone."""
        return answer({"code": code, "msg": message}, status if self._settings.compat_errors == "status" else 200)

    def time(self, at_ms: int | None) -> str | None:
        """Nanoseconds; the year 1 is "not set"."""
        if at_ms is None:
            return NOT_SET
        second = datetime.fromtimestamp(at_ms // 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{second}.{at_ms % 1000:03d}000789Z"

    def check_machine(self, claimed: str, actual: str) -> bool:
        """A made-up machine is greeted, and claims nothing."""
        return claimed == actual

    def read_claim(self, body: JsonObject) -> ClaimBody:
        """No long poll, no capacity; a limit of 0 is one of 10."""
        limit = body.get("limit") or _LIMIT_FOR_ZERO
        return parse(ClaimBody, {**body, "limit": limit, "wait_sec": 0, "capacity": {}})

    def check_heartbeat(self, body: JsonObject) -> None:
        """A float where an integer is expected makes the whole body unreadable there."""
        metrics = body.get("metrics")
        fields = dict(metrics) if isinstance(metrics, dict) else {}
        gpus = fields.pop("gpu_metrics", None) or []
        for place, item in [("metrics", fields), *(("gpu_metrics", gpu) for gpu in gpus)]:
            for name, value in item.items():
                if isinstance(value, float) and (name.endswith(("_gb", "_mb")) or name in {"index", "temperature_c"}):
                    raise Bare(400, f"cannot unmarshal number {value} into field {place}.{name} of type int")

    def read_completion(self, body: JsonObject) -> tuple[Status, JsonObject]:
        """The exit code alone decides."""
        completion = parse(PlainCompletion, body)
        result = completion.model_dump(mode="json", exclude={"agent_id", "attempt_id"})
        return status_of(completion.exit_code), result

    def registered(self, machine_id: str) -> JsonObject | None:
        """Without features."""
        return {"status": "online", "machine_id": machine_id}

    def heartbeat(self, _cancelled: list[tuple[str, str]] | None) -> JsonObject | None:
        """Nothing."""
        return None

    def claimed_task(self, task: ClaimedTask) -> JsonObject:
        """`env_vars`; lists and maps as JSON in a string, or null."""
        spec = {name: value for name, value in task.spec.items() if name not in _ADDITIONS}
        env, args, depends_on = (spec.pop(name, None) for name in ("env", "args", "depends_on"))
        sent: JsonObject = {
            **_ALWAYS_SENT,
            **spec,
            **assignment(task),
            "env_vars": _as_text(env),
            "args": _as_text(args),
            "depends_on": _as_text(depends_on),
            "assigned_at": self.time(task.claimed_at_ms),
            "created_at": self.time(task.created_at_ms),
            "started_at": self.time(task.started_at_ms),
            "ended_at": NOT_SET,
            "lease_expires_at": self.time(task.lease_expires_ms),
        }
        if self._settings.compat_hides_lease:
            del sent["lease_expires_at"]
        return sent

    def renewed(self, task_id: str, renewed: Renewed | None) -> JsonObject:
        """Without the new end; a task that was not started is not found by the statement that renews."""
        if renewed is None:
            raise Bare(409, "lease not renewed")
        return {"task_id": task_id, "renewed": True}


def _as_text(value: object) -> str | None:
    return json.dumps(value) if value else None
