"""Links that are cut for longer or shorter than a lease, answers that are lost, attempts that went to another host.

When something was alive is told by the tasks themselves, which write the time down again and again: a test that looks
on a busy machine would look too late.
"""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pytest

from control_plane.faults import DropAfter, Respond, hiccup
from remotegpu_schemas.errors import CODES, Code
from tests.chaos.test_named_points import at_plane
from tests.end_to_end.fleet import Fleet, fleet
from tests.end_to_end.gates import Gate
from tests.waiting import DEADLINE_S, until_so

_JSON: Final = {"Content-Type": "application/json"}
_BUSY_S: Final = 3.0
"""So late may a signal be on a machine that many share."""
_ONE_SLOT: Final = {"capacity": {"max_concurrent": 1}}
"""While the one task runs no claim is on its way; drained, the host does not claim it again either."""
_DEAF: Final = "trap '' TERM; while :; do date +%s.%N >>{file}; sleep 0.05; done"
"""It does not heed its stop signal, and writes the time down."""


def deaf(file: Path) -> str:
    """A script with a daemon in a session of its own, both of which only SIGKILL ends."""
    one = _DEAF.format(file=file)
    return f'setsid bash -c "{one}" & {one}'


def last_seen_s(file: Path) -> float:
    """When a process of the task was last alive (seconds since 1970)."""
    return max(float(line) for line in file.read_text().split("\n")[:-1])


async def wait_still(file: Path) -> None:
    """Until nobody writes to the file any more: in a second, twenty times what its writers need for a line."""
    size = -1
    while size != file.stat().st_size:
        size = file.stat().st_size
        await asyncio.sleep(1.0)


def expires_s(task: dict[str, Any]) -> float:
    """When the plane's lease on a task ends (seconds since 1970)."""
    return datetime.fromisoformat(task["lease_expires_at"]).timestamp()


async def test_f11_the_whole_tree_is_dead_at_the_deadline(tmp_path: Path) -> None:
    """F11: cut off, with a deaf task and its daemon: neither is alive when the plane's lease ends."""
    file = tmp_path / "alive"
    async with fleet(tmp_path, {"lease": {"margin": 0.5}}, lease_ttl_s=4.0) as both:
        [task_id] = await both.submit({"script": deaf(file), "timeout": 90, "grace_period_sec": 1})
        await both.host.wait_running(task_id)
        await until_so(file.exists)
        await both.link.cut()
        ends_s = expires_s(await both.operator.task(task_id))
        detail = await both.host.wait_for(task_id)
        assert (detail["state"], detail["cause"], detail["exit_code"]) == ("failed", "lease_lost", 125)
        await wait_still(file)
        assert last_seen_s(file) <= ends_s


async def test_f11_what_finished_in_time_is_delivered_after_the_lease(tmp_path: Path) -> None:
    """F11: the task ends while the link is cut, within its lease; its result counts, although it comes after it."""
    gate = Gate(tmp_path / "gate")
    async with fleet(tmp_path, {**_ONE_SLOT, "lease": {"margin": 0.2}}, lease_ttl_s=3.0) as both:
        [task_id] = await both.submit({"command": f"{gate.wait}; echo in time"})
        await both.host.wait_running(task_id)
        await at_plane(both, task_id, "running")
        await both.host.post("/drain")
        await both.link.cut()
        gate.open()
        assert (await both.host.wait_for(task_id))["state"] == "completed"
        await at_plane(both, task_id, "pending")
        await both.link.open()
        [task] = await both.ended([task_id])
        assert (task["result"]["stdout"], task["completions"]["accepted"]) == ("in time\n", 1)
        assert [attempt["state"] for attempt in task["attempt_list"]] == ["completed"]


async def test_f12_continue_ends_when_the_plane_says_so(tmp_path: Path) -> None:
    """F12: with `on_unreachable: continue` the run outlives its lease; 30003 after the outage stops all of it."""
    file = tmp_path / "alive"
    settings = {**_ONE_SLOT, "lease": {"margin": 0.5, "on_unreachable": "continue"}}
    async with fleet(tmp_path, settings, lease_ttl_s=2.0) as both:
        [task_id] = await both.submit({"script": deaf(file), "timeout": 90, "grace_period_sec": 1})
        before = await both.host.wait_running(task_id)
        await until_so(file.exists)
        await both.host.post("/drain")
        await both.link.cut()
        await at_plane(both, task_id, "pending")
        held = await both.host.until_shown(f"/tasks/{task_id}", lambda task: task["lease_left_s"] == 0)
        assert (held["state"], held["process_id"]) == ("running", before["process_id"])
        await both.link.open()
        detail = await both.host.wait_for(task_id)
        assert (detail["state"], detail["cause"]) == ("failed", "lease_lost")
        await wait_still(file)


async def test_f13_lost_answers_of_a_whole_life_count_once(tmp_path: Path) -> None:
    """F13: of every call of a task's life the first two answers are lost: one run, one start, one result."""
    gate, trace = Gate(tmp_path / "gate"), tmp_path / "trace"
    script = f'echo x >>{trace}; echo "50 half" >>"$REMOTEGPU_PROGRESS"; {gate.wait}; echo once'
    async with fleet(tmp_path, is_started=False, lease_ttl_s=60.0) as both:
        faults = both.plane.faults
        for call in ("claim", "start", "renew", "progress", "complete"):
            faults.order(call, DropAfter(), times=2)
        [task_id] = await both.submit({"script": script, "renew_interval_sec": 0.2})
        await both.host.start()
        for call in ("start", "renew", "progress"):
            await faults.wait_calls(call, 3, DEADLINE_S)
        gate.open()
        await faults.wait_calls("complete", 3, DEADLINE_S)
        [task] = await both.ended([task_id])
        assert (task["result"]["stdout"], trace.read_text()) == ("once\n", "x\n")
        assert (task["progress"], len(task["attempt_list"])) == ({"percent": 50.0, "message": "half"}, 1)
        kinds = [event["kind"] for event in task["events"]]
        assert (kinds.count("started"), task["completions"]["accepted"]) == (1, 1)


async def test_f14_an_attempt_that_went_to_another_host(tmp_path: Path) -> None:
    """F14: the plane refuses the old attempt: its own process is stopped, the newer one's, elsewhere, never touched."""
    gate, trace = Gate(tmp_path / "gate"), tmp_path / "trace"
    command = f'echo "$REMOTEGPU_MACHINE_ID" >>{trace}; {gate.wait}; echo "$REMOTEGPU_MACHINE_ID"'
    settings = {"lease": {"on_unreachable": "continue"}}
    async with fleet(tmp_path, settings, hosts=2, is_started=False, lease_ttl_s=3.0) as all_of_it:
        old, new = all_of_it.hosts
        await old.start()
        [task_id] = await all_of_it.submit({"command": command})
        await old.wait_running(task_id)
        await all_of_it.link.cut()
        await new.start()
        newer = await new.wait_running(task_id)
        assert (await old.get(f"/tasks/{task_id}"))["state"] == "running"
        await all_of_it.link.open()
        detail = await old.wait_for(task_id)
        assert (detail["state"], detail["cause"]) == ("failed", "superseded")
        assert (await new.get(f"/tasks/{task_id}"))["process_id"] == newer["process_id"]
        gate.open()
        [task] = await all_of_it.ended([task_id])
        assert (task["result"]["stdout"], task["completions"]["accepted"]) == ("machine-2\n", 1)
        assert trace.read_text() == "machine-1\nmachine-2\n"


async def test_f15_a_refused_renewal_stops_the_tree_within_the_grace_period(tmp_path: Path) -> None:
    """F15: 30003: SIGTERM to the task, and SIGKILL to what is left of its tree when the grace period is over."""
    file, told = tmp_path / "alive", tmp_path / "told"
    grace_s = 2.0
    refusal = json.dumps({"code": Code.LEASE_EXPIRED, "message": "lease expired"}).encode()
    script = (
        f"trap 'date +%s.%N >>{told}' TERM; setsid bash -c \"{_DEAF.format(file=file)}\" & "
        f"while :; do date +%s.%N >>{file}; sleep 0.05; done"
    )
    async with fleet(tmp_path, _ONE_SLOT, lease_ttl_s=60.0) as both:
        [task_id] = await both.submit(
            {"script": script, "timeout": 90, "grace_period_sec": grace_s, "renew_interval_sec": 0.2}
        )
        await both.host.wait_running(task_id)
        await until_so(file.exists)
        await both.host.post("/drain")
        both.plane.faults.order_always("renew", Respond(CODES[Code.LEASE_EXPIRED].http_status, refusal, _JSON))
        detail = await both.host.wait_for(task_id)
        assert (detail["state"], detail["cause"]) == ("failed", "lease_lost")
        await wait_still(file)
        told_s = float(told.read_text().split()[0])
        assert told_s + 0.5 * grace_s <= last_seen_s(file) <= told_s + grace_s + _BUSY_S


async def test_f50_a_task_that_comes_twice_or_too_late(tmp_path: Path) -> None:
    """F50: twice in one answer, and again in the next, it runs once; one whose lease is over is not started."""
    trace = tmp_path / "trace"
    tasks = [
        {"id": "one", "attempt_id": "a-1", "command": f"echo one >>{trace}; sleep 1"},
        {"id": "one", "attempt_id": "a-1", "command": f"echo one >>{trace}"},
        {"id": "late", "attempt_id": "a-2", "command": f"echo late >>{trace}", "lease_expires_at": _LONG_AGO},
    ]
    async with fleet(tmp_path) as both:
        for given in (tasks, tasks[:1]):
            body = json.dumps({"code": 0, "message": "ok", "data": {"tasks": given}}).encode()
            both.plane.faults.order("claim", Respond(200, body, _JSON))
        both.plane.faults.order_always("start", _OK)
        both.plane.faults.order_always("renew", _OK)
        both.plane.faults.order_always("complete", _OK)
        await both.submit({"command": "true"})  # wakes the long poll that is held
        assert (await both.host.wait_for("one"))["state"] == "completed"
        late = await both.host.wait_for("late")
        assert (late["state"], late["cause"], late["started_at"]) == ("failed", "lease_lost", None)
        assert trace.read_text() == "one\n"


_LONG_AGO: Final = "2020-01-01T00:00:00Z"
_OK: Final = Respond(200, b'{"code": 0, "message": "ok", "data": {}}', _JSON)


@pytest.mark.parametrize("status", [404, 409, 410])
async def test_f51_under_a_lasting_hiccup_the_deadline_alone_decides(tmp_path: Path, status: Any) -> None:
    """F51: bare answers to every renewal stop nothing before the lease's end, which stops it; the result is kept."""
    file = tmp_path / "alive"
    async with fleet(tmp_path, {**_ONE_SLOT, "lease": {"margin": 0.5}}, lease_ttl_s=4.0) as both:
        both.plane.faults.order_always("renew", hiccup(status))
        both.plane.faults.order("complete", hiccup(status), times=2)
        [task_id] = await both.submit(
            {"script": deaf(file), "timeout": 90, "grace_period_sec": 1, "renew_interval_sec": 0.2}
        )
        ends_s = expires_s(await at_plane(both, task_id, "running"))
        await both.host.post("/drain")
        detail = await both.host.wait_for(task_id)
        assert (detail["state"], detail["cause"]) == ("failed", "lease_lost")
        await wait_still(file)
        assert ends_s - 2.0 <= last_seen_s(file) <= ends_s
        assert both.plane.faults.calls["renew"] >= 3
        await both.host.until_shown("/queue/status", lambda now: now["reports_waiting"] == 0)
        assert (await both.host.get("/queue/status"))["dead_letters"] == 0
        assert (await both.operator.task(task_id))["attempt_list"][0]["state"] == "given_up"


@pytest.mark.parametrize("way", ["cut", "hang", "reset"])
async def test_f55_a_loss_of_contact_shorter_than_the_lease(tmp_path: Path, way: str) -> None:
    """F55: the same process goes on, its lease is renewed when contact is back, and nothing is reported twice."""
    gate, trace = Gate(tmp_path / "gate"), tmp_path / "trace"
    settings = {"control_plane": {"timeout": 1, "heartbeat_interval": 0.3}}
    async with fleet(tmp_path, settings, lease_ttl_s=30.0) as both:
        [task_id] = await both.submit({"command": f"echo x >>{trace}; {gate.wait}", "renew_interval_sec": 0.3})
        before = await both.host.wait_running(task_id)
        await both.plane.faults.wait_calls("renew", 1, DEADLINE_S)
        renewals = await _renewals(both, task_id)
        await getattr(both.link, way)()
        if way != "reset":
            await both.host.until_shown("/queue/status", lambda now: not now["control_plane"]["is_connected"])
        await both.link.open()
        await both.host.until_shown("/queue/status", lambda now: now["control_plane"]["is_connected"])
        await both.plane.faults.wait_calls("renew", both.plane.faults.calls["renew"] + 1, DEADLINE_S)
        assert (await both.host.get(f"/tasks/{task_id}"))["process_id"] == before["process_id"]
        gate.open()
        [task] = await both.ended([task_id])
        assert (task["status"], trace.read_text()) == ("completed", "x\n")
        assert await _renewals(both, task_id) > renewals
        assert task["completions"] == {"accepted": 1, "repeated": 0, "rejected": 0}
        assert [event["kind"] for event in task["events"]] == ["created", "claimed", "started", "completed"]


async def _renewals(both: Fleet, task_id: str) -> int:
    return int((await both.operator.task(task_id))["attempt_list"][0]["renewals"])
