"""Launching, and letting go: nothing is started twice, nothing is left in the agent."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import statistics
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId, EndedBy, ProcessIdentity
from remotegpu_sidecar import identity, tree
from remotegpu_sidecar.launcher import AdoptedState, Launcher, LaunchError
from tests.sidecar.support import (
    DEADLINE_S,
    both_placements,
    kill_if_alive,
    launched,
    make_spec,
    pid_from,
    python,
    sh,
    until,
    wait_until_dead,
)


def open_fds() -> set[str]:
    """What this process has open."""
    return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)}


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


@both_placements
async def test_run_has_its_identities(launcher: Launcher) -> None:
    """What `launch` returns is on record, and is true."""
    run = await launched(launcher, make_spec("sleep", "1000"))
    assert run.started is not None
    assert run.started.shim == run.shim
    for who in (run.shim, run.started.process):
        assert identity.is_alive(who)
    assert Path(f"/proc/{run.shim.pid}/comm").read_text() == "remotegpu-shim\n"
    assert tree.children(run.shim.pid) == [run.started.process.pid]
    run.kill()
    record = await run.wait()
    assert record.started == run.started
    assert record.spec == run.spec
    run.close()


async def test_run_directory_is_used_once(launcher: Launcher) -> None:
    """A run is never started twice, not even after its end."""
    run = await launched(launcher, make_spec("true"))
    await run.wait()
    run.close()
    with pytest.raises(LaunchError, match="never started twice") as caught:
        await launched(launcher, make_spec("true"))
    assert caught.value.errno == errno.EEXIST


@pytest.mark.parametrize("attempt", ["../escape", "a/b", "", ".hidden", "a\n", "x" * 129])
async def test_ids_that_are_no_names_are_refused(launcher: Launcher, attempts_dir: Path, attempt: str) -> None:
    """No path parts, nothing hidden, nothing overlong."""
    with pytest.raises(LaunchError, match="cannot name a directory"):
        await launched(
            launcher, make_spec("true", attempt="good").model_copy(update={"attempt_id": AttemptId(attempt)})
        )
    assert list(attempts_dir.iterdir()) == []


async def test_directory_is_private_and_holds_few_files(launcher: Launcher) -> None:
    """0700, and one file for a run without lease and output."""
    run = await launched(launcher, make_spec("true"))
    await run.wait()
    run.close()
    assert run.directory.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in run.directory.iterdir()] == ["record"]


async def test_spec_beyond_the_bound_is_refused(launcher: Launcher, attempts_dir: Path) -> None:
    """A record stays readable; nothing is left of the refused one."""
    with pytest.raises(LaunchError, match="more than") as caught:
        await launched(launcher, make_spec("true", *["x" * 120_000] * (limits.RECORD_MAX_BYTES // 120_000 + 1)))
    assert caught.value.errno == errno.E2BIG
    assert list(attempts_dir.iterdir()) == []


async def test_placement_comes_before_the_start(launcher: Launcher, tmp_path: Path) -> None:
    """The hook gets a living shim that has started nothing yet."""
    seen: list[ProcessIdentity] = []

    async def place(shim: ProcessIdentity) -> None:
        assert identity.is_alive(shim)
        assert tree.children(shim.pid) == []
        seen.append(shim)

    run = await launched(launcher, make_spec("true"), place=place)
    assert seen == [run.shim]
    await run.wait()
    run.close()


async def test_refused_placement_starts_nothing(launcher: Launcher, attempts_dir: Path, tmp_path: Path) -> None:
    """The launch fails with the hook's reason, and the shim goes."""
    seen: list[ProcessIdentity] = []

    async def place(shim: ProcessIdentity) -> None:
        seen.append(shim)
        raise PermissionError(errno.EPERM, "no scope for you")

    with pytest.raises(LaunchError, match="no scope for you") as caught:
        await launched(launcher, make_spec("touch", str(tmp_path / "ran")), place=place)
    assert caught.value.errno == errno.EPERM
    wait_until_dead(seen[0])
    [adopted] = await launcher.adopt()
    assert adopted.record is not None
    assert adopted.record.ended is not None
    assert adopted.record.ended.ended_by is EndedBy.ABANDONED
    assert not (tmp_path / "ran").exists()


async def test_cancelled_before_go_starts_nothing(launcher: Launcher, tmp_path: Path) -> None:
    """The caller went away while the shim was being placed."""
    seen: asyncio.Future[ProcessIdentity] = asyncio.get_running_loop().create_future()

    async def place(shim: ProcessIdentity) -> None:
        seen.set_result(shim)
        await asyncio.Event().wait()

    launch = asyncio.create_task(launched(launcher, make_spec("touch", str(tmp_path / "ran")), place=place))
    shim = await seen
    launch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await launch
    wait_until_dead(shim)
    assert not (tmp_path / "ran").exists()


async def test_shim_killed_before_go(launcher: Launcher, attempts_dir: Path) -> None:
    """Nothing was started, and the launch says so."""

    async def place(shim: ProcessIdentity) -> None:
        kill_if_alive(shim)
        wait_until_dead(shim)

    with pytest.raises(LaunchError, match="was lost"):
        await launched(launcher, make_spec("true"), place=place)
    [adopted] = await launcher.adopt()
    assert adopted.state is AdoptedState.NEVER_STARTED


@both_placements
async def test_f09_shim_killed_while_the_agent_lives(launcher: Launcher, tmp_path: Path) -> None:
    """F09: `wait` returns a record without an end, and by then the whole tree is gone."""
    script = f"(setsid sh -c 'echo $$ >{tmp_path}/pid; sleep 1000; true' &); sleep 1000"
    run = await launched(launcher, make_spec(*sh(script)))
    assert run.started is not None
    daemon = await pid_from(tmp_path / "pid")
    os.kill(run.shim.pid, signal.SIGKILL)
    record = await run.wait()
    run.close()
    assert record.ended is None
    assert record.started == run.started
    assert not identity.is_alive(daemon)
    assert not identity.is_alive(run.started.process)


@both_placements
@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
async def test_f52_a_record_that_is_no_file_any_more_ends_as_a_lost_one(
    launcher: Launcher, plant: Callable[[Path], None]
) -> None:
    """F52: what a task of the agent's own user puts in its record's place is neither waited for nor followed."""
    run = await launched(launcher, make_spec("sleep", "100"))
    path = run.directory / "record"
    path.unlink()
    plant(path)
    run.kill()
    async with asyncio.timeout(DEADLINE_S):
        record = await run.wait()
    run.close()
    assert record.ended is None
    assert run.started is not None
    assert not identity.is_alive(run.started.process)


async def test_lost_shims_tree_is_told_by_attempt_and_run(launcher: Launcher, tmp_path: Path) -> None:
    """Another run of the same attempt, and the same run number of another attempt, are not touched."""
    bystanders = [
        await launched(launcher, make_spec("sleep", "1000", attempt=attempt, run_no=run_no))
        for attempt, run_no in (("attempt", 2), ("other", 1))
    ]
    run = await launched(launcher, make_spec("sleep", "1000"))
    os.kill(run.shim.pid, signal.SIGKILL)
    assert (await run.wait()).ended is None
    run.close()
    for each in bystanders:
        assert each.started is not None
        assert identity.is_alive(each.started.process)
        each.kill()
        await each.wait()
        each.close()


async def test_waiting_is_shared_and_repeatable(launcher: Launcher) -> None:
    """Any number of callers, one of them cancelled, and once more after the end."""
    run = await launched(launcher, make_spec(*sh("read x; exit 2")))
    waiters = [asyncio.create_task(run.wait()) for _ in range(5)]
    waiters.pop().cancel()
    records = await asyncio.gather(*waiters)
    assert {id(record) for record in records} == {id(await run.wait())}
    run.close()


async def test_closing_ends_a_wait(launcher: Launcher) -> None:
    """Whoever waits is told; the run itself goes on."""
    run = await launched(launcher, make_spec("sleep", "1000"))
    waiter = asyncio.create_task(run.wait())
    await asyncio.sleep(0)
    run.close()
    with pytest.raises(RuntimeError, match="closed"):
        await waiter
    assert identity.is_alive(run.shim)
    [adopted] = await launcher.adopt()
    assert adopted.run is not None
    adopted.run.kill()
    await adopted.run.wait()
    adopted.run.close()


async def test_launch_after_stop_is_refused(launcher: Launcher) -> None:
    """A stopped launcher does not come back by itself."""
    await launcher.stop()
    with pytest.raises(LaunchError, match="stopped"):
        await launched(launcher, make_spec("true"))
    await launcher.stop()


@both_placements
async def test_runs_stay_when_the_launcher_stops(launcher: Launcher) -> None:
    """The spawner goes, the run does not; it can still be stopped and waited for."""
    run = await launched(launcher, make_spec("sleep", "1000"))
    await launcher.stop()
    assert identity.is_alive(run.shim)
    run.stop()
    ended = (await run.wait()).ended
    run.close()
    assert ended is not None
    assert ended.ended_by is EndedBy.STOP


@both_placements
async def test_a_running_task_costs_little_memory(launcher: Launcher) -> None:
    """A shim that waits has less than 1.5 MiB for itself: the rest it shares with the spawner and the others."""
    runs = [await launched(launcher, make_spec("sleep", "1000", run_no=number)) for number in range(1, 12)]
    try:
        for run in runs:
            await run.wait_started()
        own = [int(psutil.Process(run.shim.pid).memory_full_info().uss) for run in runs]
    finally:
        for run in runs:
            run.kill()
            await run.wait()
            run.close()
    assert statistics.median(own) < 1.5 * limits.MIB, own


async def test_nothing_is_left_in_the_agent(attempts_dir: Path) -> None:
    """No descriptor, no child, no thread, no task after fifty launches and the stop."""
    warm = Launcher(attempts_dir)
    await warm.start()
    await warm.stop()
    before, fds_before = set(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
    children_before, threads_before = tree.children(os.getpid()), threading.active_count()
    launcher = Launcher(attempts_dir)
    await launcher.start()
    while_up = len(os.listdir("/proc/self/fd"))

    async def one(number: int) -> None:
        run = await launched(launcher, make_spec(*sh(f"echo {number}; exit {number % 3}"), run_no=number))
        assert (await run.wait()).ended is not None
        run.close()

    await asyncio.gather(*(one(number) for number in range(1, 51)))
    assert len(os.listdir("/proc/self/fd")) == while_up
    await launcher.stop()
    assert len(os.listdir("/proc/self/fd")) == fds_before, open_fds()
    assert tree.children(os.getpid()) == children_before
    assert threading.active_count() == threads_before
    assert set(asyncio.all_tasks()) == before


async def test_spawner_stuck_is_replaced(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen spawner costs one launch its time limit, and no other."""
    monkeypatch.setattr("remotegpu_sidecar.launcher.HELLO_TIMEOUT_S", 0.2)
    assert launcher.spawner_pid is not None
    os.kill(launcher.spawner_pid, signal.SIGSTOP)
    with pytest.raises(LaunchError, match="did not answer") as caught:
        await launched(launcher, make_spec("true", run_no=1))
    assert caught.value.errno == errno.ETIMEDOUT
    monkeypatch.undo()
    run = await launched(launcher, make_spec("true", run_no=2))
    await run.wait()
    run.close()


async def test_f27_no_descriptors_left(launcher: Launcher) -> None:
    """F27: the launch fails with its errno, and works again when there are some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, hard))
    try:
        while True:
            try:
                held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        with pytest.raises(LaunchError) as caught:
            await launched(launcher, make_spec("true", run_no=1))
        assert caught.value.errno == errno.EMFILE
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    run = await launched(launcher, make_spec("true", run_no=2))
    await run.wait()
    run.close()


async def test_missing_interpreter_is_a_launch_error(attempts_dir: Path) -> None:
    """A Python that is not there: a sentence, no traceback, nothing left."""
    launcher = Launcher(attempts_dir, python="/no/such/python")
    with pytest.raises(LaunchError, match="spawner cannot be started"):
        await launcher.start()
    await launcher.stop()


async def test_each_run_has_its_own_end(launcher: Launcher) -> None:
    """With three runs at once, each end is its own."""
    runs = [await launched(launcher, make_spec(*python(f"raise SystemExit({n})"), run_no=n)) for n in (1, 2, 3)]
    records = [await run.wait() for run in runs]
    assert [record.ended.exit_code if record.ended else None for record in records] == [1, 2, 3]
    for run in runs:
        run.close()


async def test_descriptor_count_of_a_shim_is_small(launcher: Launcher) -> None:
    """A shim holds its directory, record, timer, wake-up pipe and two pipes, and no more."""
    run = await launched(launcher, make_spec("sleep", "1000"))
    await until(lambda: len(os.listdir(f"/proc/{run.shim.pid}/fd")) <= 10, "the shim to settle")
    targets = [os.readlink(f"/proc/{run.shim.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{run.shim.pid}/fd")]
    assert targets.count("/dev/null") == 3
    assert len(targets) == 10
    run.kill()
    await run.wait()
    run.close()
