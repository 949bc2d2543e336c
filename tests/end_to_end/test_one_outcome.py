"""F31: whatever ends a run at the same moment, there is one outcome, the first, and the plane hears of it once."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from remotegpu_sidecar import identity
from tests.end_to_end.fleet import Fleet, fleet
from tests.end_to_end.gates import Gate
from tests.frozen import frozen
from tests.waiting import until_so

TIMEOUT_S: Final = 1.5
RETRY: Final = {"max": 5, "delay": 0, "on": ["exit_code", "signal", "timed_out"]}
"""Of everything that may follow: what was cancelled is not repeated, whatever else it ended of."""


async def check_once(all_of_it: Fleet, task_id: str) -> str:
    """One end on record, one completion, one word for it everywhere; returns that."""
    detail = await all_of_it.host.wait_for(task_id)
    [run] = detail["runs"]
    path = all_of_it.host.state_dir / "attempts" / f"{detail['attempt_id']}.1" / "record"
    assert path.read_bytes().count(b'"kind":"ended"') == 1
    [task] = await all_of_it.ended([task_id])
    assert task["completions"] == {"accepted": 1, "repeated": 0, "rejected": 0}
    assert run["cause"] == detail["cause"] == task["result"]["cause"]
    assert task["status"] == detail["state"]
    assert task["result"]["exit_code"] == detail["exit_code"]
    return str(detail["cause"])


async def ask_to_end(all_of_it: Fleet, task_id: str, process_id: int, how: str) -> Any:
    """One of the ways to ask for an end; what the agent answers."""
    if how == "cancel":
        return await all_of_it.host.call("POST", f"/tasks/{task_id}/cancel")
    return await all_of_it.host.call("POST", "/process/stop", data=f'{{"process_id": {process_id}}}')


@pytest.mark.parametrize(
    ("first", "second", "is_over", "cause"),
    [
        ("cancel", "stop", False, "cancelled"),
        ("stop", "cancel", False, "stopped"),
        ("cancel", "stop", True, "exit_code"),
        ("stop", "cancel", True, "exit_code"),
        (None, None, False, "timed_out"),
        (None, None, True, "exit_code"),
    ],
)
async def test_f31_the_first_of_all_that_come_due(
    tmp_path: Path, first: str | None, second: str | None, is_over: bool, cause: str
) -> None:
    """F31: its shim stands still while the task may end, its timeout passes, and two ask for its end: one outcome.

    What had ended is over; else the request that was stored first counts.
    """
    gate = Gate(tmp_path / "gate")
    async with fleet(tmp_path) as all_of_it:
        host = all_of_it.host
        retry = {**RETRY, "max": 0} if first is None else RETRY
        [task_id] = await all_of_it.submit({"command": f"{gate.wait}; exit 3", "timeout": TIMEOUT_S, "retry": retry})
        process_id = (await host.wait_running(task_id))["process_id"]
        shim = psutil.Process(process_id).ppid()
        times_out_ns = identity.boottime_ns() + round(TIMEOUT_S * 1e9)
        asked: list[asyncio.Task[Any]] = []
        with frozen(shim):
            if is_over:
                gate.open()
                await until_so(lambda: psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE)
            for how in filter(None, (first, second)):
                asked.append(asyncio.create_task(ask_to_end(all_of_it, task_id, process_id, how)))
                await host.until_shown(f"/tasks/{task_id}", lambda task: task["is_stopping"])
            await until_so(lambda: identity.boottime_ns() > times_out_ns)
        assert await check_once(all_of_it, task_id) == cause
        for each in asked:
            status, answer = await each
            assert status == 200, answer


@pytest.mark.parametrize("retries", [0, 3])
async def test_f31_asked_to_end_in_the_moment_of_its_end(tmp_path: Path, retries: int) -> None:
    """F31: a task says that it is about to exit, and is cancelled and stopped at once: one outcome, whichever it is.

    With retries left it does not come again and again: a request ends a run, or its wait for the next, or forbids one.
    """
    async with fleet(tmp_path) as all_of_it:
        for number in range(4):  # one more, and this host would be taken for broken
            fifo = tmp_path / f"fifo-{number}"
            os.mkfifo(fifo)
            [task_id] = await all_of_it.submit({"command": f"echo now >{fifo}; exit 3", "max_retries": retries})
            process_id = (await all_of_it.host.wait_running(task_id))["process_id"]
            await asyncio.to_thread(fifo.read_text)
            answers = await asyncio.gather(
                *(ask_to_end(all_of_it, task_id, process_id, how) for how in ("cancel", "stop")),
                all_of_it.operator.call("POST", f"/tasks/{task_id}/cancel"),
            )
            assert {answer[0] for answer in answers[:2]} <= {200, 404, 409, 410}, answers
            detail = await all_of_it.host.wait_for(task_id)
            [task] = await all_of_it.ended([task_id])
            assert (task["completions"]["accepted"], task["completions"]["rejected"]) == (1, 0)
            assert (task["result"]["cause"], task["status"]) == (detail["cause"], detail["state"])
            assert detail["cause"] in {"cancelled", "stopped", "exit_code"}
            assert len(detail["runs"]) <= 1 + (retries > 0) * 2
            assert {run["cause"] for run in detail["runs"][:-1]} <= {"exit_code"}
