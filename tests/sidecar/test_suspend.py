"""A suspended run: its whole tree stands still, its timeout too, its lease does not; it survives the agent so."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from remotegpu_schemas.attempt import EndedBy
from remotegpu_sidecar import identity, record, tree
from remotegpu_sidecar.identity import boottime_ns
from remotegpu_sidecar.launcher import AdoptedState, Launcher, Run
from remotegpu_sidecar.output import read_output
from tests.sidecar.support import (
    AgentProcess,
    both_placements,
    launched,
    make_spec,
    pid_from,
    python,
    sh,
    until,
    until_file,
)
from tests.sidecar.test_shim import ended_of

S = 1_000_000_000
FAMILY = "(setsid sh -c 'while :; do sleep 0.01; done' &); sh -c 'while :; do :; done' & "


def states(run: Run) -> set[str]:
    """The states of all processes of a run's tree (proc(5))."""
    return {stat.state for stat in tree.descendants(run.shim.pid)}


def lines(run: Run) -> dict[str, dict[str, object]]:
    """What stands in its record."""
    return record.read(run.directory / "record")[0]


async def _is_on_record(run: Run) -> None:
    await until(lambda: "suspended" in lines(run), "the suspension on record")


async def stands_still(run: Run) -> None:
    """Ask for it, and wait until the shim has proven it."""
    run.suspend()
    await _is_on_record(run)
    # A shell that has called vfork for a child that has stopped before its exec waits in the kernel (D).
    assert states(run) <= {"T", "D"}
    assert "T" in states(run)


async def test_whole_tree_stands_still_and_goes_on(launcher: Launcher, tmp_path: Path) -> None:
    """Children, daemons in sessions of their own, busy loops: all stopped, then all running, and a right end."""
    script = f"{FAMILY} echo $$ >{tmp_path}/up; until [ -e {tmp_path}/go ]; do sleep 0.01; done; exit 4"
    run = await launched(launcher, make_spec(*sh(script)))
    await until_file(tmp_path / "up")
    await stands_still(run)
    assert run.is_to_be_suspended
    (tmp_path / "go").touch()
    run.resume()
    ended = await ended_of(run)
    assert (ended.ended_by, ended.exit_code) == (EndedBy.EXIT, 4)
    suspended, resumed = (lines(run)[kind]["boottime_ns"] for kind in ("suspended", "resumed"))
    assert isinstance(suspended, int)
    assert isinstance(resumed, int)
    assert suspended < resumed


def _ticks_of(run: Run) -> list[str]:
    """The processor time of each process of the tree (fields 14 and 15 of its stat)."""
    stats = []
    for stat in tree.descendants(run.shim.pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
            stats.append(Path(f"/proc/{stat.pid}/stat").read_text())
    return [" ".join(stat.rpartition(")")[2].split()[11:13]) for stat in stats]


@both_placements
async def test_busy_loops_use_no_processor_while_suspended(launcher: Launcher, tmp_path: Path) -> None:
    """By control group or by signals: once the suspension is on record nothing runs, until it is resumed."""
    run = await launched(launcher, make_spec(*sh(f"{FAMILY} echo up >{tmp_path}/up; while :; do :; done")))
    await until_file(tmp_path / "up")
    run.suspend()
    await _is_on_record(run)
    before, again_ns = _ticks_of(run), boottime_ns() + S // 2
    await until(lambda: boottime_ns() > again_ns, "some time to pass")
    assert _ticks_of(run) == before
    run.resume()
    await until(lambda: _ticks_of(run) != before, "the loops to go on")
    run.suspend()
    run.stop()
    assert (await ended_of(run)).signal == signal.SIGTERM


@both_placements
async def test_whom_the_task_had_stopped_itself_stays_so(launcher: Launcher, tmp_path: Path) -> None:
    """A process that the task holds with SIGSTOP is not woken by a resume; the others go on."""
    script = f"sleep 1000 & echo $! >{tmp_path}/held; kill -STOP $!; echo up >{tmp_path}/up; while :; do :; done & wait"
    run = await launched(launcher, make_spec(*sh(script)))
    await until_file(tmp_path / "up")
    held = int((tmp_path / "held").read_text())
    await until(lambda: state_of(held) == "T", "the task's own stop")
    run.suspend()
    await _is_on_record(run)
    before = _ticks_of(run)
    run.resume()
    await until(lambda: _ticks_of(run) != before, "the others to go on")
    await until(lambda: "resumed" in lines(run), "the resumption to be on record")
    assert state_of(held) == "T"
    run.kill()
    await ended_of(run)


def state_of(pid: int) -> str:
    """One letter, as in proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@both_placements
async def test_suspended_and_stopped_at_any_moment(launcher: Launcher, tmp_path: Path) -> None:
    """A stop right behind a suspension, proven or not, ends the run as a stop; nothing waits for the grace period."""
    for number in range(1, 11):
        run = await launched(launcher, make_spec(*sh(f"{FAMILY} sleep 1000"), run_no=number, grace_period_s=1000))
        run.suspend()
        if number % 2:
            await _is_on_record(run)
        run.stop()
        assert (await ended_of(run)).ended_by is EndedBy.STOP


async def test_family_that_forks_all_the_time_is_stopped(launcher: Launcher, tmp_path: Path) -> None:
    """Whoever is born while the others are stopped is found by the next look."""
    script = f"""
import os, time
open({str(tmp_path / "up")!r}, "w").write("up\\n")
for n in range(6):
    if os.fork() == 0:
        os.setsid()
        while True:
            if os.fork() == 0:
                os.setsid()
                time.sleep(0.005)
                os._exit(0)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]: pass
            except ChildProcessError:
                pass
            time.sleep(0.001)
time.sleep(1000)
"""
    run = await launched(launcher, make_spec(*python(script)))
    await until_file(tmp_path / "up")
    await until(lambda: len(tree.descendants(run.shim.pid)) > 6, "the family to grow")
    await stands_still(run)
    before = {stat.pid for stat in tree.descendants(run.shim.pid)}
    assert {stat.pid for stat in tree.descendants(run.shim.pid)} == before
    run.resume()
    await until(lambda: {stat.pid for stat in tree.descendants(run.shim.pid)} != before, "the family to go on")
    run.kill()
    await ended_of(run)


async def test_timeout_stands_still_with_the_task(launcher: Launcher) -> None:
    """A run that was suspended for longer than its timeout has its time left when it goes on."""
    run = await launched(launcher, make_spec("sleep", "1000", timeout_s=1.0))
    await stands_still(run)
    begun_ns = boottime_ns()
    await until(lambda: boottime_ns() > begun_ns + 3 * S // 2, "the timeout's time to pass")
    assert states(run) == {"T"}
    run.resume()
    resumed_ns = boottime_ns()
    ended = await ended_of(run)
    assert (ended.ended_by, ended.signal) == (EndedBy.TIMEOUT, signal.SIGTERM)
    assert boottime_ns() - resumed_ns > S // 4


async def test_lease_goes_on_and_ends_a_suspended_task(launcher: Launcher, tmp_path: Path) -> None:
    """It hears its stop signal, because it is woken for it, and is gone by the deadline."""
    script = f"trap 'echo saved; exit 0' TERM; echo up >{tmp_path}/up; while :; do sleep 0.01; done"
    deadline_ns = boottime_ns() + 2 * S
    run = await launched(launcher, make_spec(*sh(script), lease_grace_s=1), deadline_ns)
    await until_file(tmp_path / "up")
    await stands_still(run)
    ended = await ended_of(run)
    assert (ended.ended_by, ended.exit_code) == (EndedBy.LEASE, 0)
    assert read_output(run.directory, "stdout", 0, 100)[1] == b"saved\n"
    assert boottime_ns() < deadline_ns


async def test_stop_of_a_suspended_run_lets_it_tidy_up(launcher: Launcher, tmp_path: Path) -> None:
    """The stop signal first, then SIGCONT: the handler runs, and no grace period is waited for."""
    script = f"trap 'echo saved; exit 3' TERM; echo up >{tmp_path}/up; while :; do sleep 0.01; done"
    run = await launched(launcher, make_spec(*sh(script), grace_period_s=1000))
    await until_file(tmp_path / "up")
    await stands_still(run)
    run.stop()
    ended = await ended_of(run)
    assert (ended.ended_by, ended.exit_code) == (EndedBy.STOP, 3)
    assert read_output(run.directory, "stdout", 0, 100)[1] == b"saved\n"


async def test_kill_of_a_suspended_run(launcher: Launcher) -> None:
    """SIGKILL needs nobody's cooperation."""
    run = await launched(launcher, make_spec(*sh(f"{FAMILY} sleep 1000")))
    await stands_still(run)
    run.kill()
    ended = await ended_of(run)
    assert (ended.ended_by, ended.signal) == (EndedBy.STOP, signal.SIGKILL)


async def test_suspending_what_is_being_stopped_does_not_hold_it_up(launcher: Launcher, tmp_path: Path) -> None:
    """An end under way goes on."""
    script = f"trap 'touch {tmp_path}/told' TERM; until [ -e {tmp_path}/go ]; do sleep 0.01; done; exit 6"
    run = await launched(launcher, make_spec(*sh(script), grace_period_s=1000))
    assert run.started is not None
    await until(lambda: identity.hears(run.started.process.pid if run.started else 0, signal.SIGTERM), "the trap")
    run.stop()
    await until((tmp_path / "told").exists, "the stop signal")
    run.suspend()
    (tmp_path / "go").touch()
    ended = await ended_of(run)
    assert (ended.ended_by, ended.exit_code) == (EndedBy.STOP, 6)
    assert "suspended" not in lines(run)


async def test_suspended_and_resumed_at_once_any_number_of_times(launcher: Launcher) -> None:
    """What counts is what was asked for last, however the signals fall together."""
    run = await launched(launcher, make_spec("sleep", "1000"))
    for _ in range(200):
        run.suspend()
        run.resume()
    await until(lambda: states(run) == {"S"}, "the task to run")
    for _ in range(200):
        run.resume()
        run.suspend()
    await until(lambda: states(run) == {"T"}, "the task to stand still")
    assert (run.directory / "record").stat().st_size < 64 * 1024
    run.kill()
    await ended_of(run)


async def test_suspended_run_is_adopted_as_it_is(attempts_dir: Path, tmp_path: Path) -> None:
    """A killed agent changes nothing; the next one finds it suspended, and lets it go on."""
    spec = make_spec(*sh(f"{FAMILY} until [ -e {tmp_path}/go ]; do sleep 0.01; done; exit 5"))
    with AgentProcess(attempts_dir, (spec, None)) as agent:
        again = Launcher(attempts_dir)
        [here] = await again.adopt()
        assert here.run is not None
        await stands_still(here.run)
        here.run.close()
        agent.kill()
    [adopted] = await Launcher(attempts_dir).adopt()
    assert adopted.state is AdoptedState.RUNNING
    assert adopted.run is not None
    assert adopted.run.is_to_be_suspended
    assert states(adopted.run) <= {"T", "D"}
    (tmp_path / "go").touch()
    adopted.run.resume()
    ended = await ended_of(adopted.run)
    assert (ended.ended_by, ended.exit_code) == (EndedBy.EXIT, 5)


async def test_shim_frozen_and_thawed_does_not_wake_its_task(launcher: Launcher) -> None:
    """An operator who stops and continues the shim itself has asked for nothing."""
    run = await launched(launcher, make_spec("sleep", "1000"))
    await stands_still(run)
    os.kill(run.shim.pid, signal.SIGSTOP)
    os.kill(run.shim.pid, signal.SIGCONT)
    run.extend(boottime_ns() + 1000 * S)
    await until(lambda: identity.stat_of(run.shim.pid) is not None, "the shim")
    assert states(run) == {"T"}
    run.kill()
    await ended_of(run)


async def test_suspended_main_process_that_somebody_kills(launcher: Launcher, tmp_path: Path) -> None:
    """Its end is seen, and what it leaves behind is woken and told to go."""
    run = await launched(
        launcher, make_spec(*sh(f"(setsid sh -c 'echo $$ >{tmp_path}/pid; sleep 1000' &); sleep 1000"))
    )
    assert run.started is not None
    daemon = await pid_from(tmp_path / "pid")
    await stands_still(run)
    started_s = time.monotonic()
    os.kill(run.started.process.pid, signal.SIGKILL)
    ended = await ended_of(run)
    assert (ended.ended_by, ended.signal) == (EndedBy.EXIT, signal.SIGKILL)
    assert not identity.is_alive(daemon)
    assert time.monotonic() - started_s < 10
