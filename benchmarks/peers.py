"""What the agent is measured against: the bare cost of a process, of a commit on this disk, and task-spooler."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import Final

NO_OP: Final = "/bin/true"


def posix_spawn_per_s(tasks: int, at_once: int) -> float:
    """Processes a second of a bare posix_spawn loop that keeps so many running: the limit for a process per task."""
    started = time.perf_counter()
    running = left = 0
    begun = 0
    while begun < tasks or running:
        while begun < tasks and running < at_once:
            os.posix_spawn(NO_OP, [NO_OP], os.environ)
            begun, running = begun + 1, running + 1
        os.wait()
        running, left = running - 1, left + 1
    return left / (time.perf_counter() - started)


def commits_per_s(directory: Path, commits: int) -> float:
    """Transactions a second that SQLite makes durable here (WAL, synchronous=FULL), one after the other."""
    database = sqlite3.connect(directory / "commits.db", isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("CREATE TABLE rows (value INTEGER)")
        started = time.perf_counter()
        for number in range(commits):
            database.execute("INSERT INTO rows VALUES (?)", (number,))
        return commits / (time.perf_counter() - started)
    finally:
        database.close()


def task_spooler_per_s(directory: Path, tasks: int, at_once: int) -> float:
    """Tasks a second of Debian's task-spooler: one client process a task, queued in its server's memory."""
    environ = {**os.environ, "TS_SOCKET": str(directory / "tsp.sock"), "TMPDIR": str(directory), "TS_MAXFINISHED": "10"}

    def tsp(*arguments: str) -> None:
        subprocess.run(["tsp", *arguments], env=environ, check=True, stdout=subprocess.DEVNULL)

    tsp("-S", str(at_once))
    try:
        started = time.perf_counter()
        for _ in range(tasks - 1):
            tsp("-n", NO_OP)
        # The last one waits for the first free slot; when it has ended at most `at_once` - 1 others are left.
        tsp("-n", "-f", NO_OP)
        return tasks / (time.perf_counter() - started)
    finally:
        tsp("-K")
