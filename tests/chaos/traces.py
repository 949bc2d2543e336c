"""Tasks that leave traces: what has run, how often, and never two of a task at once."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

_OPEN_ATTEMPT_STATES: Final = frozenset({"claimed", "started"})


@dataclass(frozen=True)
class Traces:
    """A directory with a file for each task, to which its processes append; `check` holds it against the plane."""

    directory: Path

    def task(self, name: str, *, seconds: float, code: int, **more: Any) -> dict[str, Any]:
        """A task for the plane. All its processes hold one lock, on which a second tree of the task would fail."""
        trace = self.directory / name
        who = '"$REMOTEGPU_ATTEMPT_ID $REMOTEGPU_RUN_NUMBER'
        command = (
            f"exec 9>>'{trace}.lock'; flock -n 9 || {{ echo {who} \" >>'{trace}.twice'; exit 99; }}; "
            f"echo {who} start\" >>'{trace}'; sleep {seconds} & wait; echo out-{name}; echo err-{name} >&2; "
            f"echo {who} end\" >>'{trace}'; exit {code}"
        )
        return {"id": name, "command": command, **more}

    def twice(self) -> list[str]:
        """The tasks of which a second process tree was started while the first one lived."""
        return [path.stem for path in self.directory.glob("*.twice")]

    def check(self, task: dict[str, Any], code: int, *, may_repeat: bool = False) -> int:
        """One right result, of an attempt that ran once. Returns how many other attempts had run, and were fenced.

        `may_repeat`: the attempt may have had several runs, each of which ran once.
        """
        result, name = task["result"], task["id"]
        assert task["status"] == ("failed" if code else "completed"), task
        assert (result["exit_code"], result["cause"]) == (code, "exit_code" if code else "succeeded"), task
        assert (result["stdout"], result["stderr"]) == (f"out-{name}\n", f"err-{name}\n"), task
        assert task["completions"]["accepted"] == 1, task
        lines = [line.split() for line in (self.directory / name).read_text().splitlines()]
        counts = Counter(map(tuple, lines))
        assert set(counts.values()) == {1}, (counts, task)
        starts = Counter(attempt for attempt, _, what in lines if what == "start")
        ends = Counter(attempt for attempt, _, what in lines if what == "end")
        states = {attempt["attempt_id"]: attempt["state"] for attempt in task["attempt_list"]}
        [accepted] = [attempt_id for attempt_id, state in states.items() if state == "completed"]
        assert starts[accepted] >= ends[accepted] >= 1, (lines, task)
        assert may_repeat or starts[accepted] == 1, (lines, task)
        others = set(starts) - {accepted}
        assert all(states[each] not in _OPEN_ATTEMPT_STATES for each in others), (lines, task)
        return len(others)


def processes_in(directory: Path) -> list[psutil.Process]:
    """Who still has a file or its working directory in this directory, but this process."""
    return [
        process
        for process in psutil.process_iter()
        if process.pid != os.getpid() and any(each.startswith(f"{directory}/") for each in _places_of(process.pid))
    ]


def _places_of(pid: int) -> list[str]:
    proc = Path(f"/proc/{pid}")
    try:
        return [os.readlink(link) for link in (proc / "cwd", *(proc / "fd").iterdir())]
    except OSError:  # it has gone meanwhile
        return []
