"""A run from start to end: its status, its output, its whole tree."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from pathlib import Path

import pytest

from remotegpu_schemas.attempt import EndedBy, RunEnded, RunSpec
from remotegpu_sidecar import identity, tree
from remotegpu_sidecar.launcher import Launcher, Run
from remotegpu_sidecar.output import read_output
from tests.frozen import frozen
from tests.sidecar.support import both_placements, launched, make_spec, pid_from, python, sh, unique, until, until_file

MIB = 1024 * 1024


async def ended_of(run: Run) -> RunEnded:
    """Wait for a run's end and let go of it."""
    record = await run.wait()
    run.close()
    assert record.ended is not None
    return record.ended


async def run_to_end(launcher: Launcher, spec: RunSpec) -> tuple[RunEnded, Path]:
    """Run a spec to its end."""
    run = await launched(launcher, spec)
    return await ended_of(run), run.directory


def is_gone(pid: int) -> bool:
    """Whether nothing runs under this pid."""
    stat = identity.stat_of(pid)
    return stat is None or stat.is_dead


# --- how it ended ---


@both_placements
@pytest.mark.parametrize("code", [0, 1, 42, 255])
async def test_exit_code_is_the_tasks(launcher: Launcher, code: int) -> None:
    """Each code comes through."""
    ended, _ = await run_to_end(launcher, make_spec(*sh(f"exit {code}")))
    assert (ended.ended_by, ended.exit_code, ended.signal) == (EndedBy.EXIT, code, None)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
async def test_signal_is_told_from_an_exit_code(launcher: Launcher, number: int) -> None:
    """Death by signal has a signal and no exit code."""
    ended, _ = await run_to_end(launcher, make_spec(*sh(f"kill -{number} $$")))
    assert (ended.ended_by, ended.exit_code, ended.signal) == (EndedBy.EXIT, None, number)


@both_placements
async def test_usage_is_measured(launcher: Launcher) -> None:
    """Wall time, processor time and peak memory of what the task did."""
    script = (
        "x = bytearray(80_000_000)\nimport time\nend = time.process_time() + 0.1\nwhile time.process_time() < end: pass"
    )
    ended, _ = await run_to_end(launcher, make_spec(*python(script)))
    assert 0.1 <= ended.usage.cpu_s < 5
    assert ended.usage.wall_s >= 0.1
    assert 80_000_000 < ended.usage.memory_peak_bytes < 300_000_000


async def test_bytes_to_and_from_the_disk_are_measured(launcher: Launcher, tmp_path: Path) -> None:
    """What a task writes through to the disk, and reads from it when it is no longer in memory."""
    path = str(tmp_path / "file")
    script = f"""
import os
fd = os.open({path!r}, os.O_CREAT | os.O_RDWR)
os.write(fd, b"x" * (8 << 20))
os.fsync(fd)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
os.pread(fd, 8 << 20, 0)
"""
    ended, _ = await run_to_end(launcher, make_spec(*python(script)))
    assert 8 * MIB <= ended.usage.io_write_bytes < 64 * MIB
    # Where the file system keeps its pages all the same, nothing is read.
    assert 0 <= ended.usage.io_read_bytes < 64 * MIB


# --- output ---


async def test_output_is_exact(launcher: Launcher) -> None:
    """Both streams, invalid UTF-8, no newline at the end."""
    script = r"printf '\377\376\000x' ; printf 'err\n\200' >&2"
    ended, directory = await run_to_end(launcher, make_spec(*sh(script)))
    assert read_output(directory, "stdout", 0, 100) == (0, b"\xff\xfe\x00x", 4)
    assert read_output(directory, "stderr", 0, 100) == (0, b"err\n\x80", 5)
    assert (ended.stdout_bytes, ended.stderr_bytes, ended.output_dropped_bytes) == (4, 5, 0)


async def test_f29_twenty_megabytes_without_a_newline(launcher: Launcher) -> None:
    """F29: every byte arrives, however the task writes them."""
    script = "import os\nfor n in range(320): os.write(1, bytes([n % 251]) * 65536)"
    ended, directory = await run_to_end(launcher, make_spec(*python(script)))
    assert (ended.stdout_bytes, ended.output_dropped_bytes) == (20 * MIB, 0)
    found = hashlib.sha256()
    offset = 0
    while offset < ended.stdout_bytes:
        first, data, _ = read_output(directory, "stdout", offset, MIB)
        assert first == offset
        found.update(data)
        offset += len(data)
    wanted = hashlib.sha256(b"".join(bytes([n % 251]) * 65536 for n in range(320)))
    assert found.digest() == wanted.digest()


async def test_f29_bound_keeps_first_and_newest(launcher: Launcher) -> None:
    """F29: the files stay within the limit, the offsets stay true, the dropped bytes are counted."""
    script = "import os\nfor n in range(40000): os.write(1, b'%09d\\n' % n)\nos.write(2, b'done')"
    ended, directory = await run_to_end(launcher, make_spec(*python(script), output_limit_bytes=64 * 1024))
    stored = sum(path.stat().st_size for path in directory.iterdir() if path.name.startswith("std"))
    assert stored <= 64 * 1024
    assert ended.stdout_bytes == 400_000
    assert ended.output_dropped_bytes == 400_004 - stored
    assert read_output(directory, "stdout", 0, 20)[1] == b"000000000\n000000001\n"
    first, data, end = read_output(directory, "stdout", -20, 100)
    assert (first, data, end) == (399_980, b"000039998\n000039999\n", 400_000)
    first, data, _ = read_output(directory, "stdout", 200_000, 10)
    assert first > 200_000
    assert data == (b"%09d\n" % (first // 10) * 2)[first % 10 :][:10] or first % 10
    assert read_output(directory, "stderr", 0, 10)[1] == b"done"


async def test_f29_closed_pipes_do_not_end_a_run(launcher: Launcher, tmp_path: Path) -> None:
    """F29: a task may close its output and go on."""
    script = f"exec >&- 2>&-; read line <{tmp_path}/fifo; exit 7"
    os.mkfifo(tmp_path / "fifo")
    run = await launched(launcher, make_spec(*sh(script)))
    (tmp_path / "fifo").write_text("go\n")
    assert (await ended_of(run)).exit_code == 7


async def test_f29_inherited_pipe_does_not_hold_the_run(launcher: Launcher, tmp_path: Path) -> None:
    """F29: what a stranger outside the tree still holds open and writes to is not waited for."""
    # The pipe's other end gets out of the tree by /proc.
    script = f"echo first; echo $$ >{tmp_path}/pid; read line <{tmp_path}/fifo; exit 0"
    os.mkfifo(tmp_path / "fifo")
    run = await launched(launcher, make_spec(*sh(script)))
    main = await pid_from(tmp_path / "pid")
    stranger = os.open(f"/proc/{main.pid}/fd/1", os.O_WRONLY)
    try:
        os.write(stranger, b"second\n")
        (tmp_path / "fifo").write_text("go\n")
        ended = await ended_of(run)
        assert ended.exit_code == 0
        assert read_output(run.directory, "stdout", 0, 100)[1] == b"first\nsecond\n"
    finally:
        os.close(stranger)


async def test_output_written_right_before_the_end_is_whole(launcher: Launcher) -> None:
    """The drain takes what is still in the pipe."""
    runs = [
        await launched(launcher, make_spec(*python("import os; os.write(1, b'x' * 60000); os._exit(0)"), run_no=number))
        for number in range(1, 21)
    ]
    for run in runs:
        assert (await ended_of(run)).stdout_bytes == 60_000


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
async def test_f24_full_disk_drops_output_and_the_task_goes_on(tmp_path: Path) -> None:
    """F24: the task ends as it would have, what did not fit is counted, and the end is on record."""
    small = tmp_path / "small"
    small.mkdir()
    await _call("mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(small))
    try:
        launcher = Launcher(small / "attempts")
        await launcher.start()
        script = "import os\nfor n in range(100): os.write(1, b'x' * 65536)\nos._exit(9)"
        ended, directory = await run_to_end(launcher, make_spec(*python(script)))
        await launcher.stop()
        assert (ended.exit_code, ended.stdout_bytes) == (9, 100 * 65536)
        kept = sum(path.stat().st_size for path in directory.iterdir() if path.name.startswith("std"))
        assert 0 < kept == ended.stdout_bytes - ended.output_dropped_bytes
    finally:
        await _call("umount", str(small))


async def _call(*argv: str) -> None:
    process = await asyncio.create_subprocess_exec(*argv)
    assert await process.wait() == 0, argv


# --- stopping ---


@both_placements
async def test_stop_sends_the_stop_signal_first(launcher: Launcher, tmp_path: Path) -> None:
    """The task may clean up; it is a stop although it then exits with 0."""
    script = f"trap 'echo saved; exit 0' INT; echo up >{tmp_path}/up; while :; do sleep 0.01; done"
    run = await launched(launcher, make_spec(*sh(script), stop_signal=signal.SIGINT))
    await until_file(tmp_path / "up")
    run.stop()
    ended = await ended_of(run)
    assert (ended.ended_by, ended.exit_code) == (EndedBy.STOP, 0)
    assert read_output(run.directory, "stdout", 0, 100)[1] == b"saved\n"


@both_placements
async def test_stop_wakes_a_suspended_task(launcher: Launcher, tmp_path: Path) -> None:
    """A stopped process gets its signal at once, not after the grace period."""
    run = await launched(launcher, make_spec("sleep", "1000", grace_period_s=1000))
    assert run.started is not None
    os.kill(run.started.process.pid, signal.SIGSTOP)
    run.stop()
    assert (await ended_of(run)).signal == signal.SIGTERM


async def test_stop_of_a_scope_reaches_the_task_through_its_shim_only(launcher: Launcher, tmp_path: Path) -> None:
    """Systemd sends SIGWINCH to all of a scope: the task, which ignores it, gets its own stop signal and its grace."""
    script = f"trap 'echo saved; exit 0' INT; echo up >{tmp_path}/up; while :; do sleep 0.01; done"
    run = await launched(launcher, make_spec(*sh(script), stop_signal=signal.SIGINT))
    assert run.started is not None
    await until_file(tmp_path / "up")
    for pid in (run.started.process.pid, run.shim.pid):
        os.kill(pid, signal.SIGWINCH)
    ended = await ended_of(run)
    assert (ended.ended_by, ended.exit_code) == (EndedBy.STOP, 0)
    assert read_output(run.directory, "stdout", 0, 100)[1] == b"saved\n"


@both_placements
async def test_kill_asks_nobody(launcher: Launcher, tmp_path: Path) -> None:
    """No grace period."""
    script = f"trap '' TERM; (trap '' TERM; echo up >{tmp_path}/up; sleep 1000); sleep 1000"
    run = await launched(launcher, make_spec(*sh(script), grace_period_s=1000))
    await until_file(tmp_path / "up")
    run.kill()
    ended = await ended_of(run)
    assert (ended.ended_by, ended.signal) == (EndedBy.STOP, signal.SIGKILL)
    assert ended.stragglers_killed >= 1


@both_placements
async def test_kill_cuts_a_stop_short(launcher: Launcher, tmp_path: Path) -> None:
    """While the grace period runs."""
    run = await launched(
        launcher, make_spec(*sh(f"trap 'echo t >{tmp_path}/t' TERM; while :; do sleep 0.01; done"), grace_period_s=1000)
    )
    await until(lambda: "sleep" in _comms(run), "the trap to be set")
    run.stop()
    await until_file(tmp_path / "t")
    run.kill()
    assert (await ended_of(run)).signal == signal.SIGKILL


def _comms(run: Run) -> set[str]:
    return {
        Path(f"/proc/{stat.pid}/comm").read_text().strip()
        for stat in tree.descendants(run.shim.pid)
        if not is_gone(stat.pid)
    }


@both_placements
async def test_f30_timeout_of_a_task_that_ignores_sigterm(launcher: Launcher) -> None:
    """F30: SIGTERM at the timeout, SIGKILL after the grace period, and the cause is the timeout."""
    script = "trap '' TERM; while :; do sleep 1000; done"
    ended, _ = await run_to_end(launcher, make_spec(*sh(script), timeout_s=0.2, grace_period_s=0.2))
    assert (ended.ended_by, ended.signal) == (EndedBy.TIMEOUT, signal.SIGKILL)
    assert 0.4 <= ended.usage.wall_s < 5


async def test_timeout_that_the_task_obeys(launcher: Launcher) -> None:
    """It is a timeout although the task exits by itself when told."""
    script = "trap 'exit 0' TERM; while :; do sleep 0.01; done"
    ended, _ = await run_to_end(launcher, make_spec(*sh(script), timeout_s=0.2))
    assert (ended.ended_by, ended.exit_code) == (EndedBy.TIMEOUT, 0)


DAEMONS = {
    "setsid": "setsid sleep 1000 & echo $!",
    "nohup": "nohup sleep 1000 >/dev/null 2>&1 & echo $!",
    "double fork": "(setsid sh -c 'sleep 1000 & echo $!; exec sleep 1000' &)",
    "no environment": "(env -i /usr/bin/setsid /bin/sh -c 'echo $$; exec /bin/sleep 1000' &)",
    "deaf": "(trap '' TERM HUP INT; setsid sh -c 'echo $$; while :; do sleep 1000; done' &)",
}


@both_placements
@pytest.mark.parametrize("way", DAEMONS)
@pytest.mark.parametrize("end", ["exit", "stop", "kill", "timeout"])
async def test_f30_descendants_go_with_the_task(launcher: Launcher, tmp_path: Path, way: str, end: str) -> None:
    """F30: however a process has left its parents, it is gone when the run has ended."""
    script = f"{{ {DAEMONS[way]}; }} >{tmp_path}/pid; echo up >{tmp_path}/up; "
    script += f"until [ -s {tmp_path}/pid ]; do :; done; " + ("exit 4" if end == "exit" else "sleep 1000")
    spec = make_spec(*sh(script), grace_period_s=0.3, timeout_s=0.5 if end == "timeout" else None)
    run = await launched(launcher, spec)
    daemon = int((await until_file(tmp_path / "pid")).splitlines()[0])
    if end == "stop":
        run.stop()
    elif end == "kill":
        run.kill()
    ended = await ended_of(run)
    assert is_gone(daemon)
    causes = {"exit": EndedBy.EXIT, "stop": EndedBy.STOP, "kill": EndedBy.STOP, "timeout": EndedBy.TIMEOUT}
    assert ended.ended_by is causes[end]
    if end == "exit":
        assert ended.exit_code == 4
        assert ended.stragglers_killed >= 1


@both_placements
async def test_f30_processes_that_fork_while_dying(launcher: Launcher, tmp_path: Path) -> None:
    """F30: rounds of SIGKILL outrun a family that keeps having children in new sessions."""
    script = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def live(depth):
    os.setsid()
    while True:
        if os.fork() == 0:
            if depth < 1: live(depth + 1)
            time.sleep(1000)
        time.sleep(0.02)
for _ in range(4):
    if os.fork() == 0: live(0)
print("up", flush=True)
time.sleep(1000)
"""
    run = await launched(launcher, make_spec(*python(script), grace_period_s=0.1))
    await until(lambda: len(tree.descendants(run.shim.pid, within_ms=50)) > 40, "a large family")
    run.stop()
    ended = await ended_of(run)
    assert ended.stragglers_killed > 40
    assert not any(_has_variable(stat.pid) for stat in tree.all_processes())


def _has_variable(pid: int) -> bool:
    try:
        return f"REMOTEGPU_ATTEMPT_ID={unique()}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


@both_placements
async def test_leftovers_may_finish_within_their_grace(launcher: Launcher, tmp_path: Path) -> None:
    """What a task leaves behind hears SIGTERM and can tidy up; its output still counts."""
    child = "trap 'echo bye; exit' TERM; echo up; while :; do sleep 0.01; done"
    script = f'sh -c "{child}" & until [ -s {tmp_path}/go ]; do sleep 0.01; done; exit 0'
    run = await launched(launcher, make_spec(*sh(script)))
    await until(lambda: read_output(run.directory, "stdout", 0, 10)[1] == b"up\n", "the child to be up")
    (tmp_path / "go").write_text("go\n")
    ended = await ended_of(run)
    assert read_output(run.directory, "stdout", 0, 100)[1] == b"up\nbye\n"
    assert (ended.ended_by, ended.exit_code) == (EndedBy.EXIT, 0)
    assert 1 <= ended.stragglers_killed <= 2


async def test_whole_grace_period_for_children_of_a_shell_that_dies_first(launcher: Launcher, tmp_path: Path) -> None:
    """The shell of `sh -c 'python train.py'` dies at SIGTERM; the training still saves its checkpoint."""
    child = (
        f"import signal, time\nsignal.signal(15, lambda *a: 0)\nopen({str(tmp_path / 'up')!r}, 'w').write('up\\n')\n"
    )
    child += f"signal.pause()\ntime.sleep(2.5)\nopen({str(tmp_path / 'saved')!r}, 'w').write('yes')"
    program = tmp_path / "train.py"
    program.write_text(child)
    run = await launched(launcher, make_spec(*sh(f"{python('')[0]} -I -S {program}; true")))
    await until_file(tmp_path / "up")
    run.stop()
    ended = await ended_of(run)
    assert (ended.ended_by, ended.signal) == (EndedBy.STOP, signal.SIGTERM)
    assert (tmp_path / "saved").read_text() == "yes"
    assert ended.stragglers_killed == 0


async def test_orphans_are_reaped_while_the_task_runs(launcher: Launcher, tmp_path: Path) -> None:
    """The shim buries what its task abandons; no zombies pile up."""
    os.mkfifo(tmp_path / "fifo")
    script = f"for n in 1 2 3 4 5 6 7 8 9; do (true &); done; echo up >{tmp_path}/up; read line <{tmp_path}/fifo"
    run = await launched(launcher, make_spec(*sh(script)))
    assert run.started is not None
    await until_file(tmp_path / "up")
    await until(
        lambda: tree.children(run.shim.pid) == [run.started.process.pid if run.started else 0], "the orphans' burial"
    )
    (tmp_path / "fifo").write_text("go\n")
    assert (await ended_of(run)).stragglers_killed == 0


@both_placements
async def test_natural_end_before_the_request_is_an_exit(launcher: Launcher, tmp_path: Path) -> None:
    """F31: with the shim frozen, the task ends and then a stop is asked for: what happened first counts."""
    os.mkfifo(tmp_path / "fifo")
    run = await launched(launcher, make_spec(*sh(f"read line <{tmp_path}/fifo; exit 3")))
    assert run.started is not None
    with frozen(run.shim.pid):
        (tmp_path / "fifo").write_text("go\n")
        main = run.started.process
        await until(lambda: not identity.is_alive(main), "the task's end")
        run.stop()
    ended = await ended_of(run)
    assert (ended.ended_by, ended.exit_code) == (EndedBy.EXIT, 3)


async def test_f32_a_stopped_shim_obeys_a_stop(launcher: Launcher) -> None:
    """Whoever has sent it SIGSTOP, a task of the agent's own user too: a stop wakes it, and the tree goes."""
    run = await launched(launcher, make_spec("sleep", "1000"))
    os.kill(run.shim.pid, signal.SIGSTOP)
    run.stop()
    assert (await ended_of(run)).ended_by is EndedBy.STOP


async def test_repeated_stops_and_late_ones_are_harmless(launcher: Launcher) -> None:
    """Any number of requests, before and after the end, and after the run was closed."""
    run = await launched(launcher, make_spec("sleep", "1000"))
    for _ in range(5):
        run.stop()
    assert (await ended_of(run)).ended_by is EndedBy.STOP
    run.stop()
    run.kill()
    run.extend(1)
    run.close()


async def test_membership_of_a_process(launcher: Launcher, tmp_path: Path) -> None:
    """All of a task's tree belongs to it, daemons too; the shim, strangers and init do not."""
    run = await launched(
        launcher, make_spec(*sh(f"(setsid sh -c 'echo $$ >{tmp_path}/pid; exec sleep 1000' &); sleep 1000"))
    )
    assert run.started is not None
    daemon = await pid_from(tmp_path / "pid")
    await until(lambda: identity.stat_of(daemon.pid) is not None and run.contains(daemon.pid), "the daemon's adoption")
    assert run.contains(run.started.process.pid)
    for stranger in (run.shim.pid, os.getpid(), 1, 0, -1, launcher.spawner_pid or 0):
        assert not run.contains(stranger)
    run.kill()
    await ended_of(run)
    assert not run.contains(daemon.pid)
