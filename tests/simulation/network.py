"""The way between agents and the control plane: it delays, loses, doubles, reorders, cuts off and answers falsely.

Each host has a link with its present faults. A request that was sent may arrive though its sender has died since.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Final

from remotegpu_agent.clock import Clock
from remotegpu_agent.control_plane import ControlPlane, Reply
from remotegpu_schemas import limits
from remotegpu_schemas.errors import CODES, Code
from remotegpu_schemas.wire import Answer, JsonObject, Verdict, parse_answer
from tests.simulation.plane import Plane, envelope
from tests.simulation.timeline import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.invariants import Judge
    from tests.simulation.machine import Process

Http = tuple[int, Mapping[str, str], bytes]

_LIES: Final = (Code.ATTEMPT_MISMATCH, Code.LEASE_EXPIRED, Code.TASK_NOT_FOUND)
_BARE: Final = (404, 409, 410)
_SAID_BEFORE: Final = frozenset({401, 429})
"""Whoever says that has not done what he was asked for."""


@dataclass
class Link:
    """What ails the way to and from one host; probabilities per message. None of it: a few milliseconds."""

    is_cut: bool = False
    cut_refuses: bool = False
    """A cut link says so at once; otherwise nothing comes back."""
    drop_request: float = 0.0
    drop_answer: float = 0.0
    duplicate: float = 0.0
    slowness_s: float = 0.0
    late_answers_s: float = 0.0
    overload: float = 0.0
    """429 or 503 with Retry-After, instead of an answer."""
    hiccup: float = 0.0
    """A bare 404, 409 or 410, before or after the request was obeyed."""
    garble: float = 0.0
    unauthorized: float = 0.0
    lie: float = 0.0
    """A false 30001, 30003 or 30004 to what is said about an attempt."""


@dataclass
class Network:
    """Carries requests and answers."""

    timeline: Timeline
    random: Random
    plane: Plane
    judge: Judge
    links: dict[str, Link] = field(default_factory=dict)

    async def post(self, process: Process, path: str, body: JsonObject) -> Http:
        """One request. Raises OSError where the connection breaks; waits for ever for an answer that was lost."""
        answered: asyncio.Future[Http] = process.loop.create_future()
        self.judge.sent(process, path, body)
        kind = path.rpartition("/")[2]
        process.machine.reached(f"send {kind}")
        link, chance = self.links[process.machine_id], self.random.random
        if link.is_cut:
            if link.cut_refuses:
                self._break(process, answered)
        elif chance() >= link.drop_request:
            self.timeline.after(self._delay_s(link), lambda: self._arrive(process, path, body, answered))
        elif chance() < 0.5:
            self._break(process, answered)
        if link.duplicate and chance() < link.duplicate:
            self.timeline.after(
                self._delay_s(link) + chance() * 5,
                lambda: self._arrive(process, path, body, process.loop.create_future()),
            )
        return await answered

    def _delay_s(self, link: Link) -> float:
        delay_s = 0.001 + 0.02 * self.random.random()
        if link.slowness_s and self.random.random() < 0.5:
            delay_s += link.slowness_s * self.random.random()
        return delay_s

    def _break(self, process: Process, answered: asyncio.Future[Http]) -> None:
        error = ConnectionResetError(104, "Connection reset by peer")
        self.timeline.after(0.002, lambda: process.settle(answered, error=error))

    def _arrive(self, process: Process, path: str, body: JsonObject, answered: asyncio.Future[Http]) -> None:
        link, chance = self.links[process.machine_id], self.random.random
        if link.is_cut:
            return
        if self.plane.is_down:
            self._break(process, answered)
            return
        false = self._false_answer(link, path)
        if false is not None and (false[0] in _SAID_BEFORE or chance() < 0.5):
            self._answer(process, path, body, answered, *false)
            return

        def reply(status: int, content: bytes, extra: Mapping[str, str] | None = None) -> None:
            if status == 0:
                self._break(process, answered)
                return
            self._answer(process, path, body, answered, *(false or (status, content, extra or {})))

        self.judge.arrived(process, path, body)
        self.plane.call(process.machine_id, path, body, reply)
        if process.is_alive:
            process.machine.reached(f"arrive {path.rpartition('/')[2]}")

    def _false_answer(self, link: Link, path: str) -> tuple[int, bytes, Mapping[str, str]] | None:
        """What the plane says instead, whether or not it has done what it was asked for."""
        chance = self.random.random
        if link.overload and chance() < link.overload:
            status = 429 if chance() < 0.5 else 503
            return status, envelope(status, "come back later"), {"Retry-After": str(int(1 + 4 * chance()))}
        if link.hiccup and chance() < link.hiccup:
            status = self.random.choice(_BARE)
            return status, envelope(status, "database hiccup"), {}
        if link.garble and chance() < link.garble:
            return 200, b'{"code": 0, "message": "ok", "da', {}
        if link.unauthorized and chance() < link.unauthorized:
            return 401, envelope(401, "who are you?"), {}
        if link.lie and chance() < link.lie and path.startswith("/tasks/") and path != "/tasks/claim":
            code = self.random.choice(_LIES)
            return CODES[code].http_status, envelope(code, "not what is true"), {}
        return None

    def _answer(
        self,
        process: Process,
        path: str,
        body: JsonObject,
        answered: asyncio.Future[Http],
        status: int,
        content: bytes,
        extra: Mapping[str, str],
    ) -> None:
        link, chance = self.links[process.machine_id], self.random.random
        if link.drop_answer and chance() < link.drop_answer:
            if chance() < 0.5:
                self._break(process, answered)
            return
        headers = {**self.plane.headers(), **extra}

        def deliver() -> None:
            if not self.links[process.machine_id].is_cut and process.settle(answered, (status, headers, content)):
                self.judge.answered(process, path, body, status)

        self.timeline.after(self._delay_s(link) + link.late_answers_s, deliver)


class SimulatedControlPlane(ControlPlane):
    """The agent's client over the simulated network: all of it but the HTTP itself."""

    def __init__(
        self, network: Network, process: Process, clock: Clock, *, timeout_s: float, on_reconnect: Callable[[], None]
    ) -> None:
        super().__init__(
            "http://plane.invalid", token_file=None, timeout_s=timeout_s, clock=clock, on_reconnect=on_reconnect
        )
        self._network = network
        self._process = process

    async def _try(self, path: str, body: JsonObject, timeout_s: float, answer_max_bytes: int) -> Reply:
        sent_ns = self._clock.boottime_ns()
        try:
            async with asyncio.timeout(timeout_s):
                answer = parse_answer(*await self._network.post(self._process, path, body))
        except TimeoutError:
            answer = Answer(Verdict.RETRY, f"no answer within {timeout_s:g} s")
        except OSError as error:
            answer = Answer(Verdict.RETRY, f"{type(error).__name__}: {error}"[: limits.WIRE_MESSAGE_MAX_CHARS])
        return Reply(answer, sent_ns)
