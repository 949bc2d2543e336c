"""From a group as an operator submits it to tasks for the store: names, dependencies, defaults. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Final

from pydantic import Field

from control_plane.dependencies import Mode, OnFailure, When, circle_in
from control_plane.requests import DestinationBody, Id, OperatorBody, Text, parse
from control_plane.settings import CIRCLE_SHOWN_MAX, GROUP_DEPENDENCIES_MAX, GROUP_TASKS_MAX
from control_plane.store.distribution import Mode as DestinationMode
from control_plane.store.groups import NewGroup, NewMember
from control_plane.store.tables import Status
from control_plane.submissions import check_all
from remotegpu_schemas import limits
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.problems import did_you_mean, nearest
from remotegpu_schemas.task_form import TaskForm
from remotegpu_schemas.wire import JsonObject

_OWN: Final = ("id", "depends_on", "when")
"""What is a task's own in a group, and no default."""
_MERGED: Final = ("env", "labels")
"""Defaults and the task's own, key by key."""
TASK_KEYS: Final = (
    frozenset(TaskForm.model_fields)
    | {"env_vars", "env_file", "image", "artifacts", "hooks", "notify", "preemptible", "on_reboot", "on_unreachable"}
) - {"group_id"}
"""What a person may write into a task: taskfile.md's keys, also those that only agents read."""


class GroupBody(OperatorBody):
    """POST /groups."""

    id: Id | None = None
    name: Annotated[Text, Field(max_length=limits.NAME_MAX_CHARS)] = ""
    mode: Annotated[Mode, Field(strict=False)] = Mode.DAG
    on_failure: Annotated[OnFailure, Field(strict=False)] = OnFailure.STOP
    max_parallel: Annotated[int, Field(ge=1, le=GROUP_TASKS_MAX)] | None = None
    defaults: dict[str, Any] = Field(default={})
    tasks: list[dict[str, Any]]
    to: DestinationBody = DestinationBody()


class _Links(OperatorBody):
    """What one task says about the others."""

    id: Id
    depends_on: list[Id] = Field(default=[])
    when: Annotated[When, Field(strict=False)] = When.SUCCESS


def read_group(sent: JsonObject, new_id: Callable[[], str]) -> tuple[NewGroup, DestinationBody]:
    """The group, and where its tasks go. A task's id on the plane is `GROUP.TASK`. Raises Refused (30005)."""
    body = parse(GroupBody, sent)
    if not 1 <= len(body.tasks) <= GROUP_TASKS_MAX:
        raise _refused(f"tasks: a group has from 1 to {GROUP_TASKS_MAX} tasks, not {len(body.tasks)}")
    if body.to.mode is DestinationMode.BROADCAST:
        raise _refused("to.mode: copies of a group's tasks would have no dependencies; submit a group for each machine")
    check_keys(body.defaults, "defaults", TASK_KEYS - set(_OWN))
    for index, task in enumerate(body.tasks):
        check_keys(task, f"tasks[{index}]", TASK_KEYS | set(_OWN))
    links = _links_of(body)
    _check_dependencies(links)
    group_id = body.id or new_id()
    plane_ids = {link.id: f"{group_id}.{link.id}" for link in links}
    items = [
        _with_defaults(task, body.defaults)
        | {
            "id": plane_ids[link.id],
            "group_id": group_id,
            "depends_on": [plane_ids[name] for name in link.depends_on],
        }
        for task, link in zip(body.tasks, links, strict=True)
    ]
    members = tuple(
        NewMember(link.id, replace(task, status=Status.WAITING), tuple(link.depends_on), link.when)
        for link, task in zip(links, check_all(items, new_id), strict=True)
    )
    return NewGroup(group_id, body.name, body.mode, body.on_failure, body.max_parallel, members), body.to


def _links_of(body: GroupBody) -> list[_Links]:
    links: list[_Links] = []
    for index, task in enumerate(body.tasks):
        own = {key: task[key] for key in _OWN if task.get(key) is not None}
        try:
            link = parse(_Links, {"id": f"task-{index + 1}", **own})
        except Refused as refusal:
            raise _refused(f"tasks[{index}]: {refusal}") from None
        if link.depends_on and body.mode is not Mode.DAG:
            raise _refused(f"tasks[{index}]: depends_on: is for groups of mode dag; this one is {body.mode}")
        if body.mode is Mode.SERIAL and links:
            link = link.model_copy(update={"depends_on": [links[-1].id]})
        if link.when is When.FAILURE and not link.depends_on:
            raise _refused(f"tasks[{index}]: when: 'failure' of what? The task depends on none")
        links.append(link.model_copy(update={"depends_on": list(dict.fromkeys(link.depends_on))}))
    return links


def _check_dependencies(links: Sequence[_Links]) -> None:
    names = {link.id: link.depends_on for link in links}
    if len(names) < len(links):
        [(twice, _)] = Counter(link.id for link in links).most_common(1)
        raise _refused(f"two tasks of the group have the id {twice}")
    if sum(len(depends_on) for depends_on in names.values()) > GROUP_DEPENDENCIES_MAX:
        raise _refused(f"tasks: more than {GROUP_DEPENDENCIES_MAX} dependencies in one group")
    for index, link in enumerate(links):
        unknown = next((name for name in link.depends_on if name not in names), None)
        if unknown is not None:
            near = did_you_mean(unknown, list(names))
            raise _refused(f"tasks[{index}]: depends_on: there is no task {unknown} in this group{near}")
    circle = circle_in(names)
    if circle is not None:
        raise _refused(f"tasks depend on each other in a circle: {_written(circle)}")


def _written(circle: Sequence[str]) -> str:
    if len(circle) <= CIRCLE_SHOWN_MAX:
        return " -> ".join(circle)
    shown = circle[: CIRCLE_SHOWN_MAX - 1]
    return " -> ".join([*shown, f"({len(circle) - CIRCLE_SHOWN_MAX} more)", circle[-1]])


def check_keys(given: Mapping[str, Any], where: str, known: frozenset[str] | set[str]) -> None:
    """Raises Refused (30005) for a key that is none: a misspelt `depends_on` would start a task too early."""
    for key in given:
        if key == "matrix":
            raise Refused(Code.NOT_SUPPORTED, f"{where}: matrix: is not supported by this plane; write the tasks out")
        if key not in known:
            near = nearest(key, sorted(known))
            raise _refused(f"{where}: unknown key {key[:40]!r}" + (f"; did you mean '{near}'?" if near else ""))


def _with_defaults(task: Mapping[str, Any], defaults: Mapping[str, Any]) -> JsonObject:
    merged = {**defaults, **task}
    for key in _MERGED:
        own, default = task.get(key), defaults.get(key)
        if isinstance(own, dict) and isinstance(default, dict):
            merged[key] = {**default, **own}
    merged.pop("when", None)
    return merged


def _refused(message: str) -> Refused:
    return Refused(Code.INVALID_PARAMETERS, message)
