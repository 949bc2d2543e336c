"""A real reference control plane in this process, and real agents that are enrolled there in others.

Each host reaches the plane over a link of its own, which tests cut, hang and open again.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from control_plane import Plane, Settings, serve
from tests.control_plane.support import ADMIN_TOKEN, Operator
from tests.end_to_end.agent_process import AgentProcess
from tests.end_to_end.link import Link
from tests.waiting import DEADLINE_S

MACHINE_ID = "machine-1"
"""The first host's; the others count on."""


@dataclass
class Fleet:
    """The plane, its hosts, each with its link, and an operator of the plane."""

    plane: Plane
    operator: Operator
    hosts: Sequence[AgentProcess]
    links: Sequence[Link]

    @property
    def host(self) -> AgentProcess:
        """The first host."""
        return self.hosts[0]

    @property
    def link(self) -> Link:
        """The first host's."""
        return self.links[0]

    async def submit(self, *tasks: dict[str, Any]) -> list[str]:
        """Add tasks to the plane; their ids."""
        return await self.operator.submit(*tasks)

    async def ended(self, task_ids: list[str], deadline_s: float = DEADLINE_S) -> list[dict[str, Any]]:
        """The tasks as the plane has them once all have ended there."""
        await self.plane.service.wait_ended(task_ids, deadline_s)
        return [await self.operator.task(task_id) for task_id in task_ids]

    async def heartbeat(self) -> dict[str, Any]:
        """The first host's last heartbeat, as an operator of the plane sees it; empty before there is one."""
        machines = (await self.operator.call("GET", "/machines")).data["machines"]
        [machine] = [machine for machine in machines if machine["machine_id"] == MACHINE_ID]
        [agent] = machine["agents"]
        return agent["heartbeat"] or {}

    async def task(self, task: dict[str, Any]) -> dict[str, Any]:
        """One task, from its submission to its end."""
        return (await self.ended(await self.submit(task)))[0]


@contextlib.asynccontextmanager
async def fleet(
    directory: Path,
    agent: Mapping[str, Any] | None = None,
    *,
    is_started: bool = True,
    hosts: int = 1,
    **plane_settings: Any,
) -> AsyncGenerator[Fleet]:
    """Plane and agents with these settings; the agents' sections are laid over what they need to find the plane."""
    settings = Settings(database=directory / "plane.db", admin_token=ADMIN_TOKEN, **plane_settings)
    async with contextlib.AsyncExitStack() as stack:
        plane = await stack.enter_async_context(serve(settings))
        operator = Operator(plane, await stack.enter_async_context(aiohttp.ClientSession()))
        links = [await stack.enter_async_context(Link(lambda: plane.port)) for _ in range(hosts)]
        enrolled = []
        for number, link in enumerate(links, start=1):
            place = directory if number == 1 else directory / f"host-{number}"
            host = await _enrol(place, operator, f"machine-{number}", link.url, agent or {})
            stack.push_async_callback(_leave, host)
            enrolled.append(host)
        if is_started:
            for host in enrolled:
                await host.start()
        yield Fleet(plane, operator, enrolled, links)


async def _enrol(
    directory: Path, operator: Operator, machine_id: str, url: str, agent: Mapping[str, Any]
) -> AgentProcess:
    directory.mkdir(exist_ok=True)
    token_file = directory / "token"
    token_file.write_text(await operator.enrol(machine_id))
    sections: dict[str, Any] = {
        "agent": {"machine_id": machine_id},
        "control_plane": {"url": url, "token_file": str(token_file)},
        "capacity": {"max_concurrent": 4},
    }
    for section, values in agent.items():
        sections[section] = {**sections.get(section, {}), **values}
    return AgentProcess(directory, sections)


async def _leave(host: AgentProcess) -> None:
    if host.has_started:
        await host.__aexit__()
