"""F20: the wall clock jumps by a day, the host is suspended: leases, timeouts and delays go by CLOCK_BOOTTIME."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from remotegpu_sidecar import identity, record
from tests.end_to_end.fleet import fleet
from tests.end_to_end.gates import Gate
from tests.end_to_end.skewed_clock import SkewedClock
from tests.waiting import DEADLINE_S, until_so

DAY_S = 86400


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
async def test_f20_the_wall_clock_jumps(tmp_path: Path, jump_s: int) -> None:
    """F20: under a lease of seconds, a timeout, and a retry's delay: nothing lapses, ends early or waits for a day."""
    gate = Gate(tmp_path / "gate")
    settings = {"lease": {"margin": 0.5}}
    async with fleet(tmp_path, settings, is_started=False, lease_ttl_s=8.0) as both:
        clock = SkewedClock(both.host)
        await both.host.start()
        leased, timed, delayed = await both.submit(
            {"command": f"{gate.wait}; exit 5", "renew_interval_sec": 0.2},
            {"command": "sleep 600", "timeout": 3},
            {"command": "exit $((2 - REMOTEGPU_RUN_NUMBER))", "retry": {"max": 1, "delay": 2}},
        )
        for task_id in (leased, timed):
            await both.host.wait_running(task_id)
        await both.host.until_shown(f"/tasks/{delayed}", lambda task: task["retries_used"] == 1)
        begun_ns = identity.boottime_ns()
        for seconds in (jump_s, 0, jump_s):
            clock.jump(seconds)
            renewals = both.plane.faults.calls["renew"]
            await both.plane.faults.wait_calls("renew", renewals + 3, DEADLINE_S)
        detail = await both.host.get(f"/tasks/{leased}")
        assert (detail["state"], 0 < detail["lease_left_s"] <= 8) == ("running", True)
        results = await both.ended([timed, delayed])
        took_s = (identity.boottime_ns() - begun_ns) / 1e9
        assert [task["result"]["cause"] for task in results] == ["timed_out", "succeeded"]
        assert results[0]["result"]["usage"]["wall_s"] >= 3
        assert took_s < DEADLINE_S
        # A task that comes now is claimed under a lease, started, and reported like any other.
        assert (await both.task({"command": "true"}))["result"]["cause"] == "succeeded"
        gate.open()
        [task] = await both.ended([leased])
        assert task["result"]["cause"] == "exit_code"
        kinds = [event["kind"] for event in task["events"]]
        assert kinds == ["created", "claimed", "started", "completed"]


async def test_f20_after_a_suspend_a_lease_is_renewed_at_once(tmp_path: Path) -> None:
    """F20: a host that slept until shortly before a lease's end renews it when it wakes, not when it had meant to."""
    gate = Gate(tmp_path / "gate")
    async with fleet(tmp_path, {"lease": {"renew_interval": 200}}, is_started=False, lease_ttl_s=3600.0) as both:
        clock = SkewedClock(both.host)
        await both.host.start()
        [task_id] = await both.submit({"command": f"{gate.wait}; exit 5"})
        await both.host.wait_running(task_id)
        await both.plane.faults.wait_calls("start", 1, DEADLINE_S)
        await both.host.until_shown("/queue/status", lambda status: status["reports_waiting"] == 0)
        assert both.plane.faults.calls["renew"] == 0
        clock.sleep(3400)
        await both.plane.faults.wait_calls("renew", 1, DEADLINE_S)
        await both.host.until_shown(f"/tasks/{task_id}", lambda task: task["lease_left_s"] > 1800)
        gate.open()
        [task] = await both.ended([task_id])
        assert task["result"]["cause"] == "exit_code"


async def test_f20_after_a_suspend_a_delay_is_over(tmp_path: Path) -> None:
    """F20: a retry that was due while the host slept starts when it wakes."""
    async with fleet(tmp_path, is_started=False) as both:
        clock = SkewedClock(both.host)
        await both.host.start()
        task_id = await both.host.submit(command="exit $((2 - REMOTEGPU_RUN_NUMBER))", retry={"max": 1, "delay": 1800})
        await both.host.until_shown(f"/tasks/{task_id}", lambda task: task["retries_used"] == 1)
        clock.sleep(1800)
        assert (await both.host.wait_for(task_id))["state"] == "completed"


@pytest.mark.parametrize("what", ["lease", "timeout"])
async def test_f20_nothing_had_its_turn_until_it_was_over(tmp_path: Path, what: str) -> None:
    """F20: agent, spawner, shim and task all stand still, as in a suspend, past a lease or a timeout: dead at once."""
    async with fleet(tmp_path, {"lease": {"margin": 0.2}}, lease_ttl_s=3.0 if what == "lease" else 60.0) as both:
        timeout = {} if what == "lease" else {"timeout": 2}
        [task_id] = await both.submit({"command": "trap '' TERM; while :; do sleep 1; done", **timeout})
        process_id = (await both.host.wait_running(task_id))["process_id"]
        await both.plane.faults.wait_calls("start", 1, DEADLINE_S)
        over_ns = identity.boottime_ns() + 4 * 10**9
        main = psutil.Process(process_id)
        everybody = [both.host.pid, (await both.host.spawner()).pid, main.ppid(), process_id]
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        try:
            await until_so(lambda: identity.boottime_ns() > over_ns)
        finally:
            for pid in reversed(everybody):
                os.kill(pid, signal.SIGCONT)
        path = next((both.host.state_dir / "attempts").iterdir()) / "record"
        await until_so(lambda: "ended" in record.read(path)[0])
        # Whoever wakes first sees to the lease: the shim by itself, or the agent, which asks the shim for a stop.
        assert record.read(path)[0]["ended"]["ended_by"] in {what, *(["stop"] if what == "lease" else [])}
        detail = await both.host.until_shown(f"/tasks/{task_id}", lambda task: task["runs"][0]["cause"] is not None)
        assert detail["runs"][0]["cause"] == {"lease": "lease_lost", "timeout": "timed_out"}[what]
        await both.host.post("/drain", {})
        await both.host.call("POST", f"/tasks/{task_id}/cancel")
