"""What /proc tells of a process: its memory over time, and how long it has waited for a processor."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

import psutil

_SAMPLE_EVERY_S: Final = 0.1


@contextlib.asynccontextmanager
async def memory_of(pid: int) -> AsyncGenerator[list[int]]:
    """The resident set of a process, sampled for the time of the `with` (bytes)."""
    process = psutil.Process(pid)
    samples = [process.memory_info().rss]

    async def sample() -> None:
        while True:
            await asyncio.sleep(_SAMPLE_EVERY_S)
            samples.append(process.memory_info().rss)

    sampler = asyncio.create_task(sample())
    try:
        yield samples
    finally:
        sampler.cancel()
        await asyncio.gather(sampler, return_exceptions=True)


def starved_s(pid: int) -> float:
    """How long the process's main thread has waited for a processor while others had it (seconds).

    The second field of /proc/PID/task/TID/schedstat (kernel documentation, scheduler/sched-stats.rst).
    """
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9
