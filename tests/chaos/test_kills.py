"""F07: the agent is killed again and again, at random moments, under hundreds of tasks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import statistics
import time
from pathlib import Path
from typing import Final

import psutil
import pytest

from tests.chaos.seeds import seeded
from tests.chaos.traces import Traces, processes_in
from tests.end_to_end.agent_process import AgentProcess
from tests.end_to_end.fleet import fleet
from tests.scale import scaled
from tests.waiting import DEADLINE_S, until_so

log = logging.getLogger(__name__)

_TASKS: Final = scaled(60, 500)
_KILLS: Final = scaled(8, 100)
_SECONDS: Final = (0, 0.05, 0.3, 1.5)
_LEASE_S: Final = 10.0
"""What a killed agent had claimed and not stored comes back within the test."""
_SUPERVISED_TASKS: Final = scaled(24, 100)
_SUPERVISOR_KILLS: Final = scaled(8, 60)


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
        results = await both.ended(list(codes), scaled(120, 600))
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


@pytest.mark.timeout(180)
async def test_f08_f09_spawners_and_shims_killed_at_random_moments(tmp_path: Path) -> None:
    """F08, F09: lost runs are repeated at no cost: one right result each, never two at once, and nothing is left."""
    with seeded("tests/chaos/test_kills.py") as chance:
        traces = Traces(tmp_path / "traces")
        traces.directory.mkdir()
        codes = {f"t-{number:03}": number % 3 for number in range(_SUPERVISED_TASKS)}
        tasks = [traces.task(name, seconds=chance.choice(_SECONDS[2:]), code=code) for name, code in codes.items()]
        async with fleet(tmp_path, {"breaker": {"failures": 0}}) as both:  # many fail on purpose
            await both.submit(*tasks)
            await both.plane.faults.wait_calls("start", 1, DEADLINE_S)
            for _ in range(_SUPERVISOR_KILLS):
                await asyncio.sleep(chance.uniform(0.0, 0.6))
                _kill_a_supervisor(both.host, chance)
            results = await both.ended(list(codes), scaled(120, 600))
            lost = 0
            for task in results:
                traces.check(task, codes[task["id"]], may_repeat=True)
                detail = await both.host.get(f"/tasks/{task['id']}")
                assert detail["retries_used"] == 0, detail
                lost += sum(run["cause"] == "agent_lost" for run in detail["runs"])
            log.info("%d runs were lost, and repeated", lost)
            assert not traces.twice()
        await until_so(lambda: not processes_in(tmp_path))


def _kill_a_supervisor(host: AgentProcess, chance: random.Random) -> None:
    """The spawner, or one of the shims that live now."""
    alive = [process for process in processes_in(host.directory) if _name_of(process) == "remotegpu-shim"]
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):  # gone meanwhile, or not there yet
        children = psutil.Process(host.pid).children()
        alive += [child for child in children if _name_of(child) == "remotegpu-spawn"]
        chance.choice(alive).kill()


def _name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""
