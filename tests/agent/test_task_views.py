"""What the API shows of a task, and what it never shows."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent.task_views import HIDDEN, command_line, run_view, task_detail, task_view
from remotegpu_queue import views
from remotegpu_queue.rows import Attempt, Run
from remotegpu_schemas.states import RunState
from remotegpu_schemas.task import Task
from tests.agent.support import Host, S, host

SECRET = "hunter2-hunter2"


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncGenerator[Host]:
    """A host on which tasks can run."""
    async with host(tmp_path) as made:
        yield made


async def stored(parts: Host, task_id: str) -> tuple[Attempt, list[Run]]:
    """The task as the database has it."""
    return await parts.store.read(lambda db: views.find_task(db, task_id))


def shown(attempt: Attempt, runs: list[Run], **more: Any) -> Any:
    """The whole answer."""
    view = task_view(
        attempt,
        runs[-1] if runs else None,
        lease=more.get("lease", attempt.lease),
        reason=more.get("reason"),
        now_boottime_ns=more.get("now_ns", 0),
    )
    return task_detail(view, attempt, runs)


@pytest.mark.parametrize(
    ("task", "line"),
    [
        ({"command": "echo a  b\n  | wc"}, "echo a b | wc"),
        ({"command": "echo", "args": ("a b", "$c", "")}, "echo 'a b' '$c' ''"),
        ({"command": "true", "args": ()}, "true"),
        ({"script": "#!/bin/sh\n\n# why\n  make all\nmake more"}, "script: make all"),
        ({"script": "# nothing"}, "script: "),
        ({"command": "x" * 5000}, "x" * 1000 + "…"),
    ],
)
def test_what_runs_as_one_line(task: dict[str, Any], line: str) -> None:
    """The shell string, the quoted vector, or the script's first line that does something; bounded."""
    assert command_line(Task(id="t", **task)) == line


@pytest.mark.parametrize("env", [{"TOKEN": SECRET}, {"A": SECRET, "B": "", "C": SECRET}])
async def test_f49_no_value_of_an_environment_is_shown(parts: Host, env: dict[str, str]) -> None:
    """F49: names are, values are not, in whatever state the task is."""
    attempt = await parts.add("t", env=env, command="exit 3")
    before = shown(*await stored(parts, "t"))
    await parts.run_to_end(attempt)
    after = shown(*await stored(parts, "t"))
    for detail in (before, after):
        assert SECRET not in detail.model_dump_json()
        assert detail.task["env"] == dict.fromkeys(env, HIDDEN)
    assert after.exit_code == 3


async def test_a_task_before_its_first_run(parts: Host) -> None:
    """It has a reason and nothing of a process."""
    await parts.add("t", labels={"team": "vision"}, priority=3, retry={"max": 4})
    detail = shown(*await stored(parts, "t"), reason="waits for rain")
    assert (detail.state, detail.reason, detail.priority) == ("pending", "waits for rain", 3)
    assert (detail.process_id, detail.started_at, detail.ended_at, detail.runs) == (None, None, None, [])
    assert (detail.labels, detail.max_retries, detail.run_no) == ({"team": "vision"}, 4, 0)
    assert (detail.lease_left_s, detail.is_synced, detail.is_stopping) == (None, True, False)
    assert detail.submitted_at.endswith("Z")


async def test_a_task_after_its_end(parts: Host) -> None:
    """It has a cause and times, no reason, and its process id stands with the run only."""
    await parts.run_to_end(await parts.add("t", command="exit 5"))
    attempt, runs = await stored(parts, "t")
    detail = shown(attempt, runs, reason="must not be shown")
    assert (detail.state, detail.cause, detail.exit_code) == ("failed", "exit_code", 5)
    assert (detail.reason, detail.process_id, detail.is_stopping) == (None, None, False)
    assert detail.error == "the task exited with code 5"
    assert detail.started_at <= detail.ended_at
    [run] = detail.runs
    assert run.process_id is not None
    assert run.usage["wall_s"] >= 0
    assert run == run_view(runs[0])
    assert run.state is RunState.ENDED


async def test_how_much_is_left_of_a_lease(parts: Host) -> None:
    """Seconds, never less than none, of an open attempt only."""
    attempt = await parts.add("t", ttl_s=100.0)
    assert attempt.lease is not None
    end_ns = attempt.lease.deadline_boottime_ns
    assert shown(attempt, [], now_ns=end_ns - 30 * S).lease_left_s == 30.0
    assert shown(attempt, [], now_ns=end_ns + 5 * S).lease_left_s == 0.0
    assert not shown(attempt, []).is_synced
    ended = await parts.run_to_end(attempt)
    assert shown(ended, [], now_ns=0).lease_left_s is None
