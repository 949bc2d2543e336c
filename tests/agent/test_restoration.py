"""Directories that the database does not know, of this release and of earlier ones: what is taken in, what left."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent.recovery import Recovered, recover
from remotegpu_agent.restoration import Restoration, Restored, Strays, names_on_record
from remotegpu_queue import views
from remotegpu_schemas.attempt import AttemptId, RunSpec
from remotegpu_schemas.states import Cause, TaskState
from remotegpu_schemas.task import TaskId
from tests.agent.support import BOOT, Host, host
from tests.sidecar.support import make_spec

DEADLINE_NS = 2**60


@pytest.fixture
async def parts(tmp_path: Path) -> AsyncGenerator[Host]:
    """The parts of the new agent, on an empty database."""
    async with host(tmp_path) as made:
        yield made


def attempt_id(task_id: str) -> AttemptId:
    """Of the one attempt of a task."""
    return AttemptId(make_spec("true", attempt=f"{task_id}-a").attempt_id)


async def run(parts: Host, spec: RunSpec, *, deadline_ns: int | None = None, is_over: bool = False) -> None:
    """A run that an earlier agent began, and that nobody holds."""
    made = await parts.launcher.launch(spec, deadline_ns)
    if is_over:
        await made.wait()
    else:
        assert await made.wait_started() is not None
    made.close()


def spec_of(task_id: str, *argv: str, memo: dict[str, Any] | None = None, **more: Any) -> RunSpec:
    """A spec as an earlier release wrote it, unless there is a memo."""
    made = make_spec(*argv, attempt=f"{task_id}-a")
    return made.model_copy(update={"task_id": task_id, "memo": memo, **more})


def memo_of(task_id: str, origin: str = "local", **more: Any) -> dict[str, Any]:
    """What this release remembers."""
    task = {"id": task_id, "command": "true", "retry": {"max": 3, "delay_s": 0}}
    return {"task": task, "origin": origin, "submitted_at_ms": 500, "started_at_ms": 600, **more}


async def taken_in(parts: Host, *, is_rebuild: bool) -> tuple[Restored, Recovered, Strays]:
    """What a start does."""
    found = await parts.launcher.adopt()
    restoration = Restoration(parts.store, parts.reports, BOOT, 10_000, is_rebuild=is_rebuild, default_ttl_s=300.0)
    restored = await restoration.restore(found)
    recovered = await recover(parts.store, parts.executor, found)
    restored = await restoration.restore_later(restored)
    return restored, recovered, await restoration.strays(found)


async def reports(parts: Host) -> list[str]:
    """The kinds of what waits for delivery."""
    return await parts.store.read(lambda db: [row["kind"] for row in db.execute("SELECT kind FROM outbox ORDER BY id")])


async def test_f38_runs_of_an_earlier_release_are_adopted_by_a_new_database(parts: Host) -> None:
    """F38: their records have no memo; with a deadline it was a claimed task, which keeps its lease."""
    await run(parts, spec_of("local", "sleep", "60"))
    await run(parts, spec_of("claimed", "sleep", "60", lease_grace_s=5.0), deadline_ns=DEADLINE_NS)
    restored, recovered, _ = await taken_in(parts, is_rebuild=True)
    assert (restored.alive, recovered) == (2, Recovered(2, 0))
    local, claimed = await parts.attempt(attempt_id("local")), await parts.attempt(attempt_id("claimed"))
    assert (local.origin, local.lease, local.task.command, local.task.args) == ("local", None, "sleep", ("60",))
    assert claimed.origin == "control_plane"
    lease = parts.leases.current(claimed.attempt_id)
    assert lease is not None
    assert lease.deadline_boottime_ns == DEADLINE_NS
    assert await parts.executor.stop(claimed.attempt_id, Cause.CANCELLED)
    await parts.has_ended(claimed.attempt_id)
    assert await reports(parts) == ["start", "complete"]


async def test_without_a_rebuild_what_has_no_memo_is_left_alone(parts: Host) -> None:
    """A database that is whole and does not know it: nobody but an operator may end what nobody knows."""
    await run(parts, spec_of("stranger", "sleep", "60"))
    restored, recovered, strays = await taken_in(parts, is_rebuild=False)
    assert (restored.left, recovered) == (1, Recovered(0, 0))
    assert strays == Strays([], frozenset({TaskId("stranger")}))
    [found] = await parts.launcher.adopt()
    assert found.run is not None
    found.run.kill()
    await found.run.wait()
    found.run.close()


async def test_an_unreadable_memo_does_not_keep_a_run_from_adoption(parts: Host) -> None:
    """Its spec tells enough."""
    await run(parts, spec_of("t", "sleep", "60", memo={"task": {"id": "t"}, "origin": "the moon"}))
    restored, recovered, _ = await taken_in(parts, is_rebuild=True)
    assert (restored.alive, recovered) == (1, Recovered(1, 0))


async def test_what_is_over_is_stored_and_reported_and_never_run_again(parts: Host) -> None:
    """Its policy would allow retries; whether somebody had asked for its end meanwhile nobody knows any more."""
    await run(parts, spec_of("claimed", "false", memo=memo_of("claimed", "control_plane")), is_over=True)
    await run(parts, spec_of("local", "false", memo=memo_of("local")), is_over=True)
    restored, recovered, _ = await taken_in(parts, is_rebuild=False)
    assert (restored, recovered) == (Restored(0, 2, 0), Recovered(0, 0))
    for name in ("claimed", "local"):
        after = await parts.attempt(attempt_id(name))
        assert (after.state, after.cause, after.exit_code) == (TaskState.FAILED, Cause.EXIT_CODE, 1)
        assert (after.submitted_at_ms, after.started_at_ms) == (500, 600)
    assert await reports(parts) == ["start", "complete"]
    assert (await parts.store.read(lambda db: views.find_task(db, "claimed")))[1][0].usage is not None
    again, _, _ = await taken_in(parts, is_rebuild=False)
    assert again == Restored()


async def test_a_directory_without_a_row_and_without_life_is_a_stray(parts: Host) -> None:
    """So that age removes it; one that cannot be read is left alone."""
    await run(parts, spec_of("t", "true"), is_over=True)
    attempts = parts.directory / "attempts"
    (attempts / "empty.1").mkdir()
    (attempts / "not a run").mkdir()
    _, _, strays = await taken_in(parts, is_rebuild=False)
    assert sorted(path.name for path in strays.directories) == ["empty.1", f"{attempt_id('t')}.1"]
    assert strays.living is None


async def test_names_are_found_in_the_newest_record_that_can_be_read(parts: Host) -> None:
    """The agent keeps its name over the loss of its database: the plane knows its attempts by that."""
    attempts = parts.directory / "attempts"
    assert names_on_record(attempts / "nowhere") == {}
    assert names_on_record(attempts) == {}
    names = {"REMOTEGPU_AGENT_ID": "gpu-7", "REMOTEGPU_MACHINE_ID": "m-7"}
    await run(parts, spec_of("t", "true", env={"PATH": "/usr/bin:/bin", **names}), is_over=True)
    (attempts / "later.1").mkdir()
    (attempts / "later.1" / "record").write_text(json.dumps({"no": "record"}))
    assert names_on_record(attempts) == {"agent_id": "gpu-7", "machine_id": "m-7"}
