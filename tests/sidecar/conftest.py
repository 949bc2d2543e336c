"""A launcher on a directory of its own; what a test leaves running is killed after it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from remotegpu_sidecar import identity, remains
from remotegpu_sidecar.adoption import survey
from remotegpu_sidecar.launcher import Launcher
from tests.sidecar.support import kill_if_alive, wait_until_dead


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
        key = (found.record.spec.attempt_id, found.record.spec.run_no)
        for stats in remains.find({key: main}).values():
            for stat in stats:
                with contextlib.suppress(ProcessLookupError):
                    identity.send_signal(stat.pid, stat.start_ticks, 9)


@pytest.fixture
async def launcher(attempts_dir: Path) -> AsyncIterator[Launcher]:
    """A started launcher."""
    started = Launcher(attempts_dir)
    await started.start()
    yield started
    await started.stop()
