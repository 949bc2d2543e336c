"""What a review broke once: want of descriptors, stops against retries, tasks that never fit, odd planes."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from control_plane.faults import Respond
from tests.end_to_end.agent_process import agent
from tests.end_to_end.fleet import fleet
from tests.end_to_end.gates import Gate
from tests.waiting import DEADLINE_S, until_so

JSON = {"Content-Type": "application/json"}


async def test_f27_an_end_without_descriptors_is_stored_once_there_are_some(tmp_path: Path) -> None:
    """F27: the agent can open nothing while its task ends; then the result is delivered; nothing ran twice."""
    gate, trace = Gate(tmp_path / "gate"), tmp_path / "trace"
    async with fleet(tmp_path) as all_of_it:
        [task_id] = await all_of_it.submit({"command": f"echo x >>{trace}; {gate.wait}; echo precious"})
        await all_of_it.host.wait_running(task_id)
        pid = all_of_it.host.pid
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))
        gate.open()
        record = next((all_of_it.host.state_dir / "attempts").iterdir()) / "record"
        await until_so(lambda: b'"kind":"ended"' in record.read_bytes())
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        [task] = await all_of_it.ended([task_id])
        assert (task["status"], task["result"]["stdout"]) == ("completed", "precious\n")
        assert trace.read_text() == "x\n"


async def test_f31_a_cancel_is_never_overtaken_by_retries(tmp_path: Path) -> None:
    """F31: tasks that fail and are repeated as fast as they can: every accepted cancel ends its task."""
    async with agent(tmp_path, capacity={"max_concurrent": 4}) as host:
        task_ids = [await host.submit(command="exit 1", retry={"max": 1000, "delay": 0}) for _ in range(8)]
        for task_id in task_ids:
            await host.until_shown(f"/tasks/{task_id}", lambda task: task["run_no"] > 1)
            status, body = await host.call("POST", f"/tasks/{task_id}/cancel")
            assert status == 200, body
        for task_id in task_ids:
            assert (await host.wait_for(task_id))["state"] in {"cancelled", "failed"}
        runs = [(await host.get(f"/tasks/{task_id}"))["run_no"] for task_id in task_ids]
        assert max(runs) < 1000


async def test_tasks_that_never_fit_are_given_back_and_not_hoarded(tmp_path: Path) -> None:
    """A host without GPUs gives GPU tasks back at once, asks less often after that, and runs what fits."""
    async with fleet(tmp_path, {"control_plane": {"poll_interval": 0.2}}) as all_of_it:
        big = await all_of_it.submit(*[{"command": "true", "resources": {"gpus": 1}, "priority": 9}] * 40)
        await all_of_it.plane.faults.wait_calls("release", 1, DEADLINE_S)
        small = await all_of_it.task({"command": "true", "priority": 1})
        assert small["status"] == "completed"
        calls = all_of_it.plane.faults.calls
        assert calls["claim"] < 30
        assert (await all_of_it.operator.task(big[-1]))["status"] == "pending"


async def test_odd_claims_hurt_nobody(tmp_path: Path) -> None:
    """An attempt id that is another task's, and a task id that is a local task's: both are refused and said."""
    async with fleet(tmp_path) as all_of_it:
        local = await all_of_it.host.submit(id="train", command="sleep 60")
        before = await all_of_it.host.wait_running(local)
        tasks = [
            {"id": "one", "attempt_id": "a-1", "command": "true"},
            {"id": "two", "attempt_id": "a-1", "command": "true"},
            {"id": "train", "attempt_id": "a-2", "command": "true"},
        ]
        body = json.dumps({"code": 0, "message": "ok", "data": {"tasks": tasks}}).encode()
        all_of_it.plane.faults.order("claim", Respond(200, body, JSON))
        [woken] = await all_of_it.submit({"command": "true"})
        await all_of_it.ended([woken])
        assert (await all_of_it.host.wait_for("one"))["state"] == "completed"
        after = await all_of_it.host.get("/tasks/train")
        assert (after["state"], after["process_id"]) == ("running", before["process_id"])
        events = {event["event"]: event for event in all_of_it.host.events()}
        assert events["a claimed attempt has the id of another task's and is left alone"]["task_ids"] == ["one", "two"]
        assert "a task of this host's own has the id train" in events["a claimed task is refused"]["reason"]
        await all_of_it.host.post("/tasks/train/cancel")
        await all_of_it.host.wait_for("train")


async def test_a_start_refused_for_good_is_renewed_all_the_same(tmp_path: Path) -> None:
    """30005 on the start report makes a dead letter of it; the run keeps its lease, and its result arrives."""
    gate = Gate(tmp_path / "gate")
    async with fleet(tmp_path, lease_ttl_s=4.0) as all_of_it:
        refusal = b'{"code": 30005, "message": "process_id: unexpected"}'
        all_of_it.plane.faults.order_always("start", Respond(400, refusal, JSON))
        [task_id] = await all_of_it.submit({"command": gate.wait, "renew_interval_sec": 0.2})
        await all_of_it.plane.faults.wait_calls("renew", 3, DEADLINE_S)
        gate.open()
        [task] = await all_of_it.ended([task_id])
        assert task["status"] == "completed"
        assert (await all_of_it.host.get("/queue/status"))["dead_letters"] == 1


@pytest.mark.parametrize("in_the_way", ["attempts", "endpoints.json"])
async def test_something_in_the_way_in_the_state_directory(tmp_path: Path, in_the_way: str) -> None:
    """A start that fails half-way says what is in the way, ends with 2, and works once that is gone."""
    async with agent(tmp_path) as host:
        await host.stop()
        place = host.state_dir / in_the_way
        if in_the_way == "attempts":
            place.rmdir()
            place.touch()
        else:
            place.unlink(missing_ok=True)
            place.mkdir()
        await host.start(until_ready=False)
        assert await host.wait_exit() == 2
        last = host.log.read_text().splitlines()[-1]
        assert in_the_way in last
        assert "move away what is in the way" in last
        place.unlink() if place.is_file() else place.rmdir()
        await host.start()
        assert (await host.wait_for(await host.submit(command="true")))["state"] == "completed"
