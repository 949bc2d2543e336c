"""Callers of a real control plane over HTTP: an agent and an operator, and a clock that tests move by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import aiohttp

from control_plane import Plane

ADMIN_TOKEN = "operator-secret"
MACHINE = "machine-1"
DEADLINE_S = 20.0
RESULT = {
    "exit_code": 0,
    "stdout": "hello\n",
    "stderr": "",
    "error": "",
    "status": "completed",
    "cause": "succeeded",
    "started_at": "2026-02-05T12:00:00Z",
    "ended_at": "2026-02-05T12:00:01Z",
    "runs": 1,
    "truncated": False,
    "usage": {"wall_s": 1.0},
}
"""A completion without the ids."""


@dataclass
class MovableClock:
    """Seconds since 1970; stands still until it is moved."""

    time_s: float = 1_770_000_000.0

    def __call__(self) -> float:
        """The time."""
        return self.time_s


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    body: dict[str, Any] | None
    text: str
    headers: dict[str, str]

    @property
    def code(self) -> int:
        """The envelope's code."""
        assert self.body is not None, self.text
        code = self.body["code"]
        assert isinstance(code, int)
        return code

    @property
    def data(self) -> Any:
        """The data of a success."""
        assert self.code == 0, self.text
        assert self.body is not None
        return self.body["data"]

    @property
    def message(self) -> str:
        """The message, whatever it is called."""
        assert self.body is not None
        return str(self.body.get("message") or self.body.get("msg"))


async def request(
    session: aiohttp.ClientSession, method: str, url: str, headers: dict[str, str], **arguments: Any
) -> Answer:
    """One request, with its answer whatever it is."""
    async with session.request(method, url, headers=headers, **arguments) as response:
        text = await response.text()
        body = await response.json(content_type=None) if response.content_type == "application/json" else None
        return Answer(response.status, body, text, dict(response.headers))


@dataclass
class Operator:
    """Calls the admin API."""

    plane: Plane
    session: aiohttp.ClientSession
    headers: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {ADMIN_TOKEN}"})

    async def call(self, method: str, path: str, **arguments: Any) -> Answer:
        """Any call."""
        return await request(
            self.session,
            method,
            f"{self.plane.url}/api/v1/admin{path}",
            self.headers | arguments.pop("headers", {}),
            **arguments,
        )

    async def enrol(self, machine_id: str = MACHINE) -> str:
        """The new token of a machine."""
        token = (await self.call("POST", "/machines", json={"machine_id": machine_id})).data["token"]
        assert isinstance(token, str)
        return token

    async def submit(self, *tasks: dict[str, Any]) -> list[str]:
        """The ids of new tasks; `true` without arguments if none is given."""
        answer = await self.call("POST", "/tasks", json=list(tasks) or [{"command": "true"}])
        ids: list[str] = answer.data["task_ids"]
        return ids

    async def task(self, task_id: str) -> dict[str, Any]:
        """A task with attempts and events."""
        data: dict[str, Any] = (await self.call("GET", f"/tasks/{task_id}")).data
        return data

    async def events(self, task_id: str) -> list[str]:
        """The kinds of a task's events, in order."""
        return [event["kind"] for event in (await self.task(task_id))["events"]]


@dataclass
class Agent:
    """Calls the agent API with the token of its machine."""

    plane: Plane
    session: aiohttp.ClientSession
    token: str
    agent_id: str = "agent-1"
    machine_id: str = MACHINE
    requests_made: int = 0

    async def call(self, path: str, body: object, headers: dict[str, str] | None = None) -> Answer:
        """Any call."""
        sent = {"X-Agent-Token": self.token} if headers is None else headers
        return await request(self.session, "POST", f"{self.plane.url}/api/v1/agent{path}", sent, json=body)

    async def register(self, **more: Any) -> Answer:
        """POST /register."""
        return await self.call("/register", {"agent_id": self.agent_id, "machine_id": self.machine_id} | more)

    async def heartbeat(self, **more: Any) -> Answer:
        """POST /heartbeat."""
        body = {"agent_id": self.agent_id, "machine_id": self.machine_id, "metrics": {}, "state": "ready"}
        return await self.call("/heartbeat", body | more)

    async def claim(self, **more: Any) -> Answer:
        """POST /tasks/claim, with a request id of its own unless one is given."""
        self.requests_made += 1
        names = {"agent_id": self.agent_id, "machine_id": self.machine_id}
        return await self.call(
            "/tasks/claim", names | {"limit": 1, "request_id": f"{self.agent_id}-{self.requests_made}"} | more
        )

    async def claim_one(self, **more: Any) -> dict[str, Any]:
        """The one task that a claim gives."""
        [task] = (await self.claim(**more)).data["tasks"]
        assert isinstance(task, dict)
        return task

    async def about(self, kind: str, task: dict[str, Any], **more: Any) -> Answer:
        """POST /tasks/{id}/KIND about a claimed task."""
        names = {"agent_id": self.agent_id, "attempt_id": task["attempt_id"]}
        return await self.call(f"/tasks/{task['id']}/{kind}", names | more)

    async def start(self, task: dict[str, Any], **more: Any) -> Answer:
        """POST /tasks/{id}/start."""
        return await self.about("start", task, **{"process_id": 42, "run_no": 1} | more)

    async def renew(self, task: dict[str, Any], extend_sec: Any = 60) -> Answer:
        """POST /tasks/{id}/lease/renew."""
        return await self.about("lease/renew", task, extend_sec=extend_sec)

    async def complete(self, task: dict[str, Any], **more: Any) -> Answer:
        """POST /tasks/{id}/complete; a success unless something else is said."""
        return await self.about("complete", task, **RESULT | more)
