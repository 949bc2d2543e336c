"""Register until it works, then heartbeats; what their answers ask for is handed on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from control_plane.faults import DropAfter, DropBefore, Respond, hiccup
from remotegpu_agent.presence import HostState, Presence, cancelled_attempts
from remotegpu_agent.supervise import Loops
from remotegpu_schemas.wire import HeartbeatAnswer, JsonObject, RegisterRequest
from tests.agent.support import AGENT, Contact, MovableClock, Told, contact, gather
from tests.control_plane.support import MACHINE
from tests.waiting import DEADLINE_S

JSON = {"Content-Type": "application/json"}


def answered(**data: object) -> Respond:
    """An accepted call with this data."""
    return Respond(200, json.dumps({"code": 0, "message": "ok", "data": data}).encode(), JSON)


@dataclass
class Watched:
    """A presence that runs, and what it told."""

    contact: Contact
    presence: Presence
    state: HostState
    registered: Told = field(default_factory=Told)
    answers: Told = field(default_factory=Told)

    async def calls(self, call: str, count: int) -> None:
        """Wait for so many calls in all."""
        await self.contact.plane.faults.wait_calls(call, count, DEADLINE_S)


@contextlib.asynccontextmanager
async def running(directory: Path, *faults: tuple[str, Any], interval_s: float = 0.02) -> AsyncGenerator[Watched]:
    """A plane with faults, and a presence that begins to talk to it."""
    loops, registered, answers = Loops(), Told(), Told()
    async with contact(directory, MovableClock()) as reached:
        for call, fault in faults:
            reached.plane.faults.order(call, fault)

        async def describe() -> RegisterRequest:
            return RegisterRequest(
                agent_id=AGENT,
                machine_id=MACHINE,
                version="0",
                hostname="gpu-7",
                ip_address="192.0.2.7",
                agent_port=0,
                max_workers=2,
            )

        async def metrics() -> JsonObject:
            return {"memory_used_gb": 3.4, "gpu_metrics": []}

        state = HostState("degraded", ["because"])
        presence = Presence(
            reached.client,
            interval_s=interval_s,
            random=lambda: 0.0,
            describe=describe,
            metrics=metrics,
            state=lambda: state,
            on_registered=lambda: registered("registered"),
            on_answer=lambda answer: _told(answers, answer),
        )
        loops.run_forever("presence", presence.run)
        try:
            yield Watched(reached, presence, state, registered, answers)
        finally:
            await loops.close()
            assert not loops.failures


async def _told(answers: Told, answer: HeartbeatAnswer) -> None:
    answers(answer)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is slept between registers; each pause is over at once."""
    taken: list[float] = []
    sleep = asyncio.sleep

    async def note(delay: float) -> None:
        taken.append(delay)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    return taken


async def test_it_registers_until_it_works(tmp_path: Path, pauses: list[float]) -> None:
    """Lost connections and errors delay it, a Retry-After is honoured, a bad token is tried slowly; then it beats."""
    faults = [DropBefore(), Respond(500), Respond(503, b"", {"Retry-After": "7"}), Respond(401), DropAfter()]
    async with running(tmp_path, *[("register", fault) for fault in faults]) as watched:
        await watched.registered.wait()
        assert watched.presence.registered.is_set()
        assert watched.presence.features == {"release"}
        await watched.answers.wait(2)
        assert watched.contact.plane.faults.calls["register"] == 6
        [before, error, asked, unauthorized, lost] = pauses[:5]
        assert before < 0.5
        assert error < 1
        assert asked == 7
        assert unauthorized >= 0.1 * 5 * 2**3 > lost
        assert len(watched.registered.calls) == 1


async def test_f18_a_heartbeat_waits_for_its_retry_after(tmp_path: Path, pauses: list[float]) -> None:
    """F18: a heartbeat that was put off waits for so long, also when something would have it sent at once."""
    busy = Respond(429, b"", {"Retry-After": "40"})
    async with running(tmp_path, ("heartbeat", busy), interval_s=DEADLINE_S * 2) as watched:
        await watched.calls("heartbeat", 1)
        watched.presence.beat_now()
        await watched.answers.wait(1)
        assert pauses == [40.0]


async def test_the_plane_learns_who_and_how(tmp_path: Path) -> None:
    """The registration and the latest heartbeat are what the plane keeps, figures as integers where it needs them."""
    async with running(tmp_path) as watched:
        await watched.answers.wait(1)
        [machine] = (await watched.contact.operator.call("GET", "/machines")).data["machines"]
        text = json.dumps(machine)
        assert '"hostname": "gpu-7"' in text
        assert '"memory_used_gb": 3,' in text
        assert '"because"' in text


async def test_needs_collect_registers_again(tmp_path: Path) -> None:
    """A plane that has forgotten the hardware gets it once more, and heartbeats go on."""
    async with running(tmp_path, ("heartbeat", answered(status="unknown", needs_collect=True))) as watched:
        await watched.registered.wait(2)
        await watched.answers.wait(3)
        assert watched.contact.plane.faults.calls["register"] == 2


@pytest.mark.parametrize("fault", [hiccup(404), hiccup(404, in_body=True)])
async def test_an_agent_that_the_plane_does_not_know_registers_again(tmp_path: Path, fault: Respond) -> None:
    """A bare 404 to a heartbeat: registering is harmless, and cures a plane that has lost its memory."""
    async with running(tmp_path, ("heartbeat", fault)) as watched:
        await watched.registered.wait(2)
        await watched.answers.wait(1)


@pytest.mark.parametrize("fault", [Respond(500), Respond(401), DropBefore(), Respond(404, b"404 page not found")])
async def test_other_failures_of_a_heartbeat_only_delay_the_next(tmp_path: Path, fault: Any) -> None:
    """Nothing is registered again for an outage, a bad token, or a plane without heartbeats."""
    async with running(tmp_path, ("heartbeat", fault)) as watched:
        await watched.answers.wait(2)
        assert watched.contact.plane.faults.calls["register"] == 1


@pytest.mark.parametrize("answer", [hiccup(404), answered(needs_collect=True)])
async def test_a_plane_that_always_asks_for_a_register_is_not_hammered(tmp_path: Path, answer: Respond) -> None:
    """Whatever it answers, calls come at the pace of heartbeats."""
    async with running(tmp_path, *[("heartbeat", answer)] * 50, interval_s=60.0) as watched:
        await watched.registered.wait(1)
        with contextlib.suppress(TimeoutError):
            await watched.contact.plane.faults.wait_calls("register", 4, 0.3)
        assert watched.contact.plane.faults.calls["register"] <= 2
        assert watched.presence.registered.is_set()


async def test_wishes_are_handed_on(tmp_path: Path) -> None:
    """Cancellations and drain of an answer reach whoever acts; what is malformed is left out."""
    wishes = answered(cancelled=[{"task_id": "t", "attempt_id": "a"}, {"task_id": "t"}, 7], drain=True)
    async with running(tmp_path, ("heartbeat", wishes)) as watched:
        [first, second] = (await watched.answers.wait(2))[:2]
        assert cancelled_attempts(first) == ["a"]
        assert first.wants_drain
        assert (cancelled_attempts(second), second.wants_drain) == ([], False)


async def test_a_change_is_told_at_once(tmp_path: Path) -> None:
    """`beat_now` does not wait for the interval."""
    async with running(tmp_path, interval_s=600.0) as watched:
        await watched.answers.wait(1)
        watched.presence.beat_now()
        await gather(watched.calls("heartbeat", 2))
