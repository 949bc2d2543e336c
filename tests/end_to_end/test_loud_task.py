"""F29: output without end, without newlines, that is no text, from whoever has the pipe: what agent and plane see."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Final

import psutil
import pytest

from remotegpu_schemas import limits
from tests.end_to_end.agent_process import AgentProcess, agent
from tests.end_to_end.fleet import fleet
from tests.end_to_end.gates import Gate
from tests.scale import scaled
from tests.waiting import until_so

MIB: Final = limits.MIB
PATTERN: Final = bytes(range(128, 253)) + b"\xff\xfe"
"""No newline, no valid UTF-8."""
SHORT_TASKS: Final = scaled(15, 100)
SHARED_MACHINE_S: Final = 0.5
"""What others on the machine may add to a median of times."""
BYTES: Final = scaled(200 * MIB, 10_000 * MIB) // (1000 * len(PATTERN)) * 1000 * len(PATTERN)

# Writes all of it, leaves a child behind that holds the pipe and writes on, closes its own end, waits to be let go.
_LOUD: Final = f"""
import os, subprocess, sys
part = (bytes(range(128, 253)) + b"\\xff\\xfe") * 1000
for _ in range({BYTES} // len(part)):
    done = 0
    while done < len(part):
        done += os.write(1, part[done:])
open(sys.argv[1], "w").close()
open(sys.argv[2]).read()
subprocess.Popen(["sh", "-c", "trap '' TERM HUP; while :; do sleep 1; done"], start_new_session=True)
os.close(1)
os.close(2)
os._exit(5)
"""


def own_memory_bytes(pid: int) -> int:
    """Memory that is nobody else's."""
    return int(psutil.Process(pid).memory_full_info().uss)


@pytest.mark.timeout(scaled(120, 1200))
async def test_f29_a_flood_through_agent_and_plane(tmp_path: Path) -> None:
    """F29: the files stay in their bound, the agent's memory where it was; the end is seen, and reported with text."""
    written, gate = tmp_path / "written", tmp_path / "gate"
    os.mkfifo(gate)
    async with fleet(tmp_path, {"output": {"max_size_mb": 16}, "tasks": {"grace_period": 1}}) as both:
        assert (await both.task({"command": "echo warm"}))["status"] == "completed"
        before = own_memory_bytes(both.host.pid)
        task = {"script": _LOUD, "type": "python", "args": [str(written), str(gate)], "timeout": 1200}
        [task_id] = await both.submit(task)
        await both.host.wait_running(task_id)
        await until_so(written.exists)
        grown = own_memory_bytes(both.host.pid) - before
        kept = sum(path.stat().st_size for path in (both.host.state_dir / "attempts").rglob("std*"))
        assert kept <= 16 * MIB
        gate.write_text("go")
        [ended] = await both.ended([task_id])
        result = ended["result"]
        assert (result["cause"], result["exit_code"], result["truncated"]) == ("exit_code", 5, True)
        assert len(result["stdout"].encode()) <= limits.INLINE_OUTPUT_MAX_BYTES
        assert "\ufffd" in result["stdout"]
        assert max(grown, own_memory_bytes(both.host.pid) - before) < 8 * MIB
        for offset in (0, BYTES // 2, -1000):
            piece = await both.host.get(f"/tasks/{task_id}/logs?stream=stdout&offset={offset}&limit=1000")
            where = max(offset, 0) if offset >= 0 else BYTES + offset
            assert piece["offset"] >= where
            length = piece["next_offset"] - piece["offset"]
            start = piece["offset"] % len(PATTERN)
            wanted = (PATTERN * (length // len(PATTERN) + 2))[start : start + length]
            assert piece["text"] == wanted.decode("utf-8", "replace"), offset
        last = await both.host.get(f"/tasks/{task_id}/logs?stream=stdout&offset=-1000&limit=1000")
        assert (last["is_end"], last["next_offset"]) == (True, BYTES)


async def submit_to_end_s(host: AgentProcess) -> float:
    """Median time of short tasks, one after another, from before the submission until their end is shown (s)."""
    times_s = []
    for _ in range(SHORT_TASKS):
        begun_s = time.perf_counter()
        detail = await host.wait_for(await host.submit(command="true"))
        times_s.append(time.perf_counter() - begun_s)
        assert detail["state"] == "completed"
    return statistics.median(times_s)


async def test_f29_a_flood_leaves_another_tasks_latency_unhurt(tmp_path: Path) -> None:
    """F29: beside a task that writes as fast as it can, a short one takes at most three times as long as without it."""
    gate = Gate(tmp_path / "gate")
    settings = {"output": {"max_size_mb": 16}, "tasks": {"grace_period": 1}, "capacity": {"max_concurrent": 2}}
    async with agent(tmp_path, **settings) as host:
        flood_id = await host.submit(command=f"{gate.wait}; exec yes")
        flood = f"/tasks/{flood_id}/logs?stream=stdout&offset=-1000&limit=1000"
        try:
            await host.wait_running(flood_id)
            alone_s = await submit_to_end_s(host)
            gate.open()
            before = await host.until_shown(flood, lambda piece: piece["next_offset"] > 64 * MIB)
            beside_s = await submit_to_end_s(host)
            written_bytes = (await host.get(flood))["next_offset"] - before["next_offset"]
        finally:
            await host.post(f"/tasks/{flood_id}/cancel")
            ended = await host.wait_for(flood_id)
        print(f"median alone {alone_s:.3f} s, beside a flood of {written_bytes / MIB:.0f} MiB {beside_s:.3f} s")
        assert ended["state"] == "cancelled"
        assert written_bytes > 64 * MIB, "the flood went on all the while"
        assert beside_s <= 3 * alone_s + SHARED_MACHINE_S
