"""F29: a flood of output: bounded files, true offsets, flat memory; 2 GB and the speed are figures of `make bench`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

from remotegpu_schemas.attempt import EndedBy
from remotegpu_sidecar.launcher import Launcher
from remotegpu_sidecar.output import read_output
from tests.scale import scaled
from tests.sidecar.support import launched, make_spec, python, sh, until
from tests.sidecar.test_shim import ended_of

MIB = 1 << 20
LIMIT = 16 * MIB
# No newline, no valid UTF-8; its length divides nothing of ours, so that a lost or doubled byte shifts all that follow.
PATTERN = bytes(range(128, 253)) + b"\xff\xfe"
_FLOOD = """
import os, sys
os.write(1, b"x")
open(sys.argv[1]).read()
part = (bytes(range(128, 253)) + b"\\xff\\xfe") * 1000
os.close(2)
for _ in range(int(sys.argv[2])):
    done = 0
    while done < len(part):
        done += os.write(1, part[done:])
open(sys.argv[3]).read()
"""


def own_memory(pid: int) -> int:
    """Bytes of memory that are nobody else's."""
    return int(psutil.Process(pid).memory_full_info().uss)


@pytest.mark.timeout(scaled(120, 900))
async def test_f29_flood_without_newlines(launcher: Launcher, tmp_path: Path) -> None:
    """F29: 200 MB of what is no text: files within the bound, each kept byte at its true place, no memory gained."""
    parts = scaled(200, 10_000) * 1_000_000 // (1000 * len(PATTERN))
    first, last = tmp_path / "first", tmp_path / "last"
    for gate in (first, last):
        os.mkfifo(gate)
    spec = make_spec(*python(_FLOOD), str(first), str(parts), str(last), output_limit_bytes=LIMIT)
    run = await launched(launcher, spec)
    await until(lambda: read_output(run.directory, "stdout", 0, 1)[1] == b"x", "the first byte")
    before = own_memory(run.shim.pid), own_memory(os.getpid())
    first.write_text("go")
    # Whoever opens it for writing waits for its reader: until the task has written all.
    gate_fd = await asyncio.to_thread(os.open, last, os.O_WRONLY)
    grown = own_memory(run.shim.pid) - before[0], own_memory(os.getpid()) - before[1]
    assert max(grown) < 2 * MIB
    os.close(gate_fd)
    ended = await ended_of(run)
    total = 1 + parts * 1000 * len(PATTERN)
    assert (ended.ended_by, ended.exit_code, ended.stdout_bytes) == (EndedBy.EXIT, 0, total)
    stored = sum(path.stat().st_size for path in run.directory.iterdir() if path.name.startswith("std"))
    assert stored <= LIMIT
    assert ended.output_dropped_bytes == total - stored
    offset = kept = 0
    while offset < total:
        offset, data, _ = read_output(run.directory, "stdout", offset, MIB)
        skip = (offset - 1) % len(PATTERN) if offset else 0
        body = data if offset else data[1:]
        assert body == (PATTERN * (len(body) // len(PATTERN) + 2))[skip : skip + len(body)]
        offset, kept = offset + len(data), kept + len(data)
    assert kept == stored


async def test_f29_flood_from_a_child_that_outlives_its_parent(launcher: Launcher) -> None:
    """F29: an inherited pipe that is written to without end does not hold the run open."""
    run = await launched(launcher, make_spec(*sh("yes & exit 3"), output_limit_bytes=LIMIT))
    ended = await ended_of(run)
    assert (ended.ended_by, ended.exit_code) == (EndedBy.EXIT, 3)
    assert ended.usage.wall_s < 15


async def test_f29_flood_is_stopped_at_once(launcher: Launcher) -> None:
    """F29: a stop is heard in the middle of it."""
    run = await launched(launcher, make_spec("yes", output_limit_bytes=LIMIT))
    await until(lambda: read_output(run.directory, "stdout", -1, 1)[2] > LIMIT, "a flood")
    run.stop()
    ended = await ended_of(run)
    assert ended.ended_by is EndedBy.STOP
