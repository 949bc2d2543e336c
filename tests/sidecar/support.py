"""What the sidecar's tests share: specs, waiting for facts with a deadline, a real agent process that can be killed."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from remotegpu_schemas.attempt import AttemptId, PlacementKind, ProcessIdentity, RunNo, RunSpec
from remotegpu_schemas.task import TaskId
from remotegpu_sidecar import cgroups, grouping, identity
from remotegpu_sidecar.launcher import Launcher, Run

DEADLINE_S = 20.0
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HAS_GROUPS = not os.path.isdir("/run/systemd/system") and not isinstance(grouping.find(), str)
"""Whether control groups can be made here; test_placement.py proves what is chosen in either case."""
both_placements = pytest.mark.parametrize(
    "placement_kind",
    [PlacementKind.PROCESS_GROUP, *([PlacementKind.CGROUP] if HAS_GROUPS else [])],
    indirect=True,
)


def unique(attempt: str = "attempt") -> str:
    """An attempt id that no other test run on this host has: what is left of a lost run is found by it, host-wide."""
    return f"{attempt}-{os.getpid()}"


def make_spec(*argv: str, attempt: str = "attempt", run_no: int = 1, **changes: Any) -> RunSpec:
    """A spec with the variables that every run has; its attempt id is made unique."""
    attempt = unique(attempt)
    env = {
        "PATH": PATH,
        "REMOTEGPU_TASK_ID": "task",
        "REMOTEGPU_ATTEMPT_ID": attempt,
        "REMOTEGPU_RUN_NUMBER": str(run_no),
        **changes.pop("env", {}),
    }
    values: dict[str, Any] = {"cwd": "/", "grace_period_s": 10.0, **changes}
    return RunSpec(
        task_id=TaskId("task"), attempt_id=AttemptId(attempt), run_no=RunNo(run_no), argv=argv, env=env, **values
    )


def sh(script: str) -> tuple[str, str, str]:
    """The arguments of a shell command."""
    return ("sh", "-c", script)


def python(script: str) -> tuple[str, ...]:
    """The arguments of a Python program."""
    return (sys.executable, "-I", "-S", "-c", script)


async def until(fact: Callable[[], object], what: str = "it to become true") -> None:
    """Wait for something that gives no event of its own."""
    give_up = time.monotonic() + DEADLINE_S
    while not fact():
        assert time.monotonic() < give_up, f"waited in vain for {what}"
        await asyncio.sleep(0.002)


async def until_file(path: Path, content: str | None = None) -> str:
    """Wait for a file to hold a whole line (or exactly this text), and return it."""

    def is_there() -> bool:
        try:
            text = path.read_text()
        except OSError:
            return False
        return text == content if content is not None else text.endswith("\n")

    await until(is_there, f"{path}")
    return path.read_text()


async def pid_from(path: Path) -> ProcessIdentity:
    """The identity of the process that writes its pid into a file."""
    return identity_of(int(await until_file(path)))


def identity_of(pid: int) -> ProcessIdentity:
    """The schema's identity of a process that is there."""
    found = identity.identify(pid)
    return ProcessIdentity(boot_id=found.boot_id, pid=found.pid, start_ticks=found.start_ticks)


def wait_until_dead(who: ProcessIdentity) -> None:
    """Wait for a process's end by its pidfd."""
    try:
        fd = identity.open_pidfd(who)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(DEADLINE_S * 1000), f"process {who.pid} lives on"
    finally:
        os.close(fd)


def wait_until_removed(group: str) -> None:
    """Remove a control group as soon as nobody is in it."""
    give_up = time.monotonic() + DEADLINE_S
    while not cgroups.remove(group):
        assert time.monotonic() < give_up, f"somebody stays in {group}: {cgroups.pids(group)}"
        time.sleep(0.002)


def kill_if_alive(who: ProcessIdentity, number: int = signal.SIGKILL) -> None:
    """Signal exactly this process, if it is there."""
    if identity.is_alive(who):
        identity.send_signal(who.pid, who.start_ticks, number)


async def launched(launcher: Launcher, spec: RunSpec, *arguments: Any, **named: Any) -> Run:
    """A launched run, once its task executes or has failed to."""
    run = await launcher.launch(spec, *arguments, **named)
    await run.wait_started()
    return run


_AGENT = """
import asyncio, json, sys
from pathlib import Path
from remotegpu_schemas.attempt import RunSpec
from remotegpu_schemas.attempt import PlacementKind
from remotegpu_sidecar.launcher import Launcher
from remotegpu_sidecar.placement import choose

async def main():
    launcher = Launcher(Path(sys.argv[1]), await choose(PlacementKind(sys.argv[3])))
    await launcher.start()
    async def hang(shim):
        if sys.argv[2] == "hang in group":
            await launcher._placement.place(spec, shim)
        print(shim.pid, flush=True)
        print("spawner", launcher.spawner_pid, flush=True)
        await asyncio.Event().wait()

    place = hang if sys.argv[2] else None
    for text, deadline in json.loads(sys.stdin.readline()):
        spec = RunSpec.model_validate_json(text)
        run = await launcher.launch(spec, deadline, place)
        await run.wait_started()
        print(run.started.process.pid if run.started else 0, flush=True)
    print("spawner", launcher.spawner_pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class AgentProcess:
    """A launcher in a process of its own, which can be killed and frozen. Its runs are started when this is entered.

    With `hangs_before_go` its one run is not: `task_pids` holds the shim's pid, and the agent hangs in the placement,
    with `is_placed_before` at its end.
    """

    def __init__(
        self,
        attempts_dir: Path,
        *runs: tuple[RunSpec, int | None],
        hangs_before_go: bool = False,
        is_placed_before: bool = False,
        placement: PlacementKind = PlacementKind.PROCESS_GROUP,
    ) -> None:
        self._mode = "hang in group" if is_placed_before else "hang" if hangs_before_go else ""
        self._placement = placement
        self._attempts_dir = attempts_dir
        self._runs = runs
        self._process: subprocess.Popen[str]
        self.task_pids: list[int] = []
        self.spawner: ProcessIdentity

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _AGENT, str(self._attempts_dir), self._mode, self._placement],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([[spec.model_dump_json(), deadline] for spec, deadline in self._runs]))
        self._process.stdin.close()
        for _ in self._runs:
            self.task_pids.append(int(self._process.stdout.readline()))
        self.spawner = identity_of(int(self._process.stdout.readline().split()[1]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def signal(self, number: int) -> None:
        """Signal the agent."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the agent, and wait until it is gone and its spawner with it."""
        self._process.kill()
        self._process.wait()
        wait_until_dead(self.spawner)
