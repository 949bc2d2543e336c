"""F16: the control plane is away for an hour while a thousand results wait for it; then it comes back."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sqlite3
import time
from pathlib import Path
from typing import Any, Final

import pytest

from control_plane.faults import DropBefore
from remotegpu_schemas.limits import PLANE_CONNECTIONS_MAX, REPORTS_IN_FLIGHT_MAX
from remotegpu_sidecar import identity
from tests.chaos.processes import memory_of, starved_s
from tests.end_to_end.agent_process import AgentProcess
from tests.end_to_end.fleet import Fleet, fleet
from tests.scale import scaled

log = logging.getLogger(__name__)

_DELIVERED_WITHIN_S: Final = 5.0
"""Without the time for which others had the processors: these machines are shared."""
_OTHER_CALLS: Final = 3
"""A claim, a heartbeat and a register may be under way beside the reports."""
_GROWTH_MAX_BYTES: Final = 16 * 2**20


@pytest.mark.parametrize(
    ("way", "count", "at_once"),
    [("refuses", 1000, REPORTS_IN_FLIGHT_MAX + _OTHER_CALLS), ("hangs", scaled(200, 1000), PLANE_CONNECTIONS_MAX)],
)
@pytest.mark.timeout(300)
async def test_f16_results_arrive_within_seconds_of_an_outage(
    tmp_path: Path, way: str, count: int, at_once: int
) -> None:
    """F16: all of them, in order per attempt, in flat memory, and no more at once than the bound says.

    Reports fail while the tasks are claimed and run; then nothing answers at all, for what the outbox knows as an hour.
    """
    settings = {"capacity": {"max_concurrent": 16}, "control_plane": {"timeout": 3}}
    async with fleet(tmp_path, settings, lease_ttl_s=3600.0) as both:
        faults, host = both.plane.faults, both.host
        task_ids = await _run_unheard(both, count)
        await (both.link.cut() if way == "refuses" else both.link.hang())
        reports = _as_after_an_hour(host)
        assert reports > count  # of some the start waits as well
        await host.start()
        async with memory_of(host.pid) as memory:
            await host.until_shown("/queue/status", _says_the_plane_is_away)
            faults.watch_load()
            began_s = time.monotonic()
            starved_before_s = [starved_s(pid) for pid in (host.pid, os.getpid())]
            await both.link.open()
            await both.plane.service.wait_ended(task_ids, 120)
            took_s = time.monotonic() - began_s
            starved_after_s = [starved_s(pid) for pid in (host.pid, os.getpid())]
        starved = max(after - before for before, after in zip(starved_before_s, starved_after_s, strict=True))
        curve = [sample // 2**20 for sample in memory[:: max(1, len(memory) // 20)]]
        log.info("%d reports in %.1f s, %.1f s of them without a processor", reports, took_s, starved)
        log.info("at most %d calls at once; memory in MiB: %s", faults.most_at_once, curve)
        await _each_once_and_in_order(await both.ended(task_ids))
        assert took_s - starved < _DELIVERED_WITHIN_S
        assert faults.most_at_once <= at_once
        assert max(memory) - memory[0] < _GROWTH_MAX_BYTES, curve
        status = await host.until_shown("/queue/status", lambda now: now["reports_waiting"] == 0)
        assert status["dead_letters"] == 0


async def _run_unheard(both: Fleet, count: int) -> list[str]:
    """Let tasks run to their ends, of which the plane hears nothing, of the last not even the start; end the agent."""
    faults, host = both.plane.faults, both.host
    faults.order_always("complete", DropBefore())
    task_ids = await both.submit(*[{"command": "true"}] * count)
    await host.until_shown("/queue/status", lambda status: status["tasks"]["completed"] >= 0.9 * count)
    faults.order_always("start", DropBefore())
    await host.until_shown("/queue/status", lambda status: status["tasks"]["completed"] == count)
    await host.kill()
    faults.clear()
    return task_ids


def _as_after_an_hour(host: AgentProcess) -> int:
    """Age what waits in a stopped agent's outbox: tried for an hour, put off as such reports are. How many wait."""
    chance = random.Random(16)
    now_ns = identity.boottime_ns()
    with contextlib.closing(sqlite3.connect(host.state_dir / "queue.db")) as db, db:
        heads = db.execute("SELECT id FROM outbox WHERE due_boottime_ns IS NOT NULL").fetchall()
        for (report_id,) in heads:
            db.execute(
                "UPDATE outbox SET tries = 100, due_boottime_ns = ?, first_try_at_ms = created_at_ms - 3600000 "
                "WHERE id = ?",
                (now_ns + round(chance.uniform(6.0, 60.0) * 1e9), report_id),
            )
        count: int = db.execute("SELECT count(*) FROM outbox WHERE is_dead = 0").fetchone()[0]
        return count


def _says_the_plane_is_away(status: dict[str, Any]) -> bool:
    plane = status["control_plane"]
    return not plane["is_connected"] and plane["error"] != "not contacted yet"


async def _each_once_and_in_order(tasks: list[dict[str, Any]]) -> None:
    for task in tasks:
        assert (task["status"], task["completions"]["accepted"]) == ("completed", 1), task
        kinds = [event["kind"] for event in task["events"]]
        assert kinds[:4] == ["created", "claimed", "started", "completed"], task
        assert set(kinds[4:]) <= {"repeated"}, task
