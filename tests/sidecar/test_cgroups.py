"""A run's control group: real ones where this machine has them (kill, freeze), files as the kernel writes them else."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from remotegpu_sidecar import cgroups, grouping
from tests.sidecar.support import DEADLINE_S, HAS_GROUPS, unique, until, wait_until_removed

needs_groups = pytest.mark.skipif(not HAS_GROUPS, reason="no writable cgroup v2 here; test_placement.py says so")


@pytest.fixture
def group() -> Iterator[str]:
    """A run's group with its leaves, this process being in none of them."""
    found = grouping.find()
    assert not isinstance(found, str)
    path = found.group_of(f"{unique('cgroups')}.1")
    os.makedirs(path)
    os.mkdir(f"{path}/{cgroups.TASK}")
    yield path
    cgroups.kill(path)
    wait_until_removed(path)


def start_in(leaf: str, script: str) -> subprocess.Popen[bytes]:
    """A process that joins a leaf before it becomes a shell."""
    program = f"import os; from remotegpu_sidecar import cgroups; cgroups.join({leaf!r}); "
    program += f"os.execvp('sh', ['sh', '-c', {script!r}])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE)


def wait_for_change(group: cgroups.TaskGroup) -> None:
    """Wait for the kernel to say that something about the group has changed."""
    poll = select.poll()
    poll.register(group.events_fd, select.POLLPRI)
    assert poll.poll(DEADLINE_S * 1000), "no change was told"


@needs_groups
def test_kill_reaches_a_family_that_forks_all_the_time(group: str) -> None:
    """One write ends them all, and the group says when it is empty."""
    script = "f() { while :; do setsid sleep 1000 & sleep 0.02; done; }; f & f & f & echo up; sleep 1000"
    task = cgroups.TaskGroup(group)
    process = start_in(task.path, script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    assert task.is_populated()
    assert process.pid in cgroups.pids(group)
    assert task.kill()
    process.wait()
    while task.is_populated():
        wait_for_change(task)
    assert cgroups.pids(group) == []
    process.stdout.close()
    os.close(task.events_fd)


@needs_groups
async def test_frozen_group_stands_still_until_it_is_thawed(group: str) -> None:
    """Nobody in it moves, whoever forks meanwhile; SIGKILL reaches the frozen."""
    task = cgroups.TaskGroup(group)
    process = start_in(task.path, "n=0; while :; do n=$((n + 1)); echo $n; done")
    assert process.stdout is not None
    assert process.stdout.readline() == b"1\n"
    task.freeze()
    await until(task.is_frozen, "the group to be frozen")
    before = cgroups.cpu_s(task.path)
    os.set_blocking(process.stdout.fileno(), False)
    while process.stdout.read(65536):  # whatever is in the pipe
        pass
    assert cgroups.cpu_s(task.path) == before
    task.thaw()
    assert not task.is_frozen()
    os.set_blocking(process.stdout.fileno(), True)
    assert process.stdout.readline()
    task.freeze()
    await until(task.is_frozen, "the group to be frozen again")
    task.kill()
    process.wait()
    process.stdout.close()
    os.close(task.events_fd)


@needs_groups
def test_groups_are_removed_from_the_bottom_and_only_empty_ones(group: str) -> None:
    """A task's own groups go with it; one with a process in it stays, with those above."""
    os.makedirs(f"{group}/{cgroups.TASK}/of-the-task/deeper")
    os.mkdir(f"{group}/other")
    process = start_in(f"{group}/other", "echo up; exec sleep 1000")
    assert process.stdout is not None
    process.stdout.readline()
    assert not cgroups.remove(group)
    assert os.path.exists(f"{group}/other")
    assert not os.path.exists(f"{group}/{cgroups.TASK}")
    process.kill()
    process.wait()
    process.stdout.close()
    assert cgroups.remove(group)
    assert cgroups.remove(group)


@needs_groups
def test_removed_group_is_empty(group: str) -> None:
    """A look at it after its end is no error."""
    task = cgroups.TaskGroup(group)
    assert cgroups.remove(task.path)
    assert not task.is_populated()
    assert not task.kill()
    assert cgroups.cpu_s(task.path) is None
    os.close(task.events_fd)


def test_what_the_controllers_count(tmp_path: Path) -> None:
    """The numbers are found in the files as cgroup-v2.rst shows them; without a controller there are none."""
    group = str(tmp_path)
    assert cgroups.oom_kills(group) == 0
    assert cgroups.memory_peak_bytes(group) is None
    assert cgroups.io_bytes(group) is None
    assert cgroups.cpu_s(group) is None
    (tmp_path / "memory.events").write_text("low 0\nhigh 0\nmax 41\noom 2\noom_kill 3\noom_group_kill 0\n")
    (tmp_path / "memory.peak").write_text("67108864\n")
    (tmp_path / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\nsystem_usec 2\n")
    (tmp_path / "io.stat").write_text(
        "8:0 rbytes=4096 wbytes=100 rios=1 wios=1 dbytes=7 dios=0\n259:1 rbytes=4 wbytes=20\n"
    )
    assert cgroups.oom_kills(group) == 3
    assert cgroups.memory_peak_bytes(group) == 64 << 20
    assert cgroups.cpu_s(group) == 1.5
    assert cgroups.io_bytes(group) == (4100, 120)


def test_refused_write_names_file_and_value(tmp_path: Path) -> None:
    """An operator reads which limit the kernel did not take."""
    with pytest.raises(FileNotFoundError, match="no-such"):
        cgroups.write(f"{tmp_path}/no-such/memory.max", "1")
    with pytest.raises(OSError, match="writing 'x'") as caught:
        cgroups.write("/proc/self/oom_score_adj", "x")
    assert caught.value.filename == "/proc/self/oom_score_adj"
