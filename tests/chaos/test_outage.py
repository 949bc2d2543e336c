"""F16: the control plane is away for an hour while a thousand results wait for it; then it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sqlite3
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from control_plane.faults import DropBefore
from remotegpu_schemas.limits import REPORTS_IN_FLIGHT_MAX
from remotegpu_sidecar import identity
from tests.end_to_end.agent_process import AgentProcess
from tests.end_to_end.fleet import fleet
from tests.waiting import until, until_so

log = logging.getLogger(__name__)

_TASKS: Final = 1000
_DELIVERED_WITHIN_S: Final = 5.0
_OTHER_CALLS: Final = 3
"""A claim, a heartbeat and a renewal may be under way beside the reports."""
_GROWTH_MAX_BYTES: Final = 24 * 2**20
_SAMPLE_EVERY_S: Final = 0.1


@contextlib.asynccontextmanager
async def memory_of(pid: int) -> AsyncGenerator[list[int]]:
    """The resident set of a process, sampled (bytes)."""
    samples: list[int] = []
    process = psutil.Process(pid)

    async def sample() -> None:
        while True:
            samples.append(process.memory_info().rss)
            await asyncio.sleep(_SAMPLE_EVERY_S)

    sampler = asyncio.create_task(sample())
    try:
        yield samples
    finally:
        sampler.cancel()
        await asyncio.gather(sampler, return_exceptions=True)


def as_after_an_hour(host: AgentProcess) -> int:
    """Age what waits in a stopped agent's outbox: tried for an hour, put off as such reports are. How many wait."""
    chance = random.Random(16)
    now_ns = identity.boottime_ns()
    with contextlib.closing(sqlite3.connect(host.state_dir / "queue.db")) as db, db:
        heads = db.execute("SELECT id FROM outbox WHERE due_boottime_ns IS NOT NULL").fetchall()
        for (report_id,) in heads:
            due_ns = now_ns + round(chance.uniform(6.0, 60.0) * 1e9)
            db.execute(
                "UPDATE outbox SET tries = 100, due_boottime_ns = ?, first_try_at_ms = created_at_ms - 3600000 "
                "WHERE id = ?",
                (due_ns, report_id),
            )
        count: int = db.execute("SELECT count(*) FROM outbox WHERE is_dead = 0").fetchone()[0]
        return count


async def waiting(host: AgentProcess) -> dict[str, Any]:
    """The agent's own count of what it has."""
    status: dict[str, Any] = await host.get("/queue/status")
    return status


@pytest.mark.parametrize("way", ["refuses", "hangs"])
@pytest.mark.timeout(180)
async def test_f16_a_thousand_results_arrive_within_seconds_of_an_outage(tmp_path: Path, way: str) -> None:
    """F16: all of them, in order per attempt, in flat memory, and no more at once than the bound says.

    Reports fail while the tasks are claimed and run; then nothing answers at all, for what the outbox knows as an hour.
    """
    settings = {"capacity": {"max_concurrent": 16}, "control_plane": {"timeout": 3}}
    async with fleet(tmp_path, settings, lease_ttl_s=3600.0) as both:
        faults = both.plane.faults
        for call in ("complete",):
            faults.order_always(call, DropBefore())
        task_ids = await both.submit(*[{"command": "true"}] * _TASKS)
        t0=time.monotonic()
        await both.host.until_shown("/queue/status", lambda status: status["tasks"]["completed"] == _TASKS)
        log.warning("ran in %s; calls %s", time.monotonic()-t0, faults.calls)
        await both.host.kill()
        if way == "refuses":
            await both.link.cut()
        else:
            both.link.hang()
        reports = as_after_an_hour(both.host)
        faults.clear()
        await both.host.start()
        async with memory_of(both.host.pid) as memory:
            await asyncio.sleep(4)
            faults.watch_load()
            began_s = time.monotonic()
            await both.link.open()
            tasks = await both.ended(task_ids, 100)
            took_s = time.monotonic() - began_s
        log.warning("took %.2f s for %d reports, at once %d, rss %s", took_s, reports, faults.most_at_once, [m>>20 for m in memory][::10])
        assert took_s < _DELIVERED_WITHIN_S
