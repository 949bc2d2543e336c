"""The lease's deadline holds without the agent: dead, frozen, or late."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from remotegpu_schemas.attempt import EndedBy, RunEnded
from remotegpu_sidecar import record
from remotegpu_sidecar.identity import boottime_ns
from remotegpu_sidecar.launcher import AdoptedState, Launcher
from tests.sidecar.support import AgentProcess, identity_of, launched, make_spec, sh, until_file, wait_until_dead

S = 1_000_000_000
DEAF = "trap '' TERM; while :; do sleep 1000; done"


def ended_on_record(directory: Path) -> RunEnded:
    """What the shim has written, without an agent."""
    return RunEnded.model_validate(record.read(directory / "record")[0]["ended"])


async def test_lease_stops_before_and_kills_at_the_deadline(launcher: Launcher) -> None:
    """The stop signal comes a lease grace early; a deaf task is dead at the deadline."""
    deadline_ns = boottime_ns() + S
    run = await launched(launcher, make_spec(*sh(DEAF), lease_grace_s=0.5), deadline_ns)
    ended = (await run.wait()).ended
    run.close()
    assert ended is not None
    assert (ended.ended_by, ended.signal) == (EndedBy.LEASE, signal.SIGKILL)
    assert 0 <= boottime_ns() - deadline_ns < S


async def test_task_that_obeys_ends_before_the_deadline(launcher: Launcher) -> None:
    """It is the lease that ended it, whatever code it exits with."""
    deadline_ns = boottime_ns() + 60 * S
    script = "trap 'exit 0' TERM; while :; do sleep 0.01; done"
    run = await launched(launcher, make_spec(*sh(script), lease_grace_s=59.7), deadline_ns)
    ended = (await run.wait()).ended
    run.close()
    assert ended is not None
    assert (ended.ended_by, ended.exit_code) == (EndedBy.LEASE, 0)


def test_f10_agent_dead_past_the_lease(attempts_dir: Path) -> None:
    """F10: nobody is there to renew: the task's whole tree is dead at the deadline."""
    deadline_ns = boottime_ns() + 2 * S
    with AgentProcess(attempts_dir, (make_spec(*sh(DEAF), lease_grace_s=0.2), deadline_ns)) as agent:
        task = identity_of(agent.task_pids[0])
        agent.kill()
        wait_until_dead(task)
        assert boottime_ns() >= deadline_ns
        assert boottime_ns() < deadline_ns + S


async def test_f10_agent_frozen_past_the_lease(attempts_dir: Path) -> None:
    """F10: the shim kills at the deadline, and the record says that it was the lease."""
    deadline_ns = boottime_ns() + 2 * S
    with AgentProcess(attempts_dir, (make_spec(*sh(DEAF), lease_grace_s=0.2), deadline_ns)) as agent:
        agent.signal(signal.SIGSTOP)
        wait_until_dead(identity_of(agent.task_pids[0]))
        assert boottime_ns() < deadline_ns + S
        (path,) = attempts_dir.iterdir()
        [adopted] = await Launcher(attempts_dir).adopt()
        if adopted.run is not None:  # it is just writing its end
            await adopted.run.wait()
            adopted.run.close()
        assert ended_on_record(path).ended_by is EndedBy.LEASE


async def test_f10_spawner_frozen_as_well(attempts_dir: Path) -> None:
    """F10: the shim needs neither of them."""
    deadline_ns = boottime_ns() + 2 * S
    with AgentProcess(attempts_dir, (make_spec(*sh(DEAF)), deadline_ns)) as agent:
        import os

        agent.signal(signal.SIGSTOP)
        os.kill(agent.spawner.pid, signal.SIGSTOP)
        wait_until_dead(identity_of(agent.task_pids[0]))
        os.kill(agent.spawner.pid, signal.SIGCONT)


async def test_renewal_in_time_keeps_the_task_alive(launcher: Launcher, tmp_path: Path) -> None:
    """The shim finds the new deadline when the old one strikes."""
    run = await launched(launcher, make_spec(*sh("sleep 2.5; exit 8"), lease_grace_s=0.2), boottime_ns() + 2 * S)
    started = time.monotonic()
    run.extend(boottime_ns() + 60 * S)
    ended = (await run.wait()).ended
    run.close()
    assert ended is not None
    assert (ended.ended_by, ended.exit_code) == (EndedBy.EXIT, 8)
    assert time.monotonic() - started >= 2.0


async def test_deadline_may_move_earlier(launcher: Launcher) -> None:
    """The agent says so by SIGHUP; the timer does not sleep on."""
    run = await launched(launcher, make_spec("sleep", "1000"), boottime_ns() + 1000 * S)
    run.extend(boottime_ns() + S // 5)
    ended = (await run.wait()).ended
    run.close()
    assert ended is not None
    assert (ended.ended_by, ended.signal) == (EndedBy.LEASE, signal.SIGTERM) or ended.signal == signal.SIGKILL
    assert ended.usage.wall_s < 20


async def test_run_without_a_lease_may_get_one(launcher: Launcher) -> None:
    """A deadline that was absent appears."""
    run = await launched(launcher, make_spec("sleep", "1000"))
    run.extend(boottime_ns() + S // 5)
    record_ = await run.wait()
    run.close()
    assert record_.ended is not None
    assert record_.ended.ended_by is EndedBy.LEASE


async def test_damaged_deadline_never_prolongs(launcher: Launcher) -> None:
    """A file that cannot be read leaves the last known deadline in force."""
    run = await launched(launcher, make_spec("sleep", "1000"), boottime_ns() + S // 2)
    (run.directory / "deadline").write_bytes(b"abc")
    record_ = await run.wait()
    run.close()
    assert record_.ended is not None
    assert record_.ended.ended_by is EndedBy.LEASE


async def test_f52_a_pipe_in_the_deadlines_place_holds_up_nobody(launcher: Launcher, attempts_dir: Path) -> None:
    """F52: put there by a task of the agent's own user: shim, agent and the next agent go on."""
    run = await launched(launcher, make_spec("sleep", "100"))
    os.mkfifo(run.directory / "deadline")
    with pytest.raises(OSError, match="No such device"):
        run.extend(boottime_ns() + 3600 * 10**9)
    os.kill(run.shim.pid, signal.SIGHUP)
    [adopted] = await Launcher(attempts_dir).adopt()
    assert adopted.run is not None
    adopted.run.close()
    run.kill()
    record = await run.wait()
    assert record.ended is not None
    run.close()


async def test_adopted_run_keeps_its_lease_and_takes_renewals(attempts_dir: Path, tmp_path: Path) -> None:
    """A new agent moves the deadline of a run that an old one started."""
    spec = make_spec(*sh(f"echo up >{tmp_path}/up; sleep 2.5; exit 5"), lease_grace_s=0.1)
    with AgentProcess(attempts_dir, (spec, boottime_ns() + 2 * S)) as agent:
        agent.kill()
    [adopted] = await Launcher(attempts_dir).adopt()
    assert adopted.state is AdoptedState.RUNNING
    assert adopted.run is not None
    adopted.run.extend(boottime_ns() + 60 * S)
    await until_file(tmp_path / "up")
    ended = (await adopted.run.wait()).ended
    adopted.run.close()
    assert ended is not None
    assert (ended.ended_by, ended.exit_code) == (EndedBy.EXIT, 5)


async def test_f20_every_clock_of_a_shim_goes_on_while_the_host_sleeps(launcher: Launcher) -> None:
    """F20: its one timer is on CLOCK_BOOTTIME (7), which a suspend does not stop and no wall clock moves."""
    run = await launched(launcher, make_spec("sleep", "1000", timeout_s=500), boottime_ns() + 1000 * S)
    fds = Path(f"/proc/{run.shim.pid}/fd")
    timers = [fd.name for fd in fds.iterdir() if fd.is_symlink() and "timerfd" in str(fd.readlink())]
    assert len(timers) == 1
    info = Path(f"/proc/{run.shim.pid}/fdinfo/{timers[0]}").read_text()
    assert "clockid: 7\n" in info
    left_s = int(info.split("it_value: (")[1].split(",")[0])
    assert 400 < left_s <= 500
    run.kill()
    await run.wait()
    run.close()
