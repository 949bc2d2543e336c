"""Processes are told apart by boot id, pid and start time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from remotegpu_sidecar import identity
from remotegpu_sidecar.identity import Identity, Stat
from tests.sidecar.support import until


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process of our own that does nothing."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def test_start_time_is_found_behind_a_name_full_of_brackets(tmp_path: Path) -> None:
    """A program may be called anything: what stands behind the last bracket counts."""
    program = tmp_path / "a) S 1 (b"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "1000"]) as process:
        try:
            found = identity.stat_of(process.pid)
            assert found is not None
            assert found.ppid == os.getpid()
            assert found.start_ticks >= identity.identify(os.getpid()).start_ticks
        finally:
            process.kill()


async def test_zombie_is_dead(sleeper: subprocess.Popen[bytes]) -> None:
    """A process that has ended and was not reaped is not alive."""
    who = identity.identify(sleeper.pid)
    assert identity.is_alive(who)
    sleeper.kill()
    await until(lambda: not identity.is_alive(who))
    stat = identity.stat_of(sleeper.pid)
    assert stat is not None
    assert stat.state == "Z"


def test_leader_whose_threads_go_on_is_alive() -> None:
    """A zombie with living threads has not ended."""
    fields = ["Z"] + ["1"] * 16 + ["3", "0", "77"]
    assert not Stat(5, f"5 (x) {' '.join(fields)}".encode()).is_dead


@pytest.mark.parametrize("change", [{"start_ticks": 1}, {"boot_id": "another"}])
def test_f22_a_pid_given_out_again_is_another_process(sleeper: subprocess.Popen[bytes], change: dict[str, str]) -> None:
    """F22: with another start time or boot id the same pid is a stranger, for whom there is no descriptor."""
    mine = identity.identify(sleeper.pid)
    stranger = Identity(**({"boot_id": mine.boot_id, "pid": mine.pid, "start_ticks": mine.start_ticks} | change))  # type: ignore[arg-type]  # a table of changes
    assert not identity.is_alive(stranger)
    with pytest.raises(ProcessLookupError):
        identity.open_pidfd(stranger)


def test_f22_a_stranger_is_not_signalled(sleeper: subprocess.Popen[bytes]) -> None:
    """F22: a signal meant for an earlier owner of the pid does not reach the present one."""
    mine = identity.identify(sleeper.pid)
    assert not identity.send_signal(mine.pid, mine.start_ticks - 1, signal.SIGKILL)
    assert identity.is_alive(mine)
    assert identity.send_signal(mine.pid, mine.start_ticks, signal.SIGKILL)
    assert sleeper.wait(10) == -signal.SIGKILL


def test_no_such_process() -> None:
    """Nobody is never alive."""
    with subprocess.Popen(["true"]) as process:
        pass
    assert identity.stat_of(process.pid) is None
    with pytest.raises(ProcessLookupError):
        identity.identify(process.pid)
    assert not identity.send_signal(process.pid, 1, signal.SIGTERM)
