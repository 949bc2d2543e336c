"""What Prometheus reads."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

from remotegpu_agent import metrics
from remotegpu_agent.contact import Problem
from remotegpu_queue.admission import BlockKind
from remotegpu_queue.breaker import Phase

SNAPSHOT = metrics.Snapshot(
    version="0.1.0",
    uptime_s=12.5,
    tasks={"running": 3},
    slots=4,
    slots_used=3,
    blocks=frozenset({BlockKind.DISK_FULL}),
    breaker=Phase.OPEN,
    is_connected=False,
    contact_problem=Problem.TOKEN_REFUSED,
    reports_waiting=7,
    dead_letters=1,
    loop_failures={"claims": 2},
    disk_free_bytes=1 << 30,
    inodes_free=None,
    memory_available_bytes=1 << 31,
)


def test_every_figure_is_there_once_with_its_value() -> None:
    """Read back by Prometheus' own parser; what could not be read is left out."""
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.render(SNAPSHOT).decode())
        for sample in family.samples
    }
    assert samples["remotegpu_agent_info", "0.1.0"] == 1
    assert samples[("remotegpu_agent_uptime_seconds",)] == 12.5
    assert (samples["remotegpu_tasks", "running"], samples["remotegpu_tasks", "failed"]) == (3, 0)
    blocked = {key[1]: value for key, value in samples.items() if key[0] == "remotegpu_claims_blocked"}
    assert blocked == {str(kind): int(kind is BlockKind.DISK_FULL) for kind in BlockKind}
    assert samples["remotegpu_breaker_phase", "open"] == 1
    problems = {key[1]: value for key, value in samples.items() if key[0] == "remotegpu_control_plane_problem"}
    assert problems == {str(problem): int(problem is Problem.TOKEN_REFUSED) for problem in Problem}
    assert samples["remotegpu_part_failures_total", "claims"] == 2
    assert samples[("remotegpu_disk_free_bytes",)] == 1 << 30
    assert ("remotegpu_inodes_free",) not in samples


def test_names_and_texts() -> None:
    """Each family has the program's prefix and a sentence of help, and says what type it is."""
    text = metrics.render(SNAPSHOT).decode()
    names = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    helped = set(re.findall(r"^# HELP (\S+) \S.*\.$", text, re.MULTILINE))
    assert names
    assert {name for name, _ in names} == helped
    assert all(name.startswith("remotegpu_") for name, _ in names)
