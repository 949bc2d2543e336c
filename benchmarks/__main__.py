"""The driver: several rounds of all figures in turn, one JSON document, one table on standard output."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Final

from benchmarks import agent, peers, supervision
from benchmarks.report import Figure, Round, markdown, percentile, summary

AT_ONCE: Final = 4
FIGURES: Final = (
    Figure("spawn", "bare posix_spawn, 4 at once", "processes/s"),
    Figure("commits", "SQLite commits with fsync, one by one", "commits/s"),
    Figure("tsp", "task-spooler, 4 slots", "tasks/s", peer="spawn"),
    Figure("local", "no-op tasks, local, 4 slots", "tasks/s", peer="spawn", aim=100),
    Figure("plane", "no-op tasks through the control plane, 4 slots", "tasks/s", peer="spawn", aim=60),
    Figure("local_p50", "submit to start, local, p50", "ms", aim=20, is_less_better=True),
    Figure("local_p99", "submit to start, local, p99", "ms"),
    Figure("plane_p50", "submit to start through the control plane, p50", "ms"),
    Figure("plane_p99", "submit to start through the control plane, p99", "ms"),
    Figure("launches", "no-op tasks by launcher, spawner and shims alone, 4 at once", "tasks/s", peer="spawn"),
    Figure("shim", "memory of the shim of a running task, unshared", "MiB", aim=1.5, is_less_better=True),
    Figure("start", "start of an agent that adopts nothing", "s"),
    Figure(
        "adoption", "start of an agent that adopts 100 running tasks", "s", peer="start", aim=1.5, is_less_better=True
    ),
    Figure("cat", "output through `cat >file`, in a session of its own", "MiB/s"),
    Figure("cat_pipeline", "output through `cat >file`, in the writer's session", "MiB/s"),
    Figure("output", "output of a task, all of it kept", "MiB/s", peer="cat"),
    Figure("output_bounded", "output of a task, 100 MiB of it kept", "MiB/s", peer="cat"),
    Figure("output_growth", "memory that its shim has gained meanwhile", "MiB", aim=2, is_less_better=True),
    Figure("idle", "memory of an idle agent and its spawner, unshared", "MiB"),
)


def main() -> int:
    """Run the benchmarks; the exit code is 0 whether or not the aims are met: the table says it."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds of everything (3)")
    parser.add_argument("--tasks", type=int, default=400, metavar="N", help="tasks of each throughput figure (400)")
    parser.add_argument("--starts", type=int, default=100, metavar="N", help="tasks of each latency figure (100)")
    parser.add_argument("--output-mb", type=int, default=2048, metavar="N", help="output of the output figure (2048)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures of all rounds go")
    options = parser.parse_args()
    rounds: list[Round] = []
    for number in range(1, options.rounds + 1):
        print(f"round {number} of {options.rounds} ...", file=sys.stderr, flush=True)
        rounds.append(_round(options.tasks, options.starts, options.output_mb))
    found = summary(FIGURES, rounds)
    machine = f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} CPUs"
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "figures": found, "rounds": rounds}, indent=2) + "\n")
    print(f"{machine}; {options.rounds} rounds, {options.tasks} tasks each, load {os.getloadavg()[0]:.1f} at the end\n")
    print(markdown(found))
    return 0


def _round(tasks: int, starts: int, output_mb: int) -> Round:
    found: Round = {
        "spawn": peers.posix_spawn_per_s(tasks, AT_ONCE),
        "commits": _in_folder(lambda folder: peers.commits_per_s(folder, tasks)),
        "tsp": _in_folder(lambda folder: peers.task_spooler_per_s(folder, tasks, AT_ONCE)),
        "local": _in_folder(lambda folder: agent.local_per_s(folder, tasks, AT_ONCE)),
        "plane": _in_folder(lambda folder: agent.through_plane_per_s(folder, tasks, AT_ONCE)),
        "idle": _in_folder(agent.idle_memory_mb),
        "launches": _in_folder(lambda folder: supervision.launches_per_s(folder, tasks, AT_ONCE)),
        "shim": _in_folder(supervision.shim_memory_mb),
        "start": _in_folder(supervision.start_s),
        "adoption": _in_folder(supervision.adoption_s),
        "cat": _in_folder(lambda folder: supervision.cat_mb_per_s(folder, output_mb, has_own_session=True)),
        "cat_pipeline": _in_folder(lambda folder: supervision.cat_mb_per_s(folder, output_mb, has_own_session=False)),
    }
    with _folder() as folder:
        found["output"], _ = supervision.output_mb_per_s(folder, output_mb, 2 * output_mb)
    with _folder() as folder:
        found["output_bounded"], found["output_growth"] = supervision.output_mb_per_s(folder, output_mb, 100)
    latencies = {"local": agent.local_starts_s, "plane": agent.through_plane_starts_s}
    for name, measure in latencies.items():
        with _folder() as folder:
            seconds = measure(folder, starts)
        found[f"{name}_p50"] = 1000 * percentile(seconds, 0.5)
        found[f"{name}_p99"] = 1000 * percentile(seconds, 0.99)
    return found


def _in_folder(measure: Callable[[Path], float]) -> float:
    with _folder() as folder:
        return measure(folder)


@contextlib.contextmanager
def _folder() -> Generator[Path]:
    """A folder of its own for each figure, on the disk and not in memory."""
    with tempfile.TemporaryDirectory(prefix="remotegpu-bench-", dir="/var/tmp") as name:
        yield Path(name)


if __name__ == "__main__":
    sys.exit(main())
