"""A launcher on a directory of its own; what a test leaves running is killed after it.

`@both_placements` runs a test with and without control groups, where this machine has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from remotegpu_schemas.attempt import PlacementKind
from remotegpu_sidecar import cgroups, identity, remains
from remotegpu_sidecar.adoption import survey
from remotegpu_sidecar.launcher import Launcher
from remotegpu_sidecar.placement import choose
from tests.sidecar.support import kill_if_alive, wait_until_dead, wait_until_removed


@pytest.fixture
def attempts_dir(tmp_path: Path) -> Iterator[Path]:
    """Where runs live; they are gone after the test, whatever it did."""
    directory = tmp_path / "attempts"
    yield directory
    for found in survey(directory):
        if found.record is None:
            continue
        if found.shim is not None:
            kill_if_alive(found.shim)
            wait_until_dead(found.shim)
        main = found.record.started.process if found.record.started else None
        key: remains.RunKey = (found.record.spec.attempt_id, found.record.spec.run_no)
        group = found.record.cgroup
        if group is not None:
            cgroups.kill(group)
        for stats in remains.find({key: main}, {key: group} if group is not None else {}).values():
            for stat in stats:
                with contextlib.suppress(ProcessLookupError):
                    identity.send_signal(stat.pid, stat.start_ticks, 9)
        if group is not None:
            wait_until_removed(group)


@pytest.fixture
def placement_kind(request: pytest.FixtureRequest) -> PlacementKind:
    """Where the launcher puts its runs: process groups, unless the test is marked with `@both_placements`."""
    return getattr(request, "param", PlacementKind.PROCESS_GROUP)


@pytest.fixture
async def launcher(attempts_dir: Path, placement_kind: PlacementKind) -> AsyncIterator[Launcher]:
    """A started launcher."""
    started = Launcher(attempts_dir, await choose(placement_kind))
    await started.start()
    yield started
    await started.stop()
