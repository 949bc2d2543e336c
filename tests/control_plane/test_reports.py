"""Start, progress, completion and release: what is kept, and that a repeat changes nothing."""

from __future__ import annotations

import asyncio

from control_plane import Plane, faults
from tests.control_plane.support import DEADLINE_S, RESULT, Agent, MovableClock, Operator


async def test_start_is_kept_once(agent: Agent, operator: Operator, clock: MovableClock) -> None:
    """The first start's time stays; a repeat is answered alike."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    first = (await agent.start(task, process_id=7, gpu_uuids=["GPU-1"])).data
    clock.time_s += 5
    assert (await agent.start(task, process_id=7, gpu_uuids=["GPU-1"])).data == first
    assert first["status"] == "running"
    found = await operator.task(task_id)
    [attempt] = found["attempt_list"]
    assert (attempt["process_id"], attempt["gpu_uuids"], attempt["run_no"]) == (7, ["GPU-1"], 1)
    assert [event["kind"] for event in found["events"]] == ["created", "claimed", "started"]


async def test_later_run_replaces_the_process(agent: Agent, operator: Operator) -> None:
    """A retry's start is a new run of the same attempt; an older run's start that comes late changes nothing."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    await agent.start(task, process_id=7, run_no=1)
    await agent.start(task, process_id=8, run_no=2)
    await agent.start(task, process_id=7, run_no=1)
    [attempt] = (await operator.task(task_id))["attempt_list"]
    assert (attempt["process_id"], attempt["run_no"]) == (8, 2)


async def test_renewals_are_counted(agent: Agent, operator: Operator) -> None:
    """They are no events, or a long task would have thousands."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    for _ in range(3):
        await agent.renew(task)
    found = await operator.task(task_id)
    assert found["attempt_list"][0]["renewals"] == 3
    assert len(found["events"]) == 2


async def test_latest_progress_is_kept(agent: Agent, operator: Operator) -> None:
    """Percent and message."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    await agent.about("progress", task, percent=10, message="epoch 1")
    answer = await agent.about("progress", task, percent=20.5, message="epoch 2")
    assert answer.data == {"task_id": task_id, "progress": 20.5}
    assert (await operator.task(task_id))["progress"] == {"percent": 20.5, "message": "epoch 2"}


async def test_result_is_kept_whole(agent: Agent, operator: Operator) -> None:
    """Every field of the completion, and the task's end."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    await agent.start(task)
    sent = RESULT | {"exit_code": 137, "status": "failed", "cause": "signal", "signal": 9, "error": "killed", "runs": 2}
    sent |= {"stdout": "ü\n" * 21_000, "truncated": True, "usage": {"cpu_s": 1.5, "gpu": []}}
    assert (await agent.complete(task, **sent)).data["status"] == "failed"
    found = await operator.task(task_id)
    assert found["status"] == "failed"
    assert found["error"] == "killed"
    assert found["ended_at"] is not None
    del sent["status"]
    assert {name: found["result"][name] for name in sent} == sent


async def test_completion_without_additions(agent: Agent, operator: Operator) -> None:
    """An older agent's completion: the exit code decides."""
    ids = await operator.submit({"command": "true"}, {"command": "false"})
    for task, exit_code in zip((await agent.claim(limit=2)).data["tasks"], (0, 3), strict=True):
        await agent.about("complete", task, exit_code=exit_code, stdout="", stderr="", error="")
    assert [(await operator.task(task_id))["status"] for task_id in ids] == ["completed", "failed"]


async def test_completion_counts_once(agent: Agent, operator: Operator, clock: MovableClock) -> None:
    """F06: a repeat is answered with what was stored, and counted apart."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    first = (await agent.complete(task, stdout="first")).data
    clock.time_s += 5
    assert (await agent.complete(task, stdout="second")).data == first
    found = await operator.task(task_id)
    assert found["completions"] == {"accepted": 1, "repeated": 1, "rejected": 0}
    assert found["result"]["stdout"] == "first"


async def test_completions_at_once_count_once(agent: Agent, operator: Operator) -> None:
    """Repeats that overlap."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    answers = await asyncio.gather(*(agent.complete(task) for _ in range(10)))
    assert {answer.code for answer in answers} == {0}
    assert (await operator.task(task_id))["completions"] == {"accepted": 1, "repeated": 9, "rejected": 0}


async def test_released_task_goes_to_the_next_claim(agent: Agent, operator: Operator, plane: Plane) -> None:
    """At once, to a waiting poll; the old attempt is out, and its repeated release is answered."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    poll = asyncio.create_task(agent.claim_one(wait_sec=DEADLINE_S))
    await plane.faults.wait_calls("claim", 2, DEADLINE_S)
    assert (await agent.about("release", task, reason="no room")).data == {"task_id": task_id, "status": "pending"}
    async with asyncio.timeout(DEADLINE_S / 2):
        again = await poll
    assert again["id"] == task_id
    assert (await agent.about("release", task, reason="no room")).code == 0
    assert (await agent.complete(task)).code == 30001
    assert (await operator.task(task_id))["lapses"] == 0


async def test_started_task_is_not_released(agent: Agent, operator: Operator) -> None:
    """Its process may have done anything."""
    await operator.submit()
    task = await agent.claim_one()
    await agent.start(task)
    answer = await agent.about("release", task, reason="no room")
    assert (answer.status, answer.code) == (400, 30005)


async def test_wait_ended_returns_with_the_last_result(agent: Agent, operator: Operator, plane: Plane) -> None:
    """Waiting for tasks is waiting for their completions, in whatever order they come."""
    ids = await operator.submit(*[{"command": "true"}] * 2)
    waiting = asyncio.create_task(plane.service.wait_ended(ids, DEADLINE_S))
    first, second = (await agent.claim(limit=2)).data["tasks"]
    plane.faults.order("complete", hold := faults.Hold())
    last = asyncio.create_task(agent.complete(first))
    await hold.reached.wait()
    await agent.complete(second)
    assert not waiting.done()
    hold.release.set()
    await asyncio.gather(waiting, last)
