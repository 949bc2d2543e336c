"""Claimed tasks: each item of a claim answer becomes a `Task`, a refusal with a reason, or a line in the log."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from pydantic import ValidationError

from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.explain import Wording, explain, sentences
from remotegpu_schemas.problems import shown
from remotegpu_schemas.task import PRIORITY_LEAST_URGENT, PRIORITY_MOST_URGENT, Task, TaskId
from remotegpu_schemas.task_form import TaskForm, task_from_mapping, to_task
from remotegpu_schemas.wire.text import clean_text
from remotegpu_schemas.wire.times import parse_time
from remotegpu_schemas.wire.values import JsonObject, id_of


@dataclass(frozen=True)
class Claim:
    """One claimed task. The lease is relative: `lease_ttl_s` from the plane, or the expiry on the plane's clock."""

    task: Task
    attempt_id: AttemptId
    machine_id: str | None
    retries_used: int
    lease_ttl_s: float | None
    lease_expires_at: datetime | None
    assigned_at: datetime | None
    renew_interval_s: float | None


@dataclass(frozen=True)
class RefusedClaim:
    """A task that this agent can never run; it is completed as `policy_refused` with the reason."""

    task_id: TaskId
    attempt_id: AttemptId
    reason: str


@dataclass(frozen=True)
class UnusableClaim:
    """An item that cannot even be answered for (no usable ids); logged and left to lapse."""

    reason: str


ClaimItem = Claim | RefusedClaim | UnusableClaim

_JSON_KEYS: Final = ("args", "env", "env_vars", "labels", "resources")
"""May be a JSON document inside a string. (`depends_on` too, but of a claimed task it was met by the plane.)"""
_ZERO_IS_UNSET: Final = frozenset(
    {
        "timeout", "max_retries", "retry_delay", "grace_period_sec", "lease_ttl_sec", "renew_interval_sec",
        "heartbeat_interval_sec", "priority", "stop_signal", "group_id", "parent_id", "machine_id",
    }
)  # fmt: skip
_KEYS: Final = frozenset(TaskForm.model_fields.keys() | {"env_vars"}) - {"machine_id", "targets"}
"""What is read of an item. Where the plane wants it to run is the claim's, not the task's."""


def parse_claims(data: Mapping[str, Any]) -> list[ClaimItem]:
    """The tasks of a claim answer, each on its own: one bad item never hurts another. Never raises.

    More than `limits.CLAIM_MAX_TASKS` were not asked for: the rest is one unusable item, and lapses.
    """
    items = data.get("tasks")
    if not isinstance(items, list):
        return [UnusableClaim(f"the tasks of a claim answer are {shown(items)}, not a list")] if items else []
    claims = [_parse_claim(item) for item in items[: limits.CLAIM_MAX_TASKS]]
    unread = len(items) - len(claims)
    if unread > 0:
        claims.append(UnusableClaim(f"a claim answer holds {unread} tasks more than the {len(claims)} that it may"))
    return claims


def _parse_claim(item: object) -> ClaimItem:
    if not isinstance(item, dict):
        return UnusableClaim(f"a claimed task is {shown(item)}, not an object")
    task_id, attempt_id = id_of(item.get("id")), id_of(item.get("attempt_id"))
    if task_id is None or attempt_id is None:
        given = f"id is {shown(item.get('id'))}, attempt_id is {shown(item.get('attempt_id'))}"
        return UnusableClaim(f"a claimed task has unusable ids: {given}")
    try:
        machine_id = _machine_id_of(item.get("machine_id"))
        form = task_from_mapping(_plain_task(item), ignore_unknown=True)
    except ValidationError as error:
        reasons = [finding.message for finding in explain(error, TaskForm, Wording())]
        return _refused(task_id, attempt_id, reasons)
    except ValueError as error:
        return _refused(task_id, attempt_id, [str(error)])
    try:
        task = to_task(form, TaskId(task_id))
    except ValidationError as error:
        return _refused(task_id, attempt_id, sentences(error))
    except ValueError as error:
        return _refused(task_id, attempt_id, [str(error)])
    return Claim(
        task=task,
        attempt_id=AttemptId(attempt_id),
        machine_id=machine_id,
        retries_used=_count(item.get("retry_count")),
        lease_ttl_s=form.lease_ttl_sec or None,
        lease_expires_at=parse_time(item.get("lease_expires_at")),
        assigned_at=parse_time(item.get("assigned_at")),
        renew_interval_s=form.renew_interval_sec or None,
    )


def _refused(task_id: str, attempt_id: str, reasons: list[str]) -> RefusedClaim:
    reason = clean_text("; ".join(reasons)[: limits.WIRE_MESSAGE_MAX_CHARS])
    return RefusedClaim(TaskId(task_id), AttemptId(attempt_id), reason)


def _plain_task(item: Mapping[str, Any]) -> JsonObject:
    """The item as a task of taskfile.md: dialect names and encodings resolved, what means "not set" left out.

    Raises ValueError with a reason that shows no value: environments and arguments may hold secrets.
    """
    raw: JsonObject = {}
    for key, value in item.items():
        if key not in _KEYS:
            continue
        decoded = _json_inside(key, value) if key in _JSON_KEYS and isinstance(value, str) else value
        if decoded is None or decoded == "" or (key in _ZERO_IS_UNSET and decoded == 0):
            continue
        raw[key] = decoded
    env_vars = raw.pop("env_vars", None)
    if env_vars and not raw.get("env"):
        raw["env"] = env_vars
    for key in ("env", "labels"):
        if key in raw:
            raw[key] = _texts(key, raw[key])
    if "args" in raw:
        if not isinstance(raw["args"], list):
            raise ValueError("'args' must be a list")
        raw["args"] = [_text_of(value) for value in raw["args"]]
        if not raw["args"]:  # deployed planes send [] for "no arguments given"; the command is then a shell string
            raw.pop("args")
    if "priority" in raw:
        raw["priority"] = _priority(raw["priority"])
    return raw


def _json_inside(key: str, text: str) -> object:
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"'{key}' is a text that holds no JSON document") from None


def _texts(key: str, value: object) -> JsonObject:
    if not isinstance(value, dict):
        raise ValueError(f"'{key}' must be a mapping (key: value)")  # noqa: TRY004 - one kind for all refusals
    return {name: _text_of(text) for name, text in value.items()}


def _text_of(value: object) -> object:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case None:
            return ""
        case _:
            return value


def _priority(value: object) -> object:
    """Other scales are cut to ours; what is no number is left to the form, which says so."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return min(max(int(value), PRIORITY_MOST_URGENT), PRIORITY_LEAST_URGENT)
    return value


def _machine_id_of(value: object) -> str | None:
    if value is None or value in ("", 0):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"'machine_id' must be text, not {shown(value)}")  # noqa: TRY004 - one kind for all refusals
    if len(value) > limits.NAME_MAX_CHARS:
        raise ValueError(f"'machine_id' is longer than {limits.NAME_MAX_CHARS} characters")
    return clean_text(value)


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return min(max(value, 0), limits.RETRIES_MAX)
    return 0
