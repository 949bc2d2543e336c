"""Everything at once, by chance: hosts killed and frozen, links cut and hung, a plane that loses, lies and restarts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

import pytest

from tests.chaos.disturbances import Disturber
from tests.chaos.seeds import seeded
from tests.chaos.traces import Traces, processes_in
from tests.end_to_end.fleet import fleet
from tests.scale import scaled
from tests.waiting import until_so

log = logging.getLogger(__name__)

_DISTURBED_S: Final = scaled(15, 300)
_TASKS: Final = scaled(60, 500)
_LEASE_S: Final = 4.0
_SECONDS: Final = (0, 0.1, 0.5, 2, 5)
_SETTINGS: Final = {
    "control_plane": {"timeout": 2, "heartbeat_interval": 0.5, "long_poll": 3, "poll_interval": 0.2},
    "lease": {"margin": 0.3, "renew_interval": 0.5},
    "tasks": {"grace_period": 0.5},
    "breaker": {"failures": 0},
}


@pytest.mark.timeout(scaled(180, 1200))
async def test_f07_f10_f11_f13_f14_f51_random_faults_of_all_kinds(tmp_path: Path) -> None:
    """Two hosts: each task has one right result, never two live trees; every report arrives; no process is left."""
    with seeded("tests/chaos/test_mix.py") as chance:
        await _mix(tmp_path, chance)
        await until_so(lambda: not processes_in(tmp_path))


async def _mix(tmp_path: Path, chance: random.Random) -> None:
    traces = Traces(tmp_path / "traces")
    traces.directory.mkdir()
    codes = {f"t-{number:04}": 1 + number % 250 if number % 10 == 3 else 0 for number in range(_TASKS)}
    tasks = [traces.task(name, seconds=chance.choice(_SECONDS), code=code) for name, code in codes.items()]
    began_s = time.monotonic()
    async with fleet(tmp_path, _SETTINGS, hosts=2, lease_ttl_s=_LEASE_S, attempts_max=100_000) as all_of_it:
        await all_of_it.submit(*tasks)
        disturber = Disturber(all_of_it, chance, past_lease_s=_LEASE_S + 1.5)
        async with _never_two_at_once(traces):
            await disturber.run(_DISTURBED_S)
            mended_s = time.monotonic() - began_s
            for host in all_of_it.hosts:
                await host.wait_ready()
            results = await all_of_it.ended(list(codes), scaled(90, 300))
        fenced = sum(traces.check(task, codes[task["id"]]) for task in results)
        log.info(
            "%d tasks, %d disturbances in %.0f s, all ended after %.0f s; %d attempts were fenced",
            *(_TASKS, disturber.count, mended_s, time.monotonic() - began_s, fenced),
        )
        for host in all_of_it.hosts:
            status = await host.until_shown("/queue/status", lambda now: now["reports_waiting"] == 0)
            assert status["dead_letters"] == 0


@contextlib.asynccontextmanager
async def _never_two_at_once(traces: Traces) -> AsyncGenerator[None]:
    """Raises as soon as a second tree of a task was started beside the first."""

    async def watch() -> None:
        while not traces.twice():  # noqa: ASYNC110 - other processes set no event of ours
            await asyncio.sleep(0.2)
        raise AssertionError(f"two at once: {traces.twice()}")

    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch())
        yield
        watching.cancel()
