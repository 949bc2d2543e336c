"""Bare control groups, without systemd: where cgroup v2 is mounted, which controllers it hands on, a group per run.

The groups lie below that of PID 1: on a host that is the root, in a container the container's own, so that its limits
hold for the tasks as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from typing import Final

from remotegpu_schemas.attempt import PlacementKind, ProcessIdentity, RunLimits, RunSpec
from remotegpu_sidecar import cgroups, identity
from remotegpu_sidecar.adoption import directory_name
from remotegpu_sidecar.spawning import Spawner, start_child

FOLDER: Final = "remotegpu-tasks"

_CPU_PERIOD_US: Final = 100_000
_CPU_QUOTA_MIN_US: Final = 1000
_CONTROLLERS: Final = {
    "memory": "memory_gb is not enforced, and an OOM kill is not told from another SIGKILL: no memory controller",
    "cpu": "cpus is not enforced: no cpu controller",
    "pids": "the number of a run's processes is not bounded: no pids controller",
}
"""Those that every run may need, and what is lost without each."""


class CgroupPlacement:
    """A group per run below `base`."""

    kind = PlacementKind.CGROUP

    def __init__(self, base: str) -> None:
        self._base = base
        self._folder = f"{base}/{FOLDER}"
        usable = _usable_controllers(base)
        self.missing = tuple(text for name, text in _CONTROLLERS.items() if name not in usable)

    async def start(self) -> None:
        """Make the folder of all runs, and let it have the controllers that are there. Raises OSError."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._folder)
        for group in (self._base, self._folder):
            for name in cgroups.read(f"{group}/cgroup.controllers").split():
                with contextlib.suppress(OSError):  # what it costs stands in `missing`
                    cgroups.write(f"{group}/cgroup.subtree_control", f"+{name}")

    async def close(self) -> None:
        """Nothing is held."""

    async def start_spawner(self, python: str) -> Spawner:
        """As a child of the agent, which its shims leave before they start anything."""
        return start_child(python)

    async def place(self, spec: RunSpec, shim: ProcessIdentity) -> str:
        """Make the run's group and put the shim into it. Raises OSError."""
        group = f"{self._folder}/{directory_name(spec.attempt_id, spec.run_no)}"
        # A move may wait for all processors to have noticed it.
        await asyncio.to_thread(self._place, group, shim, spec.run_limits)
        return group

    def _place(self, group: str, shim: ProcessIdentity, limits: RunLimits) -> None:
        os.mkdir(group)
        try:
            divide(group, shim, limits)
        except OSError:
            cgroups.remove(group)
            raise

    def group_of(self, name: str) -> str:
        """By the name of the run's directory."""
        return f"{self._folder}/{name}"

    async def is_host_stopping(self) -> bool:
        """Nobody says so."""
        return False


def find() -> CgroupPlacement | str:
    """A placement below PID 1's group, or the reason why there is none. Changes nothing."""
    base = group_of_process(1)
    if base is None:
        return "no cgroup v2 is mounted, or not the part in which process 1 is"
    if not os.access(base, os.W_OK):
        return f"{base} is not writable"
    return CgroupPlacement(base)


def find_mount(mountinfo: str) -> tuple[str, str] | None:
    """Where the first cgroup2 is mounted, and which part of it (proc(5), mountinfo); also beside version 1."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if after.startswith("cgroup2 ") and len(fields) > 4:
            return _unescaped(fields[4]), _unescaped(fields[3])
    return None


def group_of_process(pid: int) -> str | None:
    """The path of a process's group; None where no cgroup v2 shows it."""
    mount = find_mount(cgroups.read("/proc/self/mountinfo"))
    path = below(*mount, cgroups.read(f"/proc/{pid}/cgroup")) if mount is not None else None
    return path if path is not None and os.path.isdir(path) else None


def missing_under_root() -> tuple[str, ...]:
    """What is lost where the controllers are not in version 2, or there is no version 2 at all."""
    mount = find_mount(cgroups.read("/proc/self/mountinfo"))
    usable = cgroups.read(f"{mount[0]}/cgroup.controllers").split() if mount is not None else []
    return tuple(text for name, text in _CONTROLLERS.items() if name not in usable)


def divide(group: str, shim: ProcessIdentity, limits: RunLimits) -> None:
    """Make a run's leaves, move its shim into one and limit the other. Raises OSError."""
    available = cgroups.read(f"{group}/cgroup.controllers").split()
    wanted = limit_files(limits)
    # Without a limit as well: by these an OOM kill is told, and the peak is known.
    controllers = [name for name in available if name in wanted or name == "memory"]
    files = {file: value for name in controllers for file, value in wanted.get(name, {}).items()}
    cgroups.make(group, shim.pid, controllers, files)
    if not identity.is_alive(shim):
        raise ProcessLookupError(f"shim {shim.pid} was lost while it was put into its control group")


def limit_files(limits: RunLimits) -> dict[str, dict[str, str]]:
    """For each controller the files that set these limits, and what is written into them."""
    files: dict[str, dict[str, str]] = {}
    if limits.memory_bytes is not None:
        files.setdefault("memory", {})["memory.max"] = str(limits.memory_bytes)
    if limits.swap_bytes is not None:
        files.setdefault("memory", {})["memory.swap.max"] = str(limits.swap_bytes)
    if limits.cpus is not None:
        quota_us = max(round(limits.cpus * _CPU_PERIOD_US), _CPU_QUOTA_MIN_US)
        files.setdefault("cpu", {})["cpu.max"] = f"{quota_us} {_CPU_PERIOD_US}"
    if limits.cpu_weight is not None:
        files.setdefault("cpu", {})["cpu.weight"] = str(limits.cpu_weight)
    if limits.io_weight is not None:
        files["io"] = {"io.weight": f"default {limits.io_weight}"}
    if limits.allowed_cpus is not None:
        files["cpuset"] = {"cpuset.cpus": limits.allowed_cpus}
    if limits.tasks_max is not None:
        files["pids"] = {"pids.max": str(limits.tasks_max)}
    return files


def below(point: str, root: str, cgroup: str) -> str | None:
    """Where the group that a /proc/PID/cgroup names is to be seen, if it is in the part that is mounted."""
    path = next((line[3:] for line in cgroup.splitlines() if line.startswith("0::")), None)
    if path is None or ".." in path.split("/"):
        return None
    inside = path if root == "/" else path.removeprefix(root)
    if root != "/" and (inside == path or not (inside == "" or inside.startswith("/"))):
        return None
    return (point + inside).rstrip("/")


def _usable_controllers(base: str) -> set[str]:
    """Those that groups below can have. A group with processes hands on no others, unless it is the root of all."""
    is_root = not os.path.exists(f"{base}/cgroup.type")
    source = "cgroup.controllers"
    if not is_root and cgroups.read(f"{base}/cgroup.procs").strip():
        source = "cgroup.subtree_control"
    return set(cgroups.read(f"{base}/{source}").split())


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
