"""The examples work: every task file through a real stand-alone agent, and the demo as a person starts it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from remotegpu_schemas.taskfile import load_task_file
from tests.end_to_end.agent_process import REPOSITORY, agent

EXAMPLES: Final = REPOSITORY / "examples"
FILES: Final = sorted((EXAMPLES / "tasks").glob("*.yaml"))
DEMO_DEADLINE_S: Final = 100.0


def test_there_are_examples() -> None:
    """The files that the tests below go through are there."""
    assert {"hello.yaml", "train.yaml"} <= {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_says_what_it_shows(file: Path) -> None:
    """Each file is valid, begins with a comment, and its tasks carry no id: it can be submitted again."""
    content = file.read_bytes()
    assert content.startswith(b"# ")
    submissions = load_task_file(content, file.name)
    assert submissions
    assert all(submission.form.id is None and submission.form.name for submission in submissions)


async def test_every_example_ends_as_it_says(tmp_path: Path) -> None:
    """All of them through one agent: the cause is the label `expect`, else success; training leaves its checkpoint."""
    async with agent(tmp_path, capacity={"max_concurrent": 4}) as host:
        submitted: dict[str, list[str]] = {}
        for file in FILES:
            submitted[file.name] = (await host.post("/tasks", file.read_text()))["task_ids"]
        details: dict[str, Any] = {}
        for name, task_ids in submitted.items():
            for task_id in task_ids:
                detail = details[name] = await host.wait_for(task_id)
                assert detail["cause"] == detail["labels"].get("expect", "succeeded"), detail
                assert (await host.output(task_id)).strip(), name
        assert details["retry.yaml"]["run_no"] == 3
        training = details["train.yaml"]
        assert training["progress_percent"] == 100
        checkpoint = host.state_dir / "work" / training["id"] / "checkpoints" / "weights.json"
        epoch, _hidden, _output = json.loads(checkpoint.read_text())
        assert epoch == 60


async def test_the_demo_shows_its_results_and_leaves_nothing(tmp_path: Path) -> None:
    """`examples/demo.py` exits 0 with a table of all tasks; no process and no directory of it is left."""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    done = await asyncio.to_thread(_demo, scratch)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert next(line for line in lines if line.startswith("NAME")).split()[:3] == ["NAME", "STATUS", "CAUSE"]
    assert lines[-1].endswith("tasks, every task ended as its file says.")
    assert any(line.startswith("hello ") and "| hello from " in line for line in lines)
    assert not list(scratch.iterdir())
    assert not _processes_of(scratch)


async def test_a_demo_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM in the middle: the agent, the control plane and the directory go, and it says so by its code."""
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / "demo.py"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(scratch),
    )
    assert process.stdout is not None
    async with asyncio.timeout(DEMO_DEADLINE_S):
        async for line in process.stdout:
            if line.startswith(b"agent "):
                break
        process.send_signal(signal.SIGTERM)
        await process.communicate()
    assert process.returncode == 143
    assert not list(scratch.iterdir())
    assert not _processes_of(scratch)


def _demo(scratch: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEMO_DEADLINE_S,
        check=False,
        env=_environment(scratch),
    )


def _environment(scratch: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REMOTEGPU_")}
    return {**kept, "TMPDIR": str(scratch)}


def _processes_of(directory: Path) -> list[str]:
    """Command lines of processes that speak of the directory, or were started for a run in it."""
    found = []
    for process in psutil.process_iter():
        try:
            text = " ".join([*process.cmdline(), *process.environ().values()])
        except psutil.Error:
            continue
        if str(directory) in text:
            found.append(text)
    return found
