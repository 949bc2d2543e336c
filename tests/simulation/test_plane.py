"""The plane in memory answers as the reference control plane does, call by call."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import pytest

from control_plane import Plane as RealPlane
from control_plane import Settings, serve
from remotegpu_schemas.wire import Claim, JsonObject, parse_claims, parse_heartbeat, parse_renewal
from tests.control_plane.support import ADMIN_TOKEN, RESULT, Agent, MovableClock, Operator
from tests.scale import scaled
from tests.simulation.invariants import Judge
from tests.simulation.plane import Plane
from tests.simulation.timeline import Timeline
from tests.waiting import until

_ATTEMPTS_MAX = 4


@dataclass
class Both:
    """The same calls to both planes, under the same clock; what one calls differently is translated."""

    random: Random
    real: RealPlane
    operator: Operator
    agents: list[Agent]
    clock: MovableClock
    timeline: Timeline
    plane: Plane
    names: dict[str, str] = field(default_factory=dict)
    """Attempt ids of the reference plane, by those of the one in memory."""
    requests: int = 0

    async def call(self, agent: Agent, path: str, body: JsonObject) -> None:
        """One call of an agent; both answers have to say the same."""
        body = {"agent_id": agent.agent_id} | body
        answers: list[tuple[int, Any]] = []
        self.plane.call(agent.machine_id, path, body, lambda status, text: answers.append((status, text)))
        attempt_id = body.get("attempt_id")
        translated = body | {"attempt_id": self.names.get(attempt_id, attempt_id)} if attempt_id else body
        theirs = await agent.call(path, translated)
        [(status, text)] = answers
        told = (path, body, theirs.text, text)
        if theirs.body is None:  # there is no such call
            assert (status, text.decode()) == (theirs.status, theirs.text), told
            return
        mine = json_of(text)
        assert (status, mine["code"]) == (theirs.status, theirs.code), told
        data = mine["data"]
        if path == "/tasks/claim":
            tasks = theirs.data["tasks"]
            assert [task["id"] for task in data["tasks"]] == [task["id"] for task in tasks], told
            self.names |= {a["attempt_id"]: b["attempt_id"] for a, b in zip(data["tasks"], tasks, strict=True)}
        if self.plane.is_deployed:
            assert self._read(path, self.translate(data)) == self._read(path, (theirs.body or {}).get("data")), told
        else:
            assert self.translate(data) == (theirs.body or {})["data"], told

    @staticmethod
    def _read(path: str, data: JsonObject | None) -> object:
        """What the agent makes of it: deployed planes say many things that mean nothing."""
        if path == "/tasks/claim":
            claims = parse_claims(data or {})  # in which deployed planes tell nanoseconds
            return [replace(each, assigned_at=None) if isinstance(each, Claim) else each for each in claims]
        return parse_renewal(data or {}) if path.endswith("renew") else parse_heartbeat(data or {})

    def translate(self, value: Any) -> Any:
        """With the reference plane's attempt ids."""
        match value:
            case dict():
                return {key: self.translate(item) for key, item in value.items()}
            case list():
                return [self.translate(item) for item in value]
            case str():
                return self.names.get(value, value)
            case _:
                return value

    async def move(self, seconds: float) -> None:
        """Let time pass, and leases with it."""
        until_s = self.timeline.now_s + seconds
        self.timeline.at(until_s + 0.0001, lambda: None)
        while self.timeline.now_s <= until_s:
            self.timeline.step()
        self.timeline.now_s = until_s
        self.clock.time_s += seconds
        self.real.clock_moved()
        await until(self.say_the_same)

    async def say_the_same(self) -> bool:
        listed = (await self.operator.call("GET", "/tasks?limit=1000")).data["tasks"]
        return {task["id"]: task["status"] for task in listed} == {
            task.id: task.status for task in self.plane.tasks.values()
        }

    async def anything(self) -> None:
        """Something that somebody may do."""
        random, agent = self.random, self.random.choice(self.agents)
        match random.choice(("submit", "claim", "claim", "cancel", "move", "heartbeat", *["attempt"] * 6)):
            case "submit":
                spec = {"id": f"t{len(self.plane.tasks) + 1}", "command": "true", "priority": random.choice((1, 5))}
                if random.random() < 0.3:
                    spec["lease_ttl_sec"] = 20
                self.plane.submit(spec)
                await self.operator.submit(spec)
            case "claim":
                self.requests += random.random() < 0.7
                names: JsonObject = {"request_id": f"r{self.requests}", "machine_id": agent.machine_id}
                await self.call(agent, "/tasks/claim", {**names, "limit": random.choice((1, 3))})
            case "cancel" if self.plane.tasks:
                task_id = random.choice(list(self.plane.tasks))
                self.plane.cancel(task_id)
                await self.operator.call("POST", f"/tasks/{task_id}/cancel")
            case "move":
                await self.move(random.choice((1.0, 7.0, 25.0, 61.0)))
            case "heartbeat":
                body: JsonObject = {"machine_id": agent.machine_id, "metrics": {}, "state": "ready"}
                await self.call(agent, "/heartbeat", body)
            case _ if self.plane.attempts:
                await self._speak_of_an_attempt(agent)
            case _:
                pass

    async def _speak_of_an_attempt(self, agent: Agent) -> None:
        random = self.random
        attempt = random.choice(list(self.plane.attempts.values()))
        if random.random() < 0.9:
            agent = next(each for each in self.agents if each.agent_id == attempt.agent_id)
        task_id = attempt.task.id if random.random() < 0.95 else random.choice([*self.plane.tasks, "nobody"])
        lost = {"exit_code": 125, "status": "failed", "cause": "lease_lost", "error": "it ended"}
        calls: list[tuple[str, JsonObject]] = [
            ("start", {"process_id": 7, "run_no": random.choice((1, 2))}),
            ("lease/renew", {"extend_sec": random.choice((10, 60))}),
            ("progress", {"percent": 10.0, "message": "on its way"}),
            ("complete", {**RESULT}),
            ("complete", {**RESULT, **lost}),
            ("release", {"reason": "no room"}),
        ]
        path, body = random.choice(calls)
        attempt_id = attempt.id if random.random() < 0.95 else "unknown"
        await self.call(agent, f"/tasks/{task_id}/{path}", body | {"attempt_id": attempt_id})


def json_of(text: bytes) -> JsonObject:
    """An envelope, in the one form that both planes have."""
    envelope: JsonObject = json.loads(text)
    return envelope


@pytest.fixture
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    """Connections to the reference plane."""
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.mark.parametrize("is_deployed", [False, True])
@pytest.mark.parametrize("seed", range(scaled(5, 60)))
async def test_both_planes_answer_alike(
    seed: int, is_deployed: bool, tmp_path: Path, session: aiohttp.ClientSession
) -> None:
    """Random calls of two agents and an operator get the same statuses, codes and data from both planes."""
    random, clock = Random(seed), MovableClock()
    settings = Settings(
        database=tmp_path / "plane.db",
        admin_token=ADMIN_TOKEN,
        now=clock,
        attempts_max=_ATTEMPTS_MAX,
        restart_grace_s=0,
        compat=is_deployed,
        compat_repeats_held=seed % 2 == 0,
    )
    async with serve(settings) as real:
        operator = Operator(real, session)
        agents = [
            Agent(real, session, await operator.enrol(f"machine-{n}"), f"agent-{n}", f"machine-{n}") for n in (1, 2)
        ]
        timeline, judge, count = Timeline(random), Judge(), iter(range(10_000))
        plane = Plane(
            timeline,
            judge,
            lambda: f"a{next(count)}",
            attempts_max=_ATTEMPTS_MAX,
            is_deployed=is_deployed,
            repeats_held=seed % 2 == 0,
        )
        judge.plane = plane
        both = Both(random, real, operator, agents, clock, timeline, plane)
        for agent in agents:
            body = {"machine_id": agent.machine_id, "version": "0", "hostname": "h", "ip_address": "192.0.2.1"}
            await both.call(agent, "/register", body | {"agent_port": 0, "max_workers": 1})
        for _ in range(120):
            await both.anything()
        await both.move(500.0)
        assert await both.say_the_same()
