"""What the agent says to Prometheus: one snapshot in, the text format out. Labels have bounded sets of values.

Names and units as in https://prometheus.io/docs/practices/naming/. Knows no part of the agent; nothing is counted here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from remotegpu_agent.contact import Problem
from remotegpu_queue.admission import BlockKind
from remotegpu_queue.breaker import Phase
from remotegpu_schemas.states import TaskState

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The agent at one moment. `readings` are bytes and counts by name; None where they could not be read."""

    version: str
    uptime_s: float
    tasks: Mapping[str, int]
    slots: int
    slots_used: int
    blocks: frozenset[BlockKind]
    breaker: Phase
    is_connected: bool
    contact_problem: Problem | None
    reports_waiting: int
    dead_letters: int
    loop_failures: Mapping[str, int]
    disk_free_bytes: int | None
    inodes_free: int | None
    memory_available_bytes: int | None


def render(snapshot: Snapshot) -> bytes:
    """The text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Once(snapshot))
    return generate_latest(registry)


class _Once(Collector):
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        """One family after the other."""
        now = self._snapshot
        yield InfoMetricFamily("remotegpu_agent", "The agent's version.", {"version": now.version})
        yield _gauge("remotegpu_agent_uptime_seconds", "Seconds since the agent was started.", now.uptime_s)
        yield _by(
            "remotegpu_tasks", "Tasks by state.", "state", {str(each): now.tasks.get(each, 0) for each in TaskState}
        )
        yield _gauge("remotegpu_slots", "Tasks that may run at once.", now.slots)
        yield _gauge("remotegpu_slots_used", "Tasks that run.", now.slots_used)
        yield _by(
            "remotegpu_claims_blocked",
            "1 for each reason that keeps the agent from claiming tasks.",
            "reason",
            {str(kind): int(kind in now.blocks) for kind in BlockKind},
        )
        yield _by(
            "remotegpu_breaker_phase",
            "1 for the phase of the black-hole breaker.",
            "phase",
            {str(phase): int(phase is now.breaker) for phase in Phase},
        )
        yield _gauge("remotegpu_control_plane_connected", "1 while the control plane answers.", int(now.is_connected))
        yield _by(
            "remotegpu_control_plane_problem",
            "1 for what is wrong between agent and control plane.",
            "problem",
            {str(problem): int(problem is now.contact_problem) for problem in Problem},
        )
        yield _gauge("remotegpu_reports_waiting", "Reports that wait for the control plane.", now.reports_waiting)
        yield _gauge("remotegpu_dead_letters", "Reports that the control plane refused for good.", now.dead_letters)
        failures = CounterMetricFamily(
            "remotegpu_part_failures", "Unexpected errors, by the part of the agent.", labels=["part"]
        )
        for part, count in sorted(now.loop_failures.items()):
            failures.add_metric([part], count)
        yield failures
        readings = (
            ("remotegpu_disk_free_bytes", "Bytes free on the disk of the state directory.", now.disk_free_bytes),
            ("remotegpu_inodes_free", "Inodes free on the disk of the state directory.", now.inodes_free),
            ("remotegpu_memory_available_bytes", "Memory that tasks could have.", now.memory_available_bytes),
        )
        for name, text, value in readings:
            if value is not None:
                yield _gauge(name, text, value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _by(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
