"""What goes wrong by chance: with a host, with its link, with the plane's answers. Everything is undone again."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from typing import Final, Literal

from control_plane.faults import Delay, DropAfter, DropBefore, Fault, Respond, hiccup
from remotegpu_schemas.errors import CODES, Code
from tests.end_to_end.agent_process import AgentProcess
from tests.end_to_end.fleet import Fleet
from tests.end_to_end.link import Link

_CALLS: Final = ("register", "heartbeat", "claim", "start", "renew", "complete", "release")
_BARE: Final[tuple[Literal[404, 409, 410], ...]] = (404, 409, 410)
_LIES: Final = {"start": Code.TASK_NOT_FOUND, "renew": Code.LEASE_EXPIRED, "complete": Code.ATTEMPT_MISMATCH}
_PAUSE_MAX_S: Final = 0.8
_JSON: Final = {"Content-Type": "application/json"}


class Disturber:
    """Disturbs a fleet until `stop`; the seed alone decides on what and when. `count` says how often."""

    def __init__(self, fleet: Fleet, chance: random.Random, *, past_lease_s: float) -> None:
        self._fleet = fleet
        self._past_lease_s = past_lease_s
        # One source each, so that what one of them does not move what another does.
        self._chances = [random.Random(chance.random()) for _ in range(2 + 2 * len(fleet.hosts))]
        self._calls_when_ordered: dict[str, int] = {}
        self.count = 0

    async def run(self, duration_s: float) -> None:
        """Disturb for so long, then mend everything: faults forgotten, links open, every host running."""
        answers, plane, *rest = self._chances
        over_at_s = asyncio.get_running_loop().time() + duration_s
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(over_at_s, answers, lambda: self._spoil_an_answer(answers), pause_s=0.1))
            group.create_task(self._repeat(over_at_s, plane, lambda: self._restart_plane(plane), pause_s=12.0))
            for host, link in zip(self._fleet.hosts, self._fleet.links, strict=True):
                self._disturb(group, over_at_s, rest.pop(), self._host_actions(host))
                self._disturb(group, over_at_s, rest.pop(), self._link_actions(link))
        self._fleet.plane.faults.clear()

    def _disturb(
        self,
        group: asyncio.TaskGroup,
        over_at_s: float,
        chance: random.Random,
        actions: list[Callable[[random.Random], Awaitable[None]]],
    ) -> None:
        group.create_task(self._repeat(over_at_s, chance, lambda: chance.choice(actions)(chance), _PAUSE_MAX_S))

    async def _repeat(
        self, over_at_s: float, chance: random.Random, act: Callable[[], Awaitable[None]], pause_s: float
    ) -> None:
        while True:
            await asyncio.sleep(chance.uniform(0.0, 2 * pause_s))
            if asyncio.get_running_loop().time() >= over_at_s:
                return
            self.count += 1
            await act()

    def _duration_s(self, chance: random.Random) -> float:
        """Short as a rule, every fifth time longer than a lease."""
        return self._past_lease_s if chance.random() < 0.2 else chance.uniform(0.05, 1.5)

    # --- hosts ---

    def _host_actions(self, host: AgentProcess) -> list[Callable[[random.Random], Awaitable[None]]]:
        async def kill(chance: random.Random) -> None:
            await host.kill()
            await asyncio.sleep(chance.choice((0.0, 0.0, self._duration_s(chance))))
            await host.start(until_ready=chance.random() < 0.7)

        async def freeze(chance: random.Random) -> None:
            host.freeze()
            await asyncio.sleep(self._duration_s(chance))
            host.thaw()

        return [kill, freeze]

    def _link_actions(self, link: Link) -> list[Callable[[random.Random], Awaitable[None]]]:
        async def cut(chance: random.Random) -> None:
            await link.cut()
            await asyncio.sleep(self._duration_s(chance))
            await link.open()

        async def hang(chance: random.Random) -> None:
            await link.hang()
            await asyncio.sleep(self._duration_s(chance))
            await link.open()

        async def reset(_chance: random.Random) -> None:
            await link.reset()

        return [cut, hang, reset, reset]

    # --- the plane ---

    async def _spoil_an_answer(self, chance: random.Random) -> None:
        call = chance.choice(_CALLS)
        fault, calls = _fault(call, chance), self._fleet.plane.faults.calls[call]
        if calls > self._calls_when_ordered.get(call, -1):  # else the last one still waits for its call
            self._calls_when_ordered[call] = calls
            self._fleet.plane.faults.order(call, fault)

    async def _restart_plane(self, chance: random.Random) -> None:
        await self._fleet.plane.stop()
        await asyncio.sleep(chance.uniform(0.0, 1.0))
        await self._fleet.plane.start()


def _fault(call: str, chance: random.Random) -> Fault:
    kind = chance.choice(("before", "after", "after", "late", "bare", "error", "busy", "noise", "lie"))
    match kind:
        case "before":
            return DropBefore()
        case "after":
            return DropAfter()
        case "late":
            return Delay(chance.uniform(0.1, 3.0))
        case "bare":
            return hiccup(chance.choice(_BARE), in_body=chance.random() < 0.5)
        case "error":
            return Respond(500, b"Internal Server Error")
        case "busy":
            return Respond(503, b"", {"Retry-After": "1"})
        case "lie" if call in _LIES:
            code = _LIES[call]
            body = {"code": code, "message": CODES[code].meaning, "data": None}
            return Respond(CODES[code].http_status, json.dumps(body).encode(), _JSON)
        case _:
            return Respond(200, b'{"code": 0, "message": "ok", "data": {"tasks": [{"id"', _JSON)
