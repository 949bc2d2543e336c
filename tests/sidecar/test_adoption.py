"""A new agent finds out, from directories and /proc alone, what became of every run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from remotegpu_schemas.attempt import EndedBy, PlacementKind, ProcessIdentity, RunSpec
from remotegpu_sidecar import identity, record
from remotegpu_sidecar.adoption import directory_name
from remotegpu_sidecar.launcher import Adopted, AdoptedState, Launcher
from remotegpu_sidecar.output import read_output
from remotegpu_sidecar.placement import choose
from tests.sidecar.support import (
    AgentProcess,
    both_placements,
    identity_of,
    kill_if_alive,
    make_spec,
    pid_from,
    python,
    sh,
    unique,
    until_file,
    wait_until_dead,
)


def write_record(attempts_dir: Path, spec: RunSpec, *lines: tuple[str, object]) -> Path:
    """A run directory as an earlier agent and shim left it."""
    directory = attempts_dir / directory_name(spec.attempt_id, spec.run_no)
    directory.mkdir(parents=True)
    content = record.encode("spec", spec.model_dump_json().encode())
    for kind, data in lines:
        content += record.encode(kind, json.dumps(data).encode())
    (directory / "record").write_bytes(content)
    return directory


def gone(boot: str | None = None) -> dict[str, object]:
    """The identity of a process that is no more."""
    return {"boot_id": boot or identity.boot_id(), "pid": 4_000_000, "start_ticks": 1}


def started(boot: str | None = None) -> dict[str, object]:
    """A started line whose processes are no more."""
    return {"process": gone(boot), "shim": gone(boot), "started_wall_ns": 1, "started_boottime_ns": 1}


async def adopt_one(attempts_dir: Path, placement_kind: PlacementKind = PlacementKind.PROCESS_GROUP) -> Adopted:
    """Take stock of a directory with one run."""
    [adopted] = await Launcher(attempts_dir, await choose(placement_kind)).adopt()
    return adopted


async def test_no_directory_no_runs(tmp_path: Path) -> None:
    """A fresh host has nothing to adopt."""
    assert await Launcher(tmp_path / "none").adopt() == []


@both_placements
async def test_f04_agent_killed_while_the_task_runs(
    attempts_dir: Path, tmp_path: Path, placement_kind: PlacementKind
) -> None:
    """F04: the task goes on, is adopted, its output is whole, its exit status is right."""
    script = f"""
import os, time
count = 0
while not os.path.exists({str(tmp_path / "enough")!r}):
    os.write(1, b"%07d\\n" % count)
    count += 1
    if count == 1000: open({str(tmp_path / "busy")!r}, "w").write("busy\\n")
os.write(2, b"%d" % count)
os._exit(17)
"""
    with AgentProcess(
        attempts_dir, (make_spec(*python(script), output_limit_bytes=1 << 30), None), placement=placement_kind
    ) as agent:
        await until_file(tmp_path / "busy")
        agent.kill()
        assert identity.stat_of(agent.task_pids[0]) is not None
    adopted = await adopt_one(attempts_dir, placement_kind)
    assert adopted.state is AdoptedState.RUNNING
    assert adopted.run is not None
    assert adopted.run.started is not None
    assert adopted.run.contains(adopted.run.started.process.pid)
    (tmp_path / "enough").touch()
    result = await adopted.run.wait()
    adopted.run.close()
    assert result.ended is not None
    assert (result.ended.ended_by, result.ended.exit_code) == (EndedBy.EXIT, 17)
    lines = int(read_output(adopted.directory, "stderr", 0, 100)[1])
    assert result.ended.stdout_bytes == lines * 8
    offset = 0
    while offset < lines * 8:
        first, data, _ = read_output(adopted.directory, "stdout", offset, 80_000)
        assert (first, len(data) % 8) == (offset, 0)
        assert data == b"".join(b"%07d\n" % n for n in range(offset // 8, (offset + len(data)) // 8))
        offset += len(data)


@both_placements
async def test_f05_ended_while_no_agent_was_there(
    attempts_dir: Path, tmp_path: Path, placement_kind: PlacementKind
) -> None:
    """F05: the record tells a later agent all of it."""
    os.mkfifo(tmp_path / "fifo")
    with AgentProcess(
        attempts_dir, (make_spec(*sh(f"read line <{tmp_path}/fifo; echo out; exit 6")), None), placement=placement_kind
    ) as agent:
        agent.kill()
    shim = await _shim_of(attempts_dir / f"{unique()}.1")
    (tmp_path / "fifo").write_text("go\n")
    wait_until_dead(shim)
    adopted = await adopt_one(attempts_dir, placement_kind)
    assert (adopted.state, adopted.attempt_id, adopted.run_no) == (AdoptedState.ENDED, unique(), 1)
    assert adopted.record is not None
    assert adopted.record.ended is not None
    assert adopted.record.ended.exit_code == 6
    assert adopted.record.started is not None


async def _shim_of(directory: Path) -> ProcessIdentity:
    return ProcessIdentity.model_validate(record.read(directory / "record")[0]["shim"]["shim"])


@both_placements
async def test_f09_shim_and_agent_killed(attempts_dir: Path, tmp_path: Path, placement_kind: PlacementKind) -> None:
    """F09: the next agent kills the whole tree, daemons too, proves it gone, and says that the run is lost."""
    script = f"(setsid sh -c 'echo $$ >{tmp_path}/pid; sleep 1000; true' &); sleep 1000"
    other = make_spec("sleep", "1000", attempt="other")
    with AgentProcess(attempts_dir, (make_spec(*sh(script)), None), (other, None), placement=placement_kind) as agent:
        daemon = await pid_from(tmp_path / "pid")
        main, bystander = (identity_of(pid) for pid in agent.task_pids)
        agent.kill()
    kill_if_alive(await _shim_of(attempts_dir / f"{unique()}.1"))
    wait_until_dead(main)  # at once, without any agent
    lost, untouched = sorted(
        await Launcher(attempts_dir, await choose(placement_kind)).adopt(), key=lambda each: each.directory.name
    )
    assert (lost.state, lost.left_pids) == (AdoptedState.LOST, ())
    assert lost.record is not None
    assert lost.record.ended is None
    assert not identity.is_alive(daemon)
    assert untouched.state is AdoptedState.RUNNING
    assert identity.is_alive(bystander)
    assert untouched.run is not None
    untouched.run.kill()
    await untouched.run.wait()
    untouched.run.close()


@both_placements
async def test_f03_agent_killed_before_go(attempts_dir: Path, tmp_path: Path, placement_kind: PlacementKind) -> None:
    """F03: a shim that was never told to go starts nothing, ends, and says so."""
    spec = make_spec("touch", str(tmp_path / "ran"))
    with AgentProcess(attempts_dir, (spec, None), hangs_before_go=True, placement=placement_kind) as agent:
        shim = identity_of(agent.task_pids[0])
        agent.kill()
    wait_until_dead(shim)
    adopted = await adopt_one(attempts_dir, placement_kind)
    assert adopted.state is AdoptedState.ENDED
    assert adopted.record is not None
    assert adopted.record.ended is not None
    assert adopted.record.ended.ended_by is EndedBy.ABANDONED
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("lines", "state"),
    [
        ((), AdoptedState.NEVER_STARTED),
        ((("shim", {"shim": gone()}),), AdoptedState.NEVER_STARTED),
        ((("shim", {"shim": gone("old")}),), AdoptedState.NEVER_STARTED),
        ((("shim", {"shim": gone()}), ("starting", {})), AdoptedState.LOST),
        ((("shim", {"shim": gone()}), ("starting", {}), ("started", started())), AdoptedState.LOST),
        ((("shim", {"shim": gone("old")}), ("starting", {})), AdoptedState.OTHER_BOOT),
        ((("shim", {"shim": gone("old")}), ("started", started("old"))), AdoptedState.OTHER_BOOT),
        ((("shim", {"shim": gone("old")}), ("ended", {"ended_by": "exit", "ended_wall_ns": 1})), AdoptedState.ENDED),
        ((("ended", {"ended_by": "nonsense", "ended_wall_ns": 1}),), AdoptedState.UNREADABLE),
        ((("shim", {}),), AdoptedState.UNREADABLE),
    ],
)
async def test_what_the_lines_say(
    attempts_dir: Path, lines: tuple[tuple[str, object], ...], state: AdoptedState
) -> None:
    """Each combination of lines, with the shim gone, has one meaning."""
    write_record(attempts_dir, make_spec("true"), *lines)
    adopted = await adopt_one(attempts_dir)
    assert adopted.state is state, adopted.reason
    assert adopted.run is None
    assert bool(adopted.reason) == (state is AdoptedState.UNREADABLE)


async def test_f22_shims_pid_was_given_to_a_stranger(attempts_dir: Path) -> None:
    """F22: our own pid with another start time is no shim, and is not signalled."""
    reused = {**gone(), "pid": os.getpid()}
    lines = {"process": reused, "shim": reused, "started_wall_ns": 1, "started_boottime_ns": 1}
    write_record(attempts_dir, make_spec("true"), ("shim", {"shim": reused}), ("started", lines))
    assert (await adopt_one(attempts_dir)).state is AdoptedState.LOST


async def test_directories_that_are_not_understood_are_left_alone(attempts_dir: Path) -> None:
    """Reported with a reason; the others are adopted all the same."""
    good = write_record(attempts_dir, make_spec("true", attempt="good"))
    (attempts_dir / "noise").mkdir()
    (attempts_dir / "file.1").write_text("x")
    os.symlink(good, attempts_dir / "link.1")
    copied = attempts_dir / "copied.1"
    copied.mkdir()
    (copied / "record").write_bytes((good / "record").read_bytes())
    damaged = write_record(attempts_dir, make_spec("true", attempt="damaged"))
    (damaged / "record").write_bytes(b"x" + (damaged / "record").read_bytes())
    newer = write_record(attempts_dir, make_spec("true", attempt="newer"))
    (newer / "record").write_bytes((newer / "record").read_bytes().replace(b'{"v":1', b'{"v":2'))
    found = {each.directory.name: each for each in await Launcher(attempts_dir).adopt()}
    assert found.pop(good.name).state is AdoptedState.NEVER_STARTED
    assert len(found) == 6
    for each in found.values():
        assert each.state is AdoptedState.UNREADABLE
        assert each.reason
        assert each.directory.exists()
    assert "version 2" in found[newer.name].reason


@pytest.mark.parametrize("content", [None, b"", record.encode("spec", b"{}")[:30]])
async def test_spec_that_was_never_written(attempts_dir: Path, content: bytes | None) -> None:
    """F02: the agent was killed while it made the directory: nothing can have started."""
    directory = attempts_dir / f"{unique()}.1"
    directory.mkdir(parents=True)
    if content is not None:
        (directory / "record").write_bytes(content)
    adopted = await adopt_one(attempts_dir)
    assert (adopted.state, adopted.record, adopted.attempt_id) == (AdoptedState.NEVER_STARTED, None, unique())


async def test_many_runs_are_adopted_quickly(attempts_dir: Path) -> None:
    """Adoption looks at files and /proc once each: forty runs in well under a second, and all their ends are right."""
    import time

    specs = [(make_spec(*sh(f"sleep 1000; exit {n}"), attempt=f"a{n}"), None) for n in range(40)]
    with AgentProcess(attempts_dir, *specs) as agent:
        agent.kill()
    begun = time.monotonic()
    adopted = await Launcher(attempts_dir).adopt()
    assert time.monotonic() - begun < 1
    assert [each.state for each in adopted] == [AdoptedState.RUNNING] * 40
    for each in adopted:
        assert each.run is not None
        each.run.stop()
    for each in adopted:
        assert each.run is not None
        ended = (await each.run.wait()).ended
        assert ended is not None
        assert (ended.ended_by, ended.signal) == (EndedBy.STOP, signal.SIGTERM)
        each.run.close()


async def test_run_that_ends_during_the_survey_is_taken_as_it_is(attempts_dir: Path) -> None:
    """No run falls between running and ended, however the look at it and its end interleave."""
    specs = [(make_spec(*sh("exit 3"), attempt=f"a{n}"), None) for n in range(30)]
    with AgentProcess(attempts_dir, *specs) as agent:
        agent.kill()
    for each in await Launcher(attempts_dir).adopt():
        result = await each.run.wait() if each.run else each.record
        if each.run:
            each.run.close()
        assert result is not None
        assert result.ended is not None
        assert result.ended.exit_code == 3
