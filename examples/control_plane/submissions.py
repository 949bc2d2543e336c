"""From what an operator submits to tasks for the store: JSON in the claimed-task form, or a task file.

A task is accepted if the agent's own reading of claims (`wire.parse_claims`) would accept it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from control_plane.settings import TASKS_PER_CALL_MAX
from control_plane.store.tables import ANY_MACHINE
from control_plane.store.tasks import NewTask
from remotegpu_schemas import limits
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.task import Task, TaskId
from remotegpu_schemas.taskfile import InvalidFile, Submission, load_task_file
from remotegpu_schemas.wire import Claim, JsonObject, UnusableClaim, parse_claims

_PLANE_OWNS: Final = frozenset(
    {
        "status",
        "assigned_agent_id",
        "assigned_at",
        "attempt_id",
        "lease_expires_at",
        "created_at",
        "machine_id",
        "targets",
    }
)


class _NotATask(Exception):
    """Why an item cannot be one."""


def check_all(items: Sequence[object], new_id: Callable[[], str]) -> list[NewTask]:
    """Each item as a task. Raises Refused that names the first bad one."""
    if not items:
        raise Refused(Code.INVALID_PARAMETERS, "there is no task in it")
    if len(items) > TASKS_PER_CALL_MAX:
        raise Refused(Code.INVALID_PARAMETERS, f"{len(items)} tasks at once; at most {TASKS_PER_CALL_MAX} are taken")
    checked: list[NewTask] = []
    for index, item in enumerate(items):
        try:
            checked.append(_check(item, new_id))
        except _NotATask as error:
            raise Refused(Code.INVALID_PARAMETERS, f"tasks[{index}]: {error}") from None
    seen: set[str] = set()
    for task in checked:
        if task.id in seen:
            raise Refused(Code.INVALID_PARAMETERS, f"two of the tasks have the id {task.id}")
        seen.add(task.id)
    return checked


def read_task_file(text: bytes) -> list[JsonObject]:
    """The tasks of a task file in the claimed-task form. Raises Refused with the whole report."""
    try:
        return [_wire_form(submission) for submission in load_task_file(text)]
    except InvalidFile as error:
        raise Refused(Code.INVALID_PARAMETERS, str(error)) from error


def _check(item: object, new_id: Callable[[], str]) -> NewTask:
    if not isinstance(item, dict):
        raise _NotATask(f"a task is an object, not {type(item).__name__}")
    spec = {**item, "id": item.get("id") or new_id()}
    [claim] = parse_claims({"tasks": [{**spec, "attempt_id": "check"}]})
    if isinstance(claim, UnusableClaim):
        raise _NotATask("id: must begin with a letter or digit and have only letters, digits and . _ : -")
    if not isinstance(claim, Claim):
        raise _NotATask(claim.reason)
    return NewTask(
        id=str(claim.task.id),
        name=claim.task.name,
        spec={key: value for key, value in spec.items() if key not in _PLANE_OWNS} | {"id": str(claim.task.id)},
        machine_id=_machine_of(item),
        priority=claim.task.priority,
    )


def _machine_of(item: dict[str, Any]) -> str:
    machine_id = item.get("machine_id")
    if machine_id in {None, ""}:
        return ANY_MACHINE
    if not isinstance(machine_id, str) or not re.fullmatch(limits.ID_PATTERN, machine_id, re.ASCII):
        raise _NotATask("machine_id: must begin with a letter or digit and have only letters, digits and . _ : -")
    return machine_id


def _wire_form(submission: Submission) -> JsonObject:
    if submission.ips or len(submission.machine_ids) > 1:
        raise Refused(
            Code.NOT_SUPPORTED, f"line {submission.line}: this plane gives a task to one machine, or to any; name one"
        )
    form = submission.form
    task = submission.task(TaskId(form.id or "new"))
    if task.args == ():
        raise Refused(
            Code.NOT_SUPPORTED, f"line {submission.line}: the wire has no form for an empty 'args'; leave it out"
        )
    given = {
        "id": form.id,
        "machine_id": submission.machine_ids[0] if submission.machine_ids else None,
        "lease_ttl_sec": form.lease_ttl_sec,
        "renew_interval_sec": form.renew_interval_sec,
        **_fields_of(task),
    }
    return {key: value for key, value in given.items() if value is not None}


def _fields_of(task: Task) -> JsonObject:
    retry = task.retry
    return {
        "name": task.name,
        "type": task.type.value,
        "command": task.command,
        "args": None if task.args is None else list(task.args),
        "script": task.script,
        "interpreter": task.interpreter,
        "workdir": task.workdir,
        "env": task.env,
        "resources": task.resources.model_dump(),
        "timeout": task.timeout_s,
        "grace_period_sec": task.grace_period_s,
        "priority": task.priority,
        "stop_signal": task.stop_signal,
        "max_retries": retry.max,
        "retry_delay": retry.delay_s,
        "retry": {
            "backoff": retry.backoff.value,
            "max_delay": retry.max_delay_s,
            "on": sorted(cause.value for cause in retry.on),
            "exit_codes": sorted(retry.exit_codes),
        },
        "labels": task.labels,
        "group_id": task.group_id,
        "parent_id": task.parent_id,
    }
