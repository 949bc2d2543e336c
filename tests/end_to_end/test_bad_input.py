"""What cannot be started, through a real agent: an end with errno, object and mend, and never a hung attempt."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from control_plane.faults import Respond
from control_plane.store import tasks as stored_tasks
from control_plane.store.tasks import NewTask
from tests.end_to_end.agent_process import AgentProcess, agent
from tests.end_to_end.fleet import MACHINE_ID, fleet


@pytest.fixture
async def host(tmp_path: Path) -> AsyncGenerator[AgentProcess]:
    """A stand-alone agent with one slot: a task that hung would hold up the next one."""
    async with agent(tmp_path, capacity={"max_concurrent": 1}) as running:
        yield running


def _file(path: Path, content: str, mode: int = 0o755) -> str:
    path.write_text(content)
    path.chmod(mode)
    return str(path)


async def test_what_cannot_be_started_says_why(host: AgentProcess, tmp_path: Path) -> None:
    """Missing or plain file, bad first line, folder, missing directory: `launch_failed`, and the next one runs."""
    cases: list[tuple[dict[str, Any], int, tuple[str, ...]]] = [
        ({"command": "/no/such", "args": []}, 127, ("'/no/such'", "ENOENT", "install it, or correct the path")),
        ({"command": "no-such", "args": []}, 127, ("'no-such' in PATH", "ENOENT", "give its full path")),
        ({"command": _file(tmp_path / "plain", "x", 0o644), "args": []}, 126, ("plain", "EACCES", "chmod +x")),
        ({"command": _file(tmp_path / "bang", "#!/no/sh\n"), "args": []}, 127, ("bang", "'/no/sh'", "ENOENT", "first")),
        ({"command": _file(tmp_path / "bare", "echo"), "args": []}, 126, ("bare", "ENOEXEC", "#!/bin/sh")),
        ({"command": str(tmp_path), "args": []}, 126, (str(tmp_path), "EACCES", "is a directory")),
        ({"command": "true", "workdir": "/no/such"}, 127, ("working directory '/no/such'", "ENOENT", "create it")),
        ({"command": "true", "workdir": "/etc/passwd"}, 126, ("working directory", "ENOTDIR", "name another one")),
        ({"script": "x", "interpreter": "/no/such"}, 127, ("'/no/such'", "ENOENT")),
    ]
    for task, code, words in cases:
        detail = await host.wait_for(await host.submit(**task))
        assert (detail["state"], detail["cause"], detail["exit_code"]) == ("failed", "launch_failed", code), task
        for word in words:
            assert word in detail["error"], (word, detail["error"])
        assert [run["process_id"] for run in detail["runs"]] == [None]
    assert (await host.wait_for(await host.submit(command="true")))["state"] == "completed"


async def test_what_can_never_be_started_is_not_taken(host: AgentProcess) -> None:
    """It is refused where it is handed in, with a reason, and nothing is stored."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"command": "x", "args": ["a\0b"]}, "NUL"),
        ({"command": "x\0"}, "NUL"),
        ({"command": "x", "env": {"A=B": "c"}}, "an environment name must not be empty or contain '='"),
        ({"command": "x", "env": {"": "c"}}, "an environment name must not be empty or contain '='"),
        ({"command": "x", "env": {"A": "\0"}}, "NUL"),
        ({"command": "x", "args": ["y" * 131_072]}, "is longer than 131071 bytes"),
        ({"command": "x", "args": ["y" * 100_000] * 30}, "is larger than 1048576 bytes"),
        ({"command": "x", "workdir": "\0"}, "NUL"),
    ]
    for task, words in cases:
        body = io.BytesIO(json.dumps({"task": task}).encode())
        status, answer = await host.call("POST", "/tasks", data=body)
        assert (status, answer["success"]) == (400, False)
        assert words in answer["message"], answer["message"][:300]
    assert (await host.get("/tasks"))["total"] == 0


async def test_a_thousand_variables(host: AgentProcess) -> None:
    """A large environment arrives."""
    env = {f"NAME_{number}": "v" * 100 for number in range(1000)}
    task_id = await host.submit(command="env | grep -c ^NAME_", env=env)
    assert (await host.wait_for(task_id))["state"] == "completed"
    assert await host.output(task_id) == "1000\n"


async def test_claimed_tasks_that_cannot_be_started(tmp_path: Path) -> None:
    """3 MB of arguments end as `launch_failed` with E2BIG; NUL and `=` as refused; the good one beside them runs."""
    lease = {"machine_id": MACHINE_ID, "lease_ttl_sec": 300, "status": "assigned"}
    items = [
        {"id": "long", "attempt_id": "a-long", "command": "true", "args": ["y" * 100_000] * 30, **lease},
        {"id": "nul", "attempt_id": "a-nul", "command": "true", "args": ["a\0b"], **lease},
        {"id": "name", "attempt_id": "a-name", "command": "true", "env": {"A=B": "c"}, **lease},
        {"id": "missing", "attempt_id": "a-missing", "command": "/no/such", "args": ["x"], **lease},
        {"id": "good", "attempt_id": "a-good", "command": "true", **lease},
    ]
    body = json.dumps({"code": 0, "message": "ok", "data": {"tasks": items}}).encode()
    async with fleet(tmp_path, {"capacity": {"max_concurrent": 1}}) as both:
        both.plane.faults.order("claim", Respond(200, body, {"Content-Type": "application/json"}))
        [first] = await both.submit({"command": "true"})  # wakes the long poll that is held
        await both.ended([first])
        assert (await both.host.wait_for("good"))["state"] == "completed"
        for task_id, code, word in (("long", 126, "E2BIG"), ("missing", 127, "ENOENT")):
            detail = await both.host.wait_for(task_id)
            assert (detail["cause"], detail["exit_code"]) == ("launch_failed", code)
            assert word in detail["error"]
        log = both.host.log.read_text()
        assert "NUL" in log
        assert "an environment name must not be empty or contain" in log


async def test_the_plane_hears_why_a_claimed_task_is_refused(tmp_path: Path) -> None:
    """NUL in an argument, `=` in a name, from a plane that checks nothing: completed as failed, with cause and reason.

    Each attempt ends with its one completion; none lapses, and the good task behind them has the one slot.
    """
    specs: dict[str, tuple[dict[str, Any], str]] = {
        "nul": ({"command": "true", "args": ["a\0b"]}, "NUL"),
        "name": ({"command": "true", "env": {"A=B": "c"}}, "an environment name must not be empty or contain '='"),
    }
    new = [NewTask(name, name, {"id": name, **spec}, MACHINE_ID, 0) for name, (spec, _) in specs.items()]
    settings = {"capacity": {"max_concurrent": 1}, "control_plane": {"poll_interval": 0.1}}
    async with fleet(tmp_path, settings, is_started=False) as both:
        assert await both.plane.service.work.run(lambda db: stored_tasks.add(db, new, 0)) is None
        [good] = await both.submit({"command": "true"})
        await both.host.start()
        *refused, ran = await both.ended([*specs, good])
        assert (ran["status"], ran["completions"]["accepted"]) == ("completed", 1)
        for task, (_, reason) in zip(refused, specs.values(), strict=True):
            assert task["status"] == "failed", task
            result = task["result"]
            assert (result["cause"], result["runs"]) == ("policy_refused", 0)
            assert result["error"].startswith("the agent cannot run this task: ")
            assert reason in result["error"]
            assert task["completions"]["accepted"] == 1
            assert [event["kind"] for event in task["events"]] == ["created", "claimed", "completed"]
