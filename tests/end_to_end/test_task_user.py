"""Tasks of a user of their own, under an agent that is root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.end_to_end.agent_process import agent
from tests.end_to_end.gates import Gate

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run tasks as another user")


async def test_a_script_runs_as_the_tasks_user_and_its_progress_is_seen(open_dir: Path) -> None:
    """`tasks.run_as`: uid, file rights and progress are that user's."""
    gate = Gate(open_dir / "gate")
    async with agent(open_dir, tasks={"run_as": "nobody"}) as host:
        script = f'id -un; echo "40 half" >"$REMOTEGPU_PROGRESS"; {gate.wait}; test -O "$REMOTEGPU_PROGRESS"'
        task_id = await host.submit(script=script)
        await host.until_shown(f"/tasks/{task_id}", lambda task: task["progress_message"] == "half")
        gate.open()
        assert (await host.wait_for(task_id))["state"] == "completed"
        assert await host.output(task_id) == "nobody\n"


async def test_f52_no_secret_of_root_leaks_through_what_a_task_plants(open_dir: Path) -> None:
    """F52: links to a file that only root may read, where the agent reads: nothing of it is ever shown."""
    secret = open_dir / "secret"
    secret.write_text("77 hunter2\n")
    secret.chmod(0o600)
    async with agent(open_dir, tasks={"run_as": "nobody"}) as host:
        plant = f'rm -f "$REMOTEGPU_PROGRESS"; ln -s {secret} "$REMOTEGPU_PROGRESS"'
        outside = f'd=$(dirname "$REMOTEGPU_PROGRESS"); rm -rf "$d"; ln -s {open_dir} "$d"'
        for command in (plant, f"{plant}; {outside}; ln -s {secret} progress"):
            task_id = await host.submit(command=f"{command}; true")
            assert (await host.wait_for(task_id))["state"] == "completed"
            shown = await host.get(f"/tasks/{task_id}")
            assert (shown["progress_percent"], shown["progress_message"]) == (None, None)
        assert "hunter2" not in host.log.read_text()
