"""Local tasks through a real agent: submitted over its socket, run as real processes, shown as they ended."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.end_to_end.agent_process import AgentProcess, agent
from tests.end_to_end.gates import Gate
from tests.waiting import DEADLINE_S


@pytest.fixture
async def host(tmp_path: Path) -> AsyncGenerator[AgentProcess]:
    """A stand-alone agent with two slots."""
    async with agent(tmp_path, capacity={"max_concurrent": 2}) as running:
        yield running


@pytest.mark.parametrize(
    ("task", "state", "cause", "exit_code"),
    [
        ({"command": "true"}, "completed", "succeeded", 0),
        ({"command": "exit 7"}, "failed", "exit_code", 7),
        ({"command": "kill -9 $$"}, "failed", "signal", 137),
        ({"command": "sleep 60", "timeout": 0.2}, "failed", "timed_out", 124),
        ({"command": "/no/such/program", "args": []}, "failed", "launch_failed", 127),
        ({"command": "/etc/passwd", "args": []}, "failed", "launch_failed", 126),
        ({"command": "true", "workdir": "/no/such/directory"}, "failed", "launch_failed", 127),
        ({"script": "import sys; sys.exit(5)", "type": "python"}, "failed", "exit_code", 5),
        ({"script": "exit 6", "interpreter": "sh"}, "failed", "exit_code", 6),
    ],
)
async def test_every_end_has_its_cause(
    host: AgentProcess, task: dict[str, Any], state: str, cause: str, exit_code: int
) -> None:
    """What a task did is what is shown: state, cause and exit code."""
    detail = await host.wait_for(await host.submit(**task))
    assert (detail["state"], detail["cause"], detail["exit_code"]) == (state, cause, exit_code)
    assert bool(detail["error"]) == (cause != "succeeded")


async def test_environment_and_output(host: AgentProcess) -> None:
    """A task gets its own variables and the agent's, and none of the agent's environment; both streams are kept."""
    script = 'echo "$GREETING"; echo "$REMOTEGPU_RUN_NUMBER ${PYTHONUNBUFFERED:-unset}"; echo problem >&2; pwd'
    task_id = await host.submit(script=script, env={"GREETING": "hi there"})
    await host.wait_for(task_id)
    assert (await host.output(task_id)).splitlines() == ["hi there", "1 unset", str(host.state_dir / "work" / task_id)]
    assert await host.output(task_id, "stderr") == "problem\n"


async def test_output_is_followed_from_before_the_start_to_the_end(host: AgentProcess, tmp_path: Path) -> None:
    """A stream opened on a waiting task brings all its output, characters whole, and ends with the run."""
    first, second = Gate(tmp_path / "first"), Gate(tmp_path / "second")
    for _ in range(2):
        await host.submit(command=first.wait)
    task_id = await host.submit(command=f"printf 'gr\\303\\274n '; {second.wait}; printf '\\342\\202'; echo")
    connector = aiohttp.UnixConnector(str(host.socket))
    async with (
        asyncio.timeout(DEADLINE_S),
        aiohttp.ClientSession(connector=connector) as session,
        session.get(f"http://localhost/api/v1/tasks/{task_id}/logs?follow=1") as answer,
    ):
        first.open()
        chunks = [await _event(answer)]
        assert chunks[0]["text"] == "grün "
        second.open()
        while not chunks[-1]["is_end"]:
            chunks.append(await _event(answer))
    assert "".join(chunk["text"] for chunk in chunks) == "grün �\n"
    assert [chunk["offset"] for chunk in chunks[1:]] == [chunk["next_offset"] for chunk in chunks[:-1]]


async def _event(answer: aiohttp.ClientResponse) -> dict[str, Any]:
    while True:
        line = (await answer.content.readline()).decode()
        if not line:
            raise AssertionError("the stream ended early")
        if line.startswith("data: "):
            chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
            return chunk


async def test_retries_wait_count_and_keep_their_checkpoint(host: AgentProcess) -> None:
    """A task that fails twice and then succeeds has three runs, and finds what it kept."""
    script = 'echo x >>"$REMOTEGPU_CHECKPOINT_DIR/n"; [ "$(wc -l <"$REMOTEGPU_CHECKPOINT_DIR/n")" = 3 ] || exit 9'
    detail = await host.wait_for(await host.submit(script=script, retry={"max": 5, "delay": 0.05}))
    assert (detail["state"], detail["run_no"], detail["retries_used"]) == ("completed", 3, 2)
    assert [(run["run_no"], run["cause"]) for run in detail["runs"]] == [
        (1, "exit_code"),
        (2, "exit_code"),
        (3, "succeeded"),
    ]


async def test_the_more_urgent_task_starts_first(tmp_path: Path) -> None:
    """With one slot, tasks that wait start by priority, then by age; each says why it waits."""
    order = tmp_path / "order"
    gate = Gate(tmp_path / "gate")
    async with agent(tmp_path, capacity={"max_concurrent": 1}) as host:
        first = await host.submit(command=gate.wait)
        await host.wait_running(first)
        waiting = [
            await host.submit(command=f"echo {name} >>{order}", priority=priority)
            for name, priority in (("c", 5), ("d", 5), ("a", 1), ("b", 3))
        ]
        shown = await host.get(f"/tasks/{waiting[0]}")
        assert (shown["state"], shown["reason"]) == ("pending", "all 1 slots are taken (capacity.max_concurrent)")
        gate.open()
        for task_id in waiting:
            await host.wait_for(task_id)
        assert order.read_text().split() == ["a", "b", "c", "d"]


async def test_cancelling_what_runs_and_what_waits(tmp_path: Path) -> None:
    """A running task gets its stop signal and ends as cancelled, a waiting one at once; twice is refused."""
    async with agent(tmp_path, capacity={"max_concurrent": 1}) as host:
        running = await host.submit(script="trap 'echo bye; exit 0' TERM; echo up; sleep 60 & wait")
        await host.wait_running(running)
        await host.until_shown(f"/tasks/{running}/logs", lambda chunk: chunk["text"] == "up\n")  # the trap is set
        waiting = await host.submit(command="true")
        assert (await host.post(f"/tasks/{waiting}/cancel"))["state"] == "cancelled"
        assert (await host.post(f"/tasks/{running}/cancel"))["is_stopping"] is True
        detail = await host.wait_for(running)
        assert (detail["state"], detail["cause"], detail["exit_code"]) == ("cancelled", "cancelled", 143)
        assert await host.output(running) == "up\nbye\n"
        status, body = await host.call("POST", f"/tasks/{running}/cancel")
        assert (status, body["code"]) == (409, 30002)


async def test_progress_reaches_the_task(host: AgentProcess, tmp_path: Path) -> None:
    """The last line of the progress file is the task's progress, while it runs and after its end."""
    gate = Gate(tmp_path / "gate")
    script = f'echo "40 half way" >"$REMOTEGPU_PROGRESS"; {gate.wait}; echo "100 done" >>"$REMOTEGPU_PROGRESS"'
    task_id = await host.submit(script=script)
    detail = await host.until_shown(f"/tasks/{task_id}", lambda task: task["progress_percent"] is not None)
    assert (detail["progress_percent"], detail["progress_message"]) == (40.0, "half way")
    gate.open()
    detail = await host.wait_for(task_id)
    assert (detail["progress_percent"], detail["progress_message"]) == (100.0, "done")


async def test_values_of_the_environment_are_not_shown(host: AgentProcess) -> None:
    """F49: the API names a task's variables and hides their values; the log has neither."""
    task_id = await host.submit(command="true", env={"WANDB_API_KEY": "s3cr3t-value"})
    detail = await host.wait_for(task_id)
    assert detail["task"]["env"] == {"WANDB_API_KEY": "[hidden]"}
    assert "s3cr3t-value" not in host.log.read_text()


async def test_ids_listing_and_bad_requests(host: AgentProcess) -> None:
    """Ids may be given by unique prefix; a second task with a taken id is refused; unknown ones are 30004."""
    assert await host.submit(id="train-1", command="true") == "train-1"
    assert (await host.wait_for("train"))["id"] == "train-1"
    status, body = await host.call("POST", "/tasks", json={"task": {"id": "train-1", "command": "true"}})
    assert (status, body["code"]) == (409, 30024)
    status, body = await host.call("GET", "/tasks/other")
    assert (status, body["code"]) == (404, 30004)
    status, body = await host.call("POST", "/tasks", json={"task": {"comand": "true"}})
    assert (status, body["code"]) == (400, 30005)
    assert "did you mean 'command'?" in body["message"]
    status, body = await host.call("POST", "/tasks", json={"task": {"command": "x", "type": "container"}})
    assert (status, body["code"]) == (400, 30005)
    page = await host.get("/tasks?state=completed")
    assert [task["id"] for task in page["tasks"]] == ["train-1"]


async def test_a_task_that_can_never_fit_says_so_and_blocks_nobody(host: AgentProcess) -> None:
    """It waits with its reason while others run past it."""
    big = await host.submit(command="true", resources={"memory_gb": 60000})
    assert (await host.wait_for(await host.submit(command="true")))["state"] == "completed"
    detail = await host.get(f"/tasks/{big}")
    assert detail["state"] == "pending"
    assert detail["reason"].startswith("needs 61440000 MiB of memory; this host gives ")
