"""Makes the host known to the control plane and keeps it known: register once, then heartbeats.

What a heartbeat's answer asks for (cancellations, drain, a new register) is handed on; nothing is decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from remotegpu_agent.control_plane import ControlPlane
from remotegpu_queue import backoff
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.wire import (
    HeartbeatAnswer,
    HeartbeatRequest,
    JsonObject,
    RegisterRequest,
    Verdict,
    parse_features,
    parse_heartbeat,
)

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class HostState:
    """What a heartbeat says about the agent itself."""

    state: str
    reasons: list[str]


class Presence:
    """Registers, then sends a heartbeat every `interval_s`. `registered` is set while the plane knows this agent."""

    def __init__(
        self,
        plane: ControlPlane,
        *,
        interval_s: float,
        random: Callable[[], float],
        describe: Callable[[], Awaitable[RegisterRequest]],
        metrics: Callable[[], Awaitable[JsonObject]],
        state: Callable[[], HostState],
        on_registered: Callable[[], None],
        on_answer: Callable[[HeartbeatAnswer], Awaitable[None]],
    ) -> None:
        self._plane = plane
        self._interval_s = interval_s
        self._random = random
        self._describe = describe
        self._metrics = metrics
        self._state = state
        self._on_registered = on_registered
        self._on_answer = on_answer
        self._due = asyncio.Event()
        self._asked_pause_s = 0.0
        self._agent_id = ""
        self._machine_id = ""
        self.features: frozenset[str] = frozenset()
        self.registered = asyncio.Event()

    def beat_now(self) -> None:
        """Send the next heartbeat at once: something in it has changed."""
        self._due.set()

    async def run(self) -> None:
        """Register until it works, then beat for ever; registers again when the plane asks for the hardware."""
        while True:
            await self._register()
            beats = 0
            while await self._beat():
                beats += 1
                await self._pause()
            if not beats:
                # Registering has not helped; a plane that always asks for it is not asked faster than heartbeats go.
                await self._pause()

    async def _register(self) -> None:
        self.registered.clear()
        failures = 0
        while True:
            request = await self._describe()
            self._agent_id, self._machine_id = request.agent_id, request.machine_id
            reply = await self._plane.register(request)
            if reply.verdict is Verdict.OK:
                break
            failures += 1
            is_slow = reply.verdict not in {Verdict.RETRY, Verdict.AMBIGUOUS}
            log.error("this agent could not be registered", error=reply.answer.message, failures=failures)
            pause_s = backoff.full_jitter(
                failures - 1, base_s=5.0 if is_slow else 0.5, cap_s=60.0, fraction=self._random()
            )
            await self._plane.pause(max(pause_s, reply.answer.retry_after_s or 0.0), reply.answer)
        self.features = parse_features(reply.answer.data)
        log.info("registered", machine_id=self._machine_id, features=sorted(self.features))
        self.registered.set()
        self._on_registered()

    async def _beat(self) -> bool:
        """Whether to go on without a new register."""
        host = self._state()
        reply = await self._plane.heartbeat(
            HeartbeatRequest(
                agent_id=self._agent_id,
                machine_id=self._machine_id,
                metrics=await self._metrics(),
                state=host.state,
                reasons=host.reasons,
            )
        )
        self._asked_pause_s = reply.answer.retry_after_s or 0.0
        if reply.verdict is Verdict.OK:
            answer = parse_heartbeat(reply.answer.data)
            await self._on_answer(answer)
            return not answer.needs_collect
        log.warning("a heartbeat was not accepted", error=reply.answer.message, verdict=reply.verdict)
        # An unknown agent (the plane lost its memory) answers 30004 or a bare 404: a register is harmless and cures it.
        return reply.verdict not in {Verdict.SUPERSEDED, Verdict.AMBIGUOUS}

    async def _pause(self) -> None:
        """Until the next heartbeat is due. What happens here cuts the interval short, never the plane's Retry-After."""
        seconds = self._interval_s * (0.9 + 0.2 * self._random()) - self._asked_pause_s
        if self._asked_pause_s > 0:
            await asyncio.sleep(self._asked_pause_s)
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._due.wait()
        except TimeoutError:
            return
        self._due.clear()


def cancelled_attempts(answer: HeartbeatAnswer) -> list[AttemptId]:
    """The attempts that the plane wants stopped."""
    return [attempt_id for _, attempt_id in answer.cancelled]
