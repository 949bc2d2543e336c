"""F07: the agent is killed again and again, at random moments, under hundreds of tasks."""

from __future__ import annotations

import asyncio
import logging
import random
import statistics
import time
from pathlib import Path
from typing import Final

import pytest

from tests.chaos.seeds import seeded
from tests.chaos.traces import Traces, processes_in
from tests.end_to_end.agent_process import AgentProcess
from tests.end_to_end.fleet import fleet
from tests.scale import scaled
from tests.waiting import until_so

log = logging.getLogger(__name__)

_TASKS: Final = scaled(60, 500)
_KILLS: Final = scaled(8, 100)
_SECONDS: Final = (0, 0.05, 0.3, 1.5)
_LEASE_S: Final = 10.0
"""What a killed agent had claimed and not stored comes back within the test."""


@pytest.mark.timeout(scaled(180, 1800))
async def test_f07_killed_at_random_moments(tmp_path: Path) -> None:
    """F07: every task has one right result; its process ran once, and never two of a task at once; nothing is left."""
    with seeded("tests/chaos/test_kills.py") as chance:
        await _storm(tmp_path, chance)


async def _storm(tmp_path: Path, chance: random.Random) -> None:
    traces = Traces(tmp_path / "traces")
    traces.directory.mkdir()
    codes = {f"t-{number:03}": 1 + number % 250 if number % 10 == 3 else 0 for number in range(_TASKS)}
    tasks = [traces.task(name, seconds=chance.choice(_SECONDS), code=code) for name, code in codes.items()]
    ready_s: list[float] = []
    began_s = time.monotonic()
    async with fleet(tmp_path, is_started=False, lease_ttl_s=_LEASE_S, attempts_max=1000) as both:
        for kill in range(_KILLS):
            await both.submit(*tasks[kill * _TASKS // _KILLS : (kill + 1) * _TASKS // _KILLS])
            await both.host.start(until_ready=False)
            await _until_a_random_moment(both.host, chance, ready_s)
            await both.host.kill()
        killed_s = time.monotonic() - began_s
        await both.host.start()
        results = await both.ended(list(codes), 120)
        fenced = sum(traces.check(task, codes[task["id"]]) for task in results)
        log.info(
            "%d tasks, %d kills in %.0f s, all ended after %.0f s; ready after %.2f s (median), %.2f s (most); "
            "%d attempts were fenced",
            *(_TASKS, _KILLS, killed_s, time.monotonic() - began_s),
            *(statistics.median(ready_s), max(ready_s), fenced),
        )
        assert not traces.twice()
        status = await both.host.until_shown("/queue/status", lambda now: now["reports_waiting"] == 0)
        assert status["dead_letters"] == 0
    await until_so(lambda: not processes_in(tmp_path))


async def _until_a_random_moment(host: AgentProcess, chance: random.Random, ready_s: list[float]) -> None:
    """Every fourth time while the agent starts, else within a second of its being ready."""
    if chance.random() < 0.25:
        await asyncio.sleep(chance.uniform(0.0, 1.0))
        return
    began_s = time.monotonic()
    await host.wait_ready()
    ready_s.append(time.monotonic() - began_s)
    await asyncio.sleep(chance.uniform(0.0, 1.0))
