"""Where runs are put: a systemd scope each, a bare control group each, or nowhere in particular.

`choose` takes the best that this host offers and says in sentences what is lost with it; `doctor` shows the same. It
changes nothing: what a placement needs it makes when it is started.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Protocol

from remotegpu_schemas.attempt import PlacementKind, ProcessIdentity, RunSpec
from remotegpu_schemas.errors import Misconfigured
from remotegpu_sidecar import grouping
from remotegpu_sidecar.spawning import Spawner, start_child

if TYPE_CHECKING:
    from remotegpu_sidecar.scopes import SystemdPlacement

NO_GROUPS: Final = (
    "memory_gb is not enforced, and an OOM kill is not told from another SIGKILL",
    "cpus is not enforced",
    "the number of a run's processes is not bounded: a fork bomb is stopped by its timeout, or by 'cancel'",
    "when a shim is killed, processes of its run that have left session, parents and environment are not found",
)
NO_SCOPES: Final = "runs belong to the agent's own unit: only KillMode=process there lets them survive its restart"


class Placement(Protocol):
    """What a launcher wants of a placement. `missing` are sentences on what is lost with it."""

    @property
    def kind(self) -> PlacementKind: ...
    @property
    def missing(self) -> tuple[str, ...]: ...

    async def start(self) -> None:
        """Make what all runs share. Raises OSError."""

    async def close(self) -> None:
        """Let go of everything; runs stay where they are. Safe to repeat."""

    async def start_spawner(self, python: str) -> Spawner:
        """Start a spawner whose shims are not bound to the agent's life. Raises LaunchError, OSError."""
        ...

    async def place(self, spec: RunSpec, shim: ProcessIdentity) -> str | None:
        """Put a shim that waits for its go where the run belongs. Returns the path of the run's control group.

        The group has its leaves and limits by then. Raises LaunchError, OSError.
        """
        ...

    def group_of(self, name: str) -> str | None:
        """The control group that the run of this directory has or had, if nobody else removes it."""

    async def is_host_stopping(self) -> bool:
        """Whether the host is being shut down, as far as that can be known: then nobody asked a run to stop."""
        ...


class ProcessGroupPlacement:
    """Runs stay where their spawner is; a run's processes are told by descent alone."""

    kind = PlacementKind.PROCESS_GROUP

    def __init__(self, missing: tuple[str, ...] = NO_GROUPS) -> None:
        self.missing = missing

    async def start(self) -> None:
        """Nothing is shared."""

    async def close(self) -> None:
        """Nothing is held."""

    async def start_spawner(self, python: str) -> Spawner:
        """As a child of the agent."""
        return start_child(python)

    async def place(self, spec: RunSpec, shim: ProcessIdentity) -> str | None:
        """It stays where it is."""

    def group_of(self, name: str) -> str | None:
        """There are no groups."""

    async def is_host_stopping(self) -> bool:
        """Nobody says so."""
        return False


async def choose(wanted: PlacementKind = PlacementKind.AUTO) -> Placement:
    """The placement that is wanted, or for `auto` the best that is possible, not started yet.

    Raises Misconfigured when what is wanted is not possible here.
    """
    is_systemd = _is_systemd_booted()
    reasons: list[str] = []
    if wanted in {PlacementKind.AUTO, PlacementKind.SYSTEMD}:
        scope_placement = await _find_scopes() if is_systemd else "process 1 is not systemd"
        if not isinstance(scope_placement, str):
            return scope_placement
        reasons.append(f"no scopes: {scope_placement}")
    if wanted in {PlacementKind.AUTO, PlacementKind.CGROUP}:
        reason = "systemd owns the control groups of this host" if is_systemd else ""
        found = reason or grouping.find()
        if not isinstance(found, str):
            return found
        reasons.append(f"no control groups: {found}")
    if wanted not in {PlacementKind.AUTO, PlacementKind.PROCESS_GROUP}:
        raise Misconfigured(f"tasks.placement: {wanted} is not possible here; {reasons[-1]}")
    if is_systemd:
        reasons.append(NO_SCOPES)
    return ProcessGroupPlacement((*reasons, *NO_GROUPS))


def _is_systemd_booted() -> bool:
    """Whether PID 1 is systemd (sd_booted(3))."""
    return os.path.isdir("/run/systemd/system")


async def _find_scopes() -> SystemdPlacement | str:
    from remotegpu_sidecar import scopes  # noqa: PLC0415 - a D-Bus library is for those who have systemd

    return await scopes.find()
