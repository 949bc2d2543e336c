"""The main job: tasks claimed over HTTP, run, and every result reported, whatever becomes of the agent meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from control_plane.faults import DropAfter, Respond, hiccup
from remotegpu_schemas.errors import Code
from tests.end_to_end.fleet import fleet
from tests.end_to_end.gates import Gate
from tests.waiting import DEADLINE_S, until


async def test_500_tasks_three_kills_none_lost_none_twice(tmp_path: Path) -> None:
    """500 tasks, 50 of them failing on purpose, the agent killed three times: each result is what the task did, once.

    A lease of 10 s, so that what a killed agent had claimed and not stored comes back within the test.
    """
    trace = tmp_path / "trace"
    trace.mkdir()
    tasks = [
        {
            "id": f"t-{number:03}",
            "command": f"echo $$ >>{trace}/{number}; echo out-{number}; echo err-{number} >&2; exit {_code(number)}",
        }
        for number in range(500)
    ]
    async with fleet(tmp_path, lease_ttl_s=10.0) as all_of_it:
        task_ids = await all_of_it.submit(*tasks)
        for kill_after in (60, 200, 350):
            await all_of_it.plane.faults.wait_calls("complete", kill_after, DEADLINE_S)
            await all_of_it.host.kill()
            await all_of_it.host.start()
        results = await all_of_it.ended(task_ids, deadline_s=110)
        for number, task in enumerate(results):
            result, code = task["result"], _code(number)
            assert task["status"] == ("failed" if code else "completed"), task
            assert (result["exit_code"], result["cause"]) == (code, "exit_code" if code else "succeeded"), task
            assert (result["stdout"], result["stderr"]) == (f"out-{number}\n", f"err-{number}\n"), task
            assert task["completions"]["accepted"] == 1, task
            assert len((trace / str(number)).read_text().split()) == 1, f"task {number} ran twice"
        assert sum(task["status"] == "failed" for task in results) == 50
        status = await all_of_it.host.get("/queue/status")
        assert status["dead_letters"] == 0


def _code(number: int) -> int:
    """Every tenth task fails, with a code of its own."""
    return 1 + number % 250 if number % 10 == 3 else 0


async def test_what_the_plane_learns_of_a_task(tmp_path: Path) -> None:
    """Start with process id and run number, progress, and a completion with times, usage, runs and output."""
    gate = Gate(tmp_path / "gate")
    script = f'echo "30 warming up" >"$REMOTEGPU_PROGRESS"; {gate.wait}; echo "100 done" >>"$REMOTEGPU_PROGRESS"'
    async with fleet(tmp_path) as all_of_it:
        [task_id] = await all_of_it.submit({"script": script, "name": "trained"})
        await all_of_it.plane.faults.wait_calls("progress", 1, DEADLINE_S)
        task = await all_of_it.operator.task(task_id)
        assert task["progress"] == {"percent": 30.0, "message": "warming up"}
        here = await all_of_it.host.get(f"/tasks/{task_id}")
        assert here["origin"] == "control_plane"
        assert 0 < here["lease_left_s"] <= 60
        [attempt] = task["attempt_list"]
        assert (attempt["process_id"], attempt["run_no"]) == (here["process_id"], 1)
        gate.open()
        [task] = await all_of_it.ended([task_id])
        assert task["progress"] == {"percent": 100.0, "message": "done"}
        assert (task["result"]["runs"], task["result"]["truncated"]) == (1, False)
        usage = task["result"]["usage"]
        assert set(usage) == {"wall_s", "cpu_s", "memory_peak_mb", "io_read_mb", "io_write_mb"}
        assert usage["wall_s"] > 0
        assert usage["cpu_s"] > 0
        assert usage["memory_peak_mb"] > 0
        assert task["result"]["started_at"] <= task["result"]["ended_at"]
        assert [event["kind"] for event in task["events"]] == ["created", "claimed", "started", "completed"]


async def test_retries_stay_inside_the_attempt(tmp_path: Path) -> None:
    """`max_retries` of a claimed task: further runs under the same attempt and lease, completed once."""
    async with fleet(tmp_path) as all_of_it:
        task = await all_of_it.task(
            {"command": "exit $((4 - REMOTEGPU_RUN_NUMBER))", "max_retries": 3, "retry_delay": 0}
        )
        assert (task["status"], task["result"]["runs"]) == ("completed", 4)
        assert [event["kind"] for event in task["events"]].count("claimed") == 1


@pytest.mark.parametrize("way", ["renew", "heartbeat"])
async def test_a_cancellation_reaches_the_process(tmp_path: Path, way: str) -> None:
    """The plane's wish comes with the answer of a renewal or of a heartbeat, and the whole task ends as cancelled."""
    settings = {"control_plane": {"heartbeat_interval": 0.2 if way == "heartbeat" else 60}}
    async with fleet(tmp_path, settings) as all_of_it:
        renew_interval_s = 0.2 if way == "renew" else 60
        [task_id] = await all_of_it.submit({"command": "sleep 60", "renew_interval_sec": renew_interval_s})
        await all_of_it.plane.faults.wait_calls("start", 1, DEADLINE_S)
        await all_of_it.operator.call("POST", f"/tasks/{task_id}/cancel")
        [task] = await all_of_it.ended([task_id])
        assert (task["status"], task["result"]["cause"], task["result"]["exit_code"]) == ("cancelled", "cancelled", 143)


async def test_f11_a_cut_off_agent_ends_the_task_before_its_lease(tmp_path: Path) -> None:
    """F11: nothing answers any more; the process is dead when the lease ends, and the end is `lease_lost`."""
    async with fleet(tmp_path, {"lease": {"margin": 0.5}}, lease_ttl_s=3.0) as all_of_it:
        [task_id] = await all_of_it.submit({"command": "sleep 60", "grace_period_sec": 1})
        await all_of_it.host.wait_running(task_id)
        await all_of_it.plane.stop()
        detail = await all_of_it.host.wait_for(task_id)
        assert (detail["state"], detail["cause"], detail["exit_code"]) == ("failed", "lease_lost", 125)
        await all_of_it.plane.start()


async def test_f12_continue_keeps_a_run_through_an_outage(tmp_path: Path) -> None:
    """F12: with `on_unreachable: continue` the run outlives its lease, and its result is delivered afterwards."""
    gate = Gate(tmp_path / "gate")
    settings = {"lease": {"margin": 0.5, "on_unreachable": "continue"}}
    async with fleet(tmp_path, settings, lease_ttl_s=2.0) as all_of_it:
        [task_id] = await all_of_it.submit({"command": f"{gate.wait}; exit 5"})
        await all_of_it.host.wait_running(task_id)
        await all_of_it.plane.stop()
        detail = await all_of_it.host.until_shown(f"/tasks/{task_id}", lambda task: task["lease_left_s"] == 0)
        assert detail["state"] == "running"
        await all_of_it.plane.start()
        gate.open()
        [task] = await all_of_it.ended([task_id])
        assert (task["result"]["exit_code"], task["result"]["cause"]) == (5, "exit_code")


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (Code.ATTEMPT_MISMATCH, "superseded"),
        (Code.TASK_FINISHED, "superseded"),
        (Code.LEASE_EXPIRED, "lease_lost"),
        (Code.TASK_NOT_FOUND, "superseded"),
    ],
)
async def test_f14_f15_a_business_refusal_of_a_renewal_stops_the_process(
    tmp_path: Path, code: Code, cause: str
) -> None:
    """F14, F15: 30001-30004 act at once: the process is stopped, with the cause that the code stands for."""
    answer = Respond(200, b'{"code": %d, "message": "refused"}' % code, {"Content-Type": "application/json"})
    async with fleet(tmp_path) as all_of_it:
        all_of_it.plane.faults.order_always("renew", answer)
        [task_id] = await all_of_it.submit({"command": "sleep 60", "renew_interval_sec": 0.2})
        detail = await all_of_it.host.wait_for(task_id)
        assert (detail["state"], detail["cause"]) == ("failed", cause)


@pytest.mark.parametrize(("status", "in_body"), [(404, False), (410, True)])
async def test_f51_a_database_hiccup_of_the_plane_kills_nothing(tmp_path: Path, status: Any, in_body: bool) -> None:
    """F51: bare 404, 409, 410 on every call of a task's life: it goes on, and its result arrives when they stop."""
    gate = Gate(tmp_path / "gate")
    async with fleet(tmp_path) as all_of_it:
        faults = all_of_it.plane.faults
        for call in ("start", "complete"):
            faults.order(call, hiccup(status, in_body=in_body))
        [task_id] = await all_of_it.submit({"command": gate.wait, "renew_interval_sec": 0.1})
        await faults.wait_calls("start", 2, DEADLINE_S)
        faults.order("renew", hiccup(status, in_body=in_body), times=2)
        await faults.wait_calls("renew", 3, DEADLINE_S)
        gate.open()
        [task] = await all_of_it.ended([task_id])
        assert (task["status"], task["completions"]["accepted"]) == ("completed", 1)


async def test_f13_a_lost_answer_is_repeated_and_counted_once(tmp_path: Path) -> None:
    """F13: the answer to the claim, the start and the completion is lost once each: one run, one result."""
    async with fleet(tmp_path) as all_of_it:
        for call in ("claim", "start", "complete"):
            all_of_it.plane.faults.order(call, DropAfter())
        task_ids = await all_of_it.submit({"command": "echo once"})
        await all_of_it.plane.faults.wait_calls("complete", 2, DEADLINE_S)
        [task] = await all_of_it.ended(task_ids)
        assert (task["status"], task["result"]["stdout"]) == ("completed", "once\n")
        assert task["completions"] == {"accepted": 1, "repeated": 1, "rejected": 0}
        assert [event["kind"] for event in task["events"]].count("claimed") == 1


async def test_f17_a_refused_token_stops_nothing_and_heals_by_its_file(tmp_path: Path) -> None:
    """F17: with 401 the task goes on and its result is kept; a new token in the file is taken without a restart."""
    gate = Gate(tmp_path / "gate")
    async with fleet(tmp_path, {"control_plane": {"heartbeat_interval": 0.2}}) as all_of_it:
        [task_id] = await all_of_it.submit({"command": gate.wait})
        await all_of_it.host.wait_running(task_id)
        new_token = await all_of_it.operator.enrol("machine-1")
        await all_of_it.host.until_shown("/queue/status", lambda status: status["state"] == "degraded")
        gate.open()
        assert (await all_of_it.host.wait_for(task_id))["state"] == "completed"
        (tmp_path / "token").write_text(new_token)
        [task] = await all_of_it.ended([task_id])
        assert task["status"] == "completed"


@pytest.mark.parametrize("errors", ["status", "body"])
async def test_a_deployed_plane_is_served(tmp_path: Path, errors: str) -> None:
    """The whole way with a plane that answers as deployed ones do, in both ways of sending errors."""
    settings = {"control_plane": {"poll_interval": 0.05, "heartbeat_interval": 0.3}, "lease": {"renew_interval": 0.3}}
    async with fleet(tmp_path, settings, compat=True, compat_errors=errors, compat_hides_lease=True) as all_of_it:
        slow = {"command": "sleep 1; echo slow", "env": {"A": "1"}}
        task_ids = await all_of_it.submit(
            slow, {"command": "sh", "args": ["-c", "exit 3"]}, {"command": "echo $A", "env": {"A": "b c"}}
        )
        tasks = await all_of_it.ended(task_ids)
        assert [task["status"] for task in tasks] == ["completed", "failed", "completed"]
        assert [task["result"]["exit_code"] for task in tasks] == [0, 3, 0]
        assert [task["result"]["stdout"] for task in tasks] == ["slow\n", "", "b c\n"]
        assert tasks[0]["attempt_list"][0]["renewals"] >= 1


async def test_f50_what_cannot_run_here_is_refused_with_its_reason(tmp_path: Path) -> None:
    """An unknown type and a missing command are completed as failed, with a sentence; the task beside them runs."""
    async with fleet(tmp_path) as all_of_it:
        body = b'{"code": 0, "message": "ok", "data": {"tasks": [%s]}}' % b", ".join(
            [
                b'{"id": "no-command", "attempt_id": "a-1"}',
                b'{"id": "odd-type", "attempt_id": "a-2", "command": "true", "type": "quantum"}',
                b'{"id": "../../etc", "attempt_id": "a-3", "command": "true"}',
                b'{"id": "other", "attempt_id": "a-4", "command": "true", "machine_id": "machine-2"}',
                b'{"id": "good", "attempt_id": "a-5", "command": "true"}',
            ]
        )
        all_of_it.plane.faults.order("claim", Respond(200, body, {"Content-Type": "application/json"}))
        [first] = await all_of_it.submit({"command": "true"})  # wakes the long poll that is held
        await all_of_it.ended([first])
        assert (await all_of_it.host.wait_for("good"))["state"] == "completed"
        log = all_of_it.host.log.read_text()
        assert "a task needs a command or a script" in log
        assert "the task is for another machine" in log or "is for another machine" in log
        assert "unusable ids" in log


async def test_the_agent_comes_up_before_the_plane(tmp_path: Path) -> None:
    """It waits for the plane, says so in its status, and registers by itself once it is there."""
    async with fleet(tmp_path, is_started=False) as all_of_it:
        await all_of_it.plane.stop()
        await all_of_it.host.start()
        status = await all_of_it.host.get("/queue/status")
        assert (status["state"], status["control_plane"]["is_registered"]) == ("degraded", False)
        await all_of_it.plane.start()
        assert (await all_of_it.task({"command": "true"}))["status"] == "completed"


async def test_what_can_never_fit_here_is_handed_back(tmp_path: Path) -> None:
    """A claimed task that asks for more than this host has is released unstarted, with the reason in the log."""
    async with fleet(tmp_path) as all_of_it:
        [task_id] = await all_of_it.submit({"command": "true", "resources": {"cpus": 400}})

        async def is_handed_back() -> bool:
            return "released" in await all_of_it.operator.events(task_id)

        await until(is_handed_back)
        assert (await all_of_it.operator.task(task_id))["completions"]["accepted"] == 0
        events = all_of_it.host.events()
        said = [event["reason"] for event in events if event["event"] == "a claimed task is given back"]
        assert said
        assert "400" in said[0]
        await all_of_it.operator.call("POST", f"/tasks/{task_id}/cancel")
