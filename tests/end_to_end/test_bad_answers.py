"""What a plane, or something before it, may answer: the agent reads it to a bound, says so, and tries again."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import pytest

from remotegpu_schemas import limits
from tests import middle
from tests.end_to_end.fleet import Fleet, fleet
from tests.end_to_end.gates import Gate
from tests.waiting import until_so

CALLS: Final = ("register", "heartbeat", "claim", "start", "renew", "complete")
SETTINGS: Final[dict[str, Any]] = {
    "control_plane": {"timeout": 1, "long_poll": 1, "poll_interval": 0.1, "heartbeat_interval": 0.3},
}
_LINES: Final = {
    "register": "this agent could not be registered",
    "heartbeat": "a heartbeat was not accepted",
    "claim": "a claim was not answered",
    "start": "a report was not accepted",
    "renew": "a lease could not be renewed",
    "complete": "a report was not accepted",
}
HEAD: Final = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: "
_HUGE_BYTES: Final = limits.WIRE_CLAIM_ANSWER_MAX_BYTES + 16 * limits.MIB
_PIECE: Final = b"x" * limits.MIB


def _answer(body: bytes) -> bytes:
    return HEAD + b"%d\r\n\r\n%s" % (len(body), body)


KINDS: Final = {
    "malformed": (middle.saying(_answer(b'{"code": 0, "data": {"tasks": [}}')), "without an envelope"),
    "no_http": (middle.saying(b"220 mail.example ESMTP\r\n"), "does not answer in HTTP as it should"),
    "truncated": (middle.saying(HEAD + b'900\r\n\r\n{"code": 0, "data": {"ta'), "the answer ended before it was whole"),
    "wrong_type": (middle.saying(_answer(b'{"code": [0], "data": "tasks"}')), "without an envelope"),
    "huge": (
        middle.saying(HEAD + b"%d\r\n\r\n" % _HUGE_BYTES, *[_PIECE] * (_HUGE_BYTES // len(_PIECE))),
        "the answer is longer than",
    ),
    "slow": (middle.dripping(HEAD + b'900\r\n\r\n{"code": 0, "data": {'), "no whole answer within"),
}


@contextlib.asynccontextmanager
async def behind_a_front(directory: Path) -> AsyncGenerator[tuple[Fleet, middle.Front]]:
    """A plane, a front before it, and an agent that is not started and knows the front alone.

    A lease of 20 s: a renewal that hangs for a quarter of it does not end it.
    """
    async with fleet(directory, SETTINGS, is_started=False, lease_ttl_s=20.0) as all_of_it:
        front = middle.Front(all_of_it.plane.port)
        async with middle.listening(front.respond) as port:
            all_of_it.host.configure({"control_plane": {"url": f"http://{middle.HOST}:{port}"}})
            yield all_of_it, front
            await all_of_it.host.stop()


def _memory_peak_bytes(pid: int) -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("kind", KINDS)
async def test_f19_a_bad_answer_to_any_call_is_bounded_logged_and_retried(tmp_path: Path, kind: str) -> None:
    """F19: every call of a task's life meets it once; the task runs once, its result arrives once, nothing crashes."""
    odd, text = KINDS[kind]
    gate, trace = Gate(tmp_path / "gate"), tmp_path / "trace"
    async with behind_a_front(tmp_path) as (all_of_it, front):
        host = all_of_it.host
        front.ordered.update({call: [odd] for call in ("register", "claim", "start", "renew", "complete")})
        [task_id] = await all_of_it.submit({"command": f"echo run >>{trace}; {gate.wait}", "renew_interval_sec": 0.2})
        await host.start()
        memory_before = _memory_peak_bytes(host.pid)
        await until_so(lambda: "register" in _counted(front, 2))
        front.ordered["heartbeat"] = [odd]
        await until_so(lambda: {"heartbeat", "renew"} <= _counted(front, 3))
        gate.open()
        [task] = await all_of_it.ended([task_id])
        assert (task["status"], task["completions"]["accepted"], trace.read_text()) == ("completed", 1, "run\n")
        assert not any(front.ordered.values())
        status = await host.until_shown("/queue/status", lambda status: status["state"] == "ready")
        assert (status["control_plane"]["error"], status["dead_letters"]) == (None, 0)
        events = host.events()
        for call, line in _LINES.items():
            said = [event for event in events if event["event"] == line and _is_of(event, call)]
            assert any(text in (event.get("error") or event.get("answer") or "") for event in said), (call, said)
        assert not [event for event in events if "exception" in event]
        if kind == "huge":
            assert _memory_peak_bytes(host.pid) - memory_before < limits.WIRE_CLAIM_ANSWER_MAX_BYTES + 32 * limits.MIB


def _counted(front: middle.Front, count: int) -> set[str]:
    """The calls that came at least so often."""
    names = [name for name, _ in front.seen]
    return {name for name in names if names.count(name) >= count}


def _is_of(event: dict[str, Any], call: str) -> bool:
    return "kind" not in event or event["kind"] == call


async def test_f19_a_plane_that_answers_nothing_else_is_named_in_the_status(tmp_path: Path) -> None:
    """F19: a portal that answers every call with a page: the status says what it is, and a running task goes on."""
    gate = Gate(tmp_path / "gate")
    portal = middle.saying(_answer(b"<html><title>Please log in</title></html>"))
    async with behind_a_front(tmp_path) as (all_of_it, front):
        host = all_of_it.host
        await host.start()
        [task_id] = await all_of_it.submit({"command": f"{gate.wait}; exit 7"})
        await host.wait_running(task_id)
        front.lasting.update(dict.fromkeys(CALLS, portal))
        status = await host.until_shown("/queue/status", lambda status: status["state"] == "degraded")
        assert status["control_plane"]["is_connected"] is False
        assert "Please log in" in status["control_plane"]["error"]
        front.lasting.clear()
        await host.until_shown("/queue/status", lambda status: status["state"] == "ready")
        gate.open()
        [task] = await all_of_it.ended([task_id])
        assert task["result"]["exit_code"] == 7


@pytest.mark.parametrize("status", [b"429 Too Many Requests", b"503 Service Unavailable"])
async def test_f18_every_call_waits_as_long_as_the_plane_asks(tmp_path: Path, status: bytes) -> None:
    """F18: register, heartbeat, claim, start, renew, complete: none comes again before its Retry-After is over."""
    busy = middle.saying(b"HTTP/1.1 %s\r\nRetry-After: 2\r\nConnection: close\r\nContent-Length: 0\r\n\r\n" % status)
    gate = Gate(tmp_path / "gate")
    async with behind_a_front(tmp_path) as (all_of_it, front):
        host = all_of_it.host
        front.ordered.update({call: [busy] for call in ("register", "claim", "start", "renew", "complete")})
        [task_id] = await all_of_it.submit({"command": gate.wait, "renew_interval_sec": 0.2})
        await host.start()
        await until_so(lambda: "register" in _counted(front, 2))
        front.ordered["heartbeat"] = [busy]
        before = len([name for name, _ in front.seen if name == "heartbeat"])
        await until_so(lambda: "renew" in _counted(front, 3) and "heartbeat" in _counted(front, before + 2))
        gate.open()
        [task] = await all_of_it.ended([task_id])
        assert (task["status"], task["completions"]["accepted"]) == ("completed", 1)
        for call in CALLS:
            times = [time_s for name, time_s in front.seen if name == call]
            assert _waited_after(times, before if call == "heartbeat" else 0) >= 2.0, call


def _waited_after(times: list[float], index: int) -> float:
    return times[index + 1] - times[index]
