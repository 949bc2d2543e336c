"""How much of this host tasks may use: as configured, else what the host has."""

from __future__ import annotations

import math
from typing import Final

from remotegpu_agent import host
from remotegpu_agent.config import CapacitySection
from remotegpu_queue.scheduling import Capacity

_CPUS_PER_SLOT: Final = 2


def capacity_of(section: CapacitySection) -> Capacity:
    """Slots (default: one for two CPUs), CPUs and memory for tasks."""
    cpus = section.cpus if section.cpus is not None else host.total_cpus()
    memory_mb = round(section.memory_gb * 1024) if section.memory_gb is not None else host.total_memory_mb()
    slots = section.max_concurrent or max(1, math.floor(cpus / _CPUS_PER_SLOT))
    return Capacity(slots=slots, cpus=cpus, memory_mb=memory_mb)
