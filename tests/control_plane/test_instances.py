"""Several planes as processes on one PostgreSQL, one of which is killed while agents work."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from tests.control_plane.postgres import Postgres
from tests.control_plane.support import ADMIN_TOKEN, RESULT, request
from tests.control_plane.test_command_line import running
from tests.scale import scaled

AGENTS = 20
TASKS = scaled(1_000, 5_000)
CLAIM_LIMIT = 8
DEADLINE_S = scaled(100, 800)
RETRY_S = 0.05


@dataclass
class Shift:
    """What all agents work on together: the planes that they know, and the completions that were answered."""

    urls: list[str]
    session: aiohttp.ClientSession
    tasks: int
    completed: list[str] = field(default_factory=list)
    half_done: asyncio.Event = field(default_factory=asyncio.Event)
    retries: int = 0

    @property
    def is_over(self) -> bool:
        """Whether all tasks are completed, as far as the agents were told."""
        return len(self.completed) >= self.tasks

    def note(self, task_id: str) -> None:
        """A completion was answered."""
        self.completed.append(task_id)
        if len(self.completed) * 2 >= self.tasks:
            self.half_done.set()


@dataclass
class SimulatedAgent:
    """Speaks the agent's protocol; a call that gets no answer is repeated as it was, at the next plane."""

    shift: Shift
    number: int
    token: str
    plane_no: int = 0

    async def work(self) -> None:
        """Claim, start and complete until nothing is left."""
        names = {"agent_id": f"agent-{self.number}", "machine_id": f"machine-{self.number}"}
        for claim_no in itertools.count():
            if self.shift.is_over:
                return
            body = names | {"limit": CLAIM_LIMIT, "request_id": f"r{claim_no}", "wait_sec": 1}
            for task in (await self._call("/tasks/claim", body))["tasks"]:
                about = {"agent_id": names["agent_id"], "attempt_id": task["attempt_id"]}
                await self._call(f"/tasks/{task['id']}/start", about | {"process_id": 42, "run_no": 1})
                await self._call(f"/tasks/{task['id']}/complete", about | RESULT)
                self.shift.note(task["id"])

    async def _call(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        while True:
            url = self.shift.urls[self.plane_no % len(self.shift.urls)]
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                answer = await request(
                    self.shift.session, "POST", f"{url}/api/v1/agent{path}", {"X-Agent-Token": self.token}, json=body
                )
                if answer.status < 500:
                    data: dict[str, Any] = answer.data
                    return data
            self.shift.retries += 1
            self.plane_no += 1
            await asyncio.sleep(RETRY_S)


@pytest.mark.timeout(scaled(120, 900))
async def test_killed_plane_costs_no_task_and_doubles_none(postgres: Postgres, postgres_url: str) -> None:
    """20 agents, two planes, one of them killed half-way: every task is completed once, by one attempt."""
    admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    async with asyncio.timeout(DEADLINE_S), aiohttp.ClientSession() as session:
        with running(postgres_url) as (victim, first_url), running(postgres_url) as (_survivor, second_url):
            shift = Shift([first_url, second_url], session, TASKS)
            agents: list[SimulatedAgent] = []
            for number in range(AGENTS):
                body = {"machine_id": f"machine-{number}"}
                answer = await request(session, "POST", f"{second_url}/api/v1/admin/machines", admin, json=body)
                agents.append(SimulatedAgent(shift, number, answer.data["token"], plane_no=number))
            new = [{"id": f"task-{number}", "command": "true"} for number in range(TASKS)]
            await request(session, "POST", f"{first_url}/api/v1/admin/tasks", admin, json=new)
            began_s = time.monotonic()
            async with asyncio.TaskGroup() as group:
                for agent in agents:
                    group.create_task(agent.work())
                await shift.half_done.wait()
                os.kill(victim.pid, signal.SIGKILL)
            took_s = time.monotonic() - began_s
    print(
        f"\n{TASKS} tasks, {AGENTS} agents, 2 planes, 1 killed: {took_s:.1f} s, {TASKS / took_s:.0f} tasks/s, "
        f"{shift.retries} calls repeated"
    )
    assert sorted(shift.completed) == sorted(task["id"] for task in new)
    assert shift.retries > 0
    counts = postgres.execute(
        "SELECT count(*) FROM tasks WHERE status = 'completed' AND completions_accepted = 1 AND attempts = 1",
        "SELECT count(*) FROM attempts WHERE state = 'completed'",
        "SELECT count(*) FROM attempts",
        "SELECT count(*) FROM events WHERE kind = 'completed'",
        "SELECT count(DISTINCT attempt_id) FROM events WHERE kind = 'completed'",
        name="plane",
    )
    assert counts.split() == [str(TASKS)] * 5
