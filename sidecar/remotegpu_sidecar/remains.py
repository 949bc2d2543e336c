"""What is left of a run whose shim is gone: found in /proc, killed, verified gone. The agent's side.

The shim's death hands its orphans to init, so descent proves nothing any more. A process belongs to the run if its
environment at exec names attempt and run, if it is the main process on record, if it is in that one's session or in
the run's control group, or if it descends from one of these. Without a control group, one that has cleaned its
environment and left both session and parents is not found.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable, Mapping

from remotegpu_sidecar import cgroups, identity, tree
from remotegpu_sidecar.identity import Stat

ENVIRON_MAX_BYTES = 4 * 1024 * 1024

_PAUSE_FIRST_S, _PAUSE_LAST_S = 0.005, 0.5
_REMOVE_MAX_S = 1.0

RunKey = tuple[str, int]
"""Attempt id and run number."""
NO_GROUPS: Mapping[RunKey, str] = {}


def find(
    runs: Mapping[RunKey, identity.ProcessId | None], groups: Mapping[RunKey, str] = NO_GROUPS
) -> dict[RunKey, list[Stat]]:
    """The living processes of each run, in one look at /proc.

    Values are the main processes, and the paths of the control groups, where they are known.
    """
    processes = [stat for stat in tree.all_processes() if not stat.is_dead and stat.pid != os.getpid()]
    owner: dict[int, RunKey] = {}
    sessions: dict[int, RunKey] = {}
    for key, main in runs.items():
        if main is not None and identity.is_alive(main):
            owner[main.pid] = key
            # Its session has this number as long as it lives itself.
            sessions[main.pid] = key
    for key, group in groups.items():
        owner.update(dict.fromkeys(cgroups.pids(group), key))
    for stat in processes:
        key_found = _key_of(stat.pid) if stat.pid not in owner else None
        if key_found in runs and key_found is not None:
            owner[stat.pid] = key_found
        elif stat.session in sessions:
            owner.setdefault(stat.pid, sessions[stat.session])
    _inherit(processes, owner)
    found: dict[RunKey, list[Stat]] = {key: [] for key in runs}
    for stat in processes:
        if stat.pid in owner:
            found[owner[stat.pid]].append(stat)
    return found


async def kill(
    runs: Mapping[RunKey, identity.ProcessId | None],
    give_up_after_s: float,
    groups: Mapping[RunKey, str] = NO_GROUPS,
) -> dict[RunKey, list[int]]:
    """Kill what is left of these runs, round by round, until /proc shows nothing of them.

    Returns the pids that are still there when the time is up; empty lists are the proof that all are gone.
    """
    loop = asyncio.get_running_loop()
    give_up_at_s = loop.time() + give_up_after_s
    pause_s = _PAUSE_FIRST_S
    while True:
        # /proc may hold thousands of processes: not on the loop.
        try:
            left = await asyncio.to_thread(_kill_round, runs, groups)
        except OSError as error:
            if error.errno not in identity.SCARCE or loop.time() >= give_up_at_s:
                raise
            # Nobody knows who is left. Here nothing is given up: there will be descriptors and memory again.
            await asyncio.sleep(_PAUSE_LAST_S)
            continue
        if not any(left.values()) or loop.time() >= give_up_at_s:
            return left
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, _PAUSE_LAST_S)


async def remove_groups(groups: Iterable[str]) -> None:
    """Remove what is left of the control groups of runs that are over; what somebody is in stays. Safe to repeat."""
    loop = asyncio.get_running_loop()
    give_up_at_s = loop.time() + _REMOVE_MAX_S
    for group in groups:
        # A process leaves its group a moment after its end is known.
        while not _remove(group) and loop.time() < give_up_at_s:  # noqa: ASYNC110 - gives no event
            await asyncio.sleep(_PAUSE_FIRST_S)


def _remove(group: str) -> bool:
    if not group.endswith(".scope"):
        return cgroups.remove(group)
    # The scope itself is systemd's, which removes it when it is empty.
    is_task_gone, is_shim_gone = (cgroups.remove(f"{group}/{leaf}") for leaf in (cgroups.TASK, cgroups.SHIM))
    return is_task_gone and is_shim_gone


def _kill_round(
    runs: Mapping[RunKey, identity.ProcessId | None], groups: Mapping[RunKey, str]
) -> dict[RunKey, list[int]]:
    for group in groups.values():
        cgroups.kill(group)
    left = find(runs, groups)
    for stats in left.values():
        for stat in stats:
            with contextlib.suppress(PermissionError):  # it has become another user; its pid is in the answer
                identity.send_signal(stat.pid, stat.start_ticks, signal.SIGKILL)
    return {key: [stat.pid for stat in stats] for key, stats in left.items()}


def _inherit(processes: Iterable[Stat], owner: dict[int, RunKey]) -> None:
    """Whoever descends from a process of a run belongs to the run."""
    below: dict[int, list[int]] = {}
    for stat in processes:
        below.setdefault(stat.ppid, []).append(stat.pid)
    waiting = list(owner)
    while waiting:
        pid = waiting.pop()
        for child in below.get(pid, ()):
            if child not in owner:
                owner[child] = owner[pid]
                waiting.append(child)


def _key_of(pid: int) -> RunKey | None:
    """Which run a process was started for, by its environment; None for most."""
    attempt_id = run_no = None
    for variable in _environ(pid).split(b"\0"):
        name, _, value = variable.partition(b"=")
        if name == b"REMOTEGPU_ATTEMPT_ID":
            attempt_id = os.fsdecode(value)
        elif name == b"REMOTEGPU_RUN_NUMBER":
            run_no = value
    if attempt_id is None or run_no is None or not run_no.isdigit():
        return None
    return attempt_id, int(run_no)


def _environ(pid: int) -> bytes:
    for path in (f"/proc/{pid}/environ", *_thread_environs(pid)):
        try:
            with open(path, "rb", buffering=0) as file:
                content = file.read(ENVIRON_MAX_BYTES) or b""
        except OSError as error:
            if error.errno in identity.SCARCE:
                raise
            continue  # it has ended, or is another user's
        if content:
            return content
    return b""


def _thread_environs(pid: int) -> Iterable[str]:
    """Asked only when the first thread has none: a kernel thread, or a process whose first thread has ended."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        if thread != str(pid):
            yield f"/proc/{pid}/task/{thread}/environ"
