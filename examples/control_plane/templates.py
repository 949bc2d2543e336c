"""Stored templates behind the API: stores them after a trial, and fills them with an operator's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection

from control_plane.group_forms import TASK_KEYS, check_keys, read_group
from control_plane.requests import parse
from control_plane.store import audit, templates
from control_plane.store.audit import Actor
from control_plane.store.outcomes import Refusal
from control_plane.submissions import check_all
from control_plane.templating import TemplateBody, Value, fill_group, fill_task, read_values
from control_plane.work import Work
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.wire import JsonObject

_INSTANCE_OWNS: Final = frozenset({"id", "depends_on"})
"""What no stored task can have: it would be the same in every task that is made of it."""


@dataclass(frozen=True)
class Filled:
    """A template with values: a task or a group, as an operator would submit it."""

    name: str
    version: int
    is_group: bool
    form: JsonObject


class Templates:
    """The templates of one open plane."""

    def __init__(self, work: Work) -> None:
        self._work = work

    async def store(self, name: str, sent: JsonObject, by: Actor) -> int:
        """Store the next version of this name, if it makes a task or a group with any values; gives its number.

        Raises Refused that names the variable or the place.
        """
        body = parse(TemplateBody, sent)
        if body.task is not None:
            check_keys(body.task, "task", TASK_KEYS - _INSTANCE_OWNS)
        elif body.group is not None and "id" in body.group:
            raise Refused(Code.INVALID_PARAMETERS, "group.id: every group that is made of the template has its own")
        self._try(body, body.samples)
        now_ms = self._work.now_ms
        kept = body.model_dump(mode="json", exclude_none=True)

        def unit(db: Connection) -> int | Refusal:
            version = templates.add(db, name, kept, now_ms)
            if not isinstance(version, Refusal):
                audit.record(db, now_ms, by, "template.store", name, f"version {version}")
            return version

        return await self._work.ask(unit)

    async def get(self, name: str, version: int | None) -> dict[str, Any]:
        """One version, by default the newest, with the numbers of all."""

        def unit(db: Connection) -> dict[str, Any] | Refusal:
            found = templates.get(db, name, version)
            return found if isinstance(found, Refusal) else {**found, "versions": templates.versions_of(db, name)}

        return await self._work.ask(unit)

    async def listed(self, limit: int, offset: int) -> tuple[int, list[dict[str, Any]]]:
        """How many templates there are, and a page of the newest versions."""
        return await self._work.run(lambda db: templates.listed(db, limit, offset))

    async def remove(self, name: str, by: Actor) -> int:
        """Remove a template with all of its versions; gives how many there were."""
        now_ms = self._work.now_ms

        def unit(db: Connection) -> int | Refusal:
            removed = templates.remove(db, name)
            if not removed:
                return Refusal(Code.TASK_NOT_FOUND, f"there is no template {name}")
            audit.record(db, now_ms, by, "template.remove", name, f"{removed} versions")
            return removed

        return await self._work.ask(unit)

    async def fill(self, name: str, version: int | None, given: Mapping[str, object]) -> Filled:
        """The template with these values. Raises Refused that names the variables with which something is wrong."""
        found = await self._work.ask(lambda db: templates.get(db, name, version))
        body = parse(TemplateBody, found["body"])
        values = read_values(body.variables, given)
        try:
            form = self._try(body, values)
        except Refused as refusal:
            raise self._blame(body, values, refusal) from None
        return Filled(name, found["version"], body.group is not None, form)

    def _try(self, body: TemplateBody, values: Mapping[str, Value]) -> JsonObject:
        """What the template makes of the values. Raises Refused if it cannot be submitted."""
        if body.task is not None:
            form = fill_task(body.task, values, "task")
            check_all([form], self._work.new_id)
            return form
        form = fill_group(body.group or {}, values, "group")
        read_group(form, self._work.new_id)
        return form

    def _blame(self, body: TemplateBody, values: Mapping[str, Value], refusal: Refused) -> Refused:
        """The refusal with the names of those variables whose values alone, beside samples, are refused."""
        guilty: list[str] = []
        for name, value in values.items():
            try:
                self._try(body, {**body.samples, name: value})
            except Refused:
                guilty.append(f"'{name}'")
        if not guilty:
            return refusal
        return Refused(refusal.code, f"variable {', '.join(guilty)}: {refusal}")
