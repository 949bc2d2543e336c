"""F27: no descriptors, no processes, no memory left for spawner, shim or task: a launch fails with its errno."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from remotegpu_schemas.attempt import EndedBy
from remotegpu_sidecar import identity
from remotegpu_sidecar.launcher import Launcher, LaunchError
from tests.sidecar.support import launched, make_spec
from tests.sidecar.test_shim import run_to_end


@contextmanager
def scarce(pid: int, what: int, amount: int) -> Generator[None]:
    """Only so much of it for a process, and for those that it forks meanwhile."""
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (amount, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, what, before)


async def ready(launcher: Launcher) -> int:
    """The pid of the spawner, which has started by now."""
    await run_to_end(launcher, make_spec("true", run_no=999))
    assert launcher.spawner_pid is not None
    return launcher.spawner_pid


async def error_of(launcher: Launcher, run_no: int) -> int | None:
    """The errno of a launch that must fail: before the hello, or on record."""
    try:
        run = await launched(launcher, make_spec("true", run_no=run_no))
    except LaunchError as error:
        return error.errno
    record = await run.wait()
    run.close()
    assert record.ended is not None
    assert record.ended.ended_by is EndedBy.LAUNCH, record.ended
    assert record.started is None
    return record.ended.errno


async def test_f27_every_number_of_descriptors(launcher: Launcher) -> None:
    """F27: with none, few, then more descriptors to spare each launch fails and says why, until there are enough."""
    pid = await ready(launcher)
    found: list[int | None] = []
    for number in range(3, 25):
        with scarce(pid, resource.RLIMIT_NOFILE, number):
            try:
                ended, _ = await run_to_end(launcher, make_spec("true", run_no=number))
                found.append(ended.errno if ended.ended_by is EndedBy.LAUNCH else 0)
            except LaunchError as error:
                found.append(error.errno)
    enough = found.index(0)
    assert enough > 1
    assert set(found[:enough]) == {errno.EMFILE}
    assert set(found[enough:]) == {0}
    assert launcher.spawner_pid == pid


async def test_f27_no_memory(launcher: Launcher) -> None:
    """F27: a shim that gets no memory says so; the next launch, with memory, works in the same spawner."""
    pid = await ready(launcher)
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    with scarce(pid, resource.RLIMIT_AS, pages * resource.getpagesize()):
        with pytest.raises(LaunchError, match=r"memory|Memory") as caught:
            await launched(launcher, make_spec("true", *["x" * 100_000] * 100, run_no=1))
        assert caught.value.errno == errno.ENOMEM
    ended, _ = await run_to_end(launcher, make_spec("true", run_no=2))
    assert (ended.exit_code, launcher.spawner_pid) == (0, pid)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a spawner as another user")
async def test_f27_no_processes(attempts_dir: Path, tmp_path: Path) -> None:
    """F27: where the user may have no more processes, fork gives EAGAIN; the spawner lives on."""
    # The limit does not bind root (setrlimit(2)), so this spawner is another user's, and may have itself only.
    wrapper = tmp_path / "python"
    limits = "prlimit --nproc=1 setpriv --reuid=65533 --regid=65533 --clear-groups"
    wrapper.write_text(f'#!/bin/sh\nexec {limits} /usr/bin/python3 "$@"\n')
    wrapper.chmod(0o755)
    launcher = Launcher(attempts_dir, python=str(wrapper))
    try:
        await launcher.start()
        for run_no in (1, 2):
            assert await error_of(launcher, run_no) == errno.EAGAIN
        assert launcher.spawner_pid is not None
        assert identity.stat_of(launcher.spawner_pid) is not None
    finally:
        await launcher.stop()
