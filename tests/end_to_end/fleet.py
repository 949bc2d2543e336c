"""A real reference control plane in this process, and a real agent that is enrolled there in another one."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from control_plane import Plane, Settings, serve
from tests.control_plane.support import ADMIN_TOKEN, Operator
from tests.end_to_end.agent_process import AgentProcess
from tests.waiting import DEADLINE_S

MACHINE_ID = "machine-1"


@dataclass
class Fleet:
    """The two, and an operator of the plane."""

    plane: Plane
    operator: Operator
    host: AgentProcess

    async def submit(self, *tasks: dict[str, Any]) -> list[str]:
        """Add tasks to the plane; their ids."""
        return await self.operator.submit(*tasks)

    async def ended(self, task_ids: list[str], deadline_s: float = DEADLINE_S) -> list[dict[str, Any]]:
        """The tasks as the plane has them once all have ended there."""
        await self.plane.service.wait_ended(task_ids, deadline_s)
        return [await self.operator.task(task_id) for task_id in task_ids]

    async def task(self, task: dict[str, Any]) -> dict[str, Any]:
        """One task, from its submission to its end."""
        return (await self.ended(await self.submit(task)))[0]


@contextlib.asynccontextmanager
async def fleet(
    directory: Path, agent: Mapping[str, Any] | None = None, *, is_started: bool = True, **plane_settings: Any
) -> AsyncGenerator[Fleet]:
    """Plane and agent with these settings; the agent's sections are laid over what it needs to find the plane."""
    settings = Settings(database=directory / "plane.db", admin_token=ADMIN_TOKEN, **plane_settings)
    async with serve(settings) as plane, aiohttp.ClientSession() as session:
        operator = Operator(plane, session)
        token_file = directory / "token"
        token_file.write_text(await operator.enrol(MACHINE_ID))
        sections: dict[str, Any] = {
            "agent": {"machine_id": MACHINE_ID},
            "control_plane": {"url": plane.url, "token_file": str(token_file)},
            "capacity": {"max_concurrent": 4},
        }
        for section, values in (agent or {}).items():
            sections[section] = {**sections.get(section, {}), **values}
        host = AgentProcess(directory, sections)
        if is_started:
            await host.start()
        try:
            yield Fleet(plane, operator, host)
        finally:
            if host.has_started:
                await host.__aexit__()
