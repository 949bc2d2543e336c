"""From the body of POST /tasks, a task file as YAML or JSON, to tasks for this machine."""

from __future__ import annotations

import ipaddress
import uuid
from collections.abc import Callable, Collection

from pydantic import ValidationError

from remotegpu_agent.api.parsing import invalid
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.problems import InvalidFile
from remotegpu_schemas.task import Task, TaskId
from remotegpu_schemas.taskfile import Submission, load_task_file

_NAME = "body"
"""What the file is called in the report: it came without a name."""


def new_task_id() -> TaskId:
    """An id for a task whose file asks for none."""
    return TaskId(str(uuid.uuid4()))


def parse_submission(
    body: bytes,
    *,
    machine_id: str,
    own_addresses: Callable[[], Collection[str]],
    new_id: Callable[[], TaskId] = new_task_id,
) -> list[Task]:
    """All tasks of the file, in its order. `own_addresses` is asked only where a file names addresses.

    Raises Refused(INVALID_PARAMETERS): the whole report on a bad file, or why a task is not for this machine.
    """
    try:
        submissions = load_task_file(body, _NAME)
    except InvalidFile as error:
        raise Refused(Code.INVALID_PARAMETERS, str(error)) from error
    for submission in submissions:
        _check_target(submission, machine_id, own_addresses)
    return [_task(submission, new_id) for submission in submissions]


def _task(submission: Submission, new_id: Callable[[], TaskId]) -> Task:
    asked = submission.form.id
    try:
        return submission.task(TaskId(asked) if asked is not None else new_id())
    except ValidationError as error:
        raise invalid(error, f"the task of line {submission.line}") from error
    except ValueError as error:
        raise Refused(Code.INVALID_PARAMETERS, f"{_NAME}:{submission.line}: {error}") from error


def _check_target(submission: Submission, machine_id: str, own_addresses: Callable[[], Collection[str]]) -> None:
    """A file that names machines is for any of them; one that names none is for the machine that it is given to."""
    if not submission.machine_ids and not submission.ips:
        return
    if machine_id in submission.machine_ids:
        return
    if submission.ips and not {_plain(ip) for ip in submission.ips}.isdisjoint(map(_plain, own_addresses())):
        return
    named = ", ".join((*submission.machine_ids, *submission.ips))
    raise Refused(
        Code.INVALID_PARAMETERS,
        f"{_NAME}:{submission.line}: the task is for {named[:200]}, and this machine is {machine_id}; nothing was "
        "submitted. Submit it there, or leave out machine_id and targets",
    )


def _plain(text: str) -> str:
    """One spelling of an address (IPv6 has many); other text as it is, which fits nothing."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return text
