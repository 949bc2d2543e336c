"""What is asked of systemd for a run; that the real one does it is proven in the test bed (tests/system)."""

from __future__ import annotations

import os
import resource
import signal

import pytest
from dbus_fast import Variant

from remotegpu_sidecar import grouping
from remotegpu_sidecar.scopes import RefusedError, Systemd, SystemdPlacement, scope_name
from remotegpu_sidecar.spawning import LaunchError
from tests.sidecar.support import identity_of, make_spec


class Recorded(Systemd):
    """Takes every unit, but for properties that it does not know."""

    def __init__(self, *unknown: str, refusal: str = "") -> None:
        super().__init__()
        self.asked: list[tuple[str, dict[str, Variant]]] = []
        self._unknown = unknown
        self._refusal = refusal

    async def start_unit(self, name: str, properties: dict[str, Variant], fds: tuple[int, ...] = ()) -> None:
        """Note it."""
        self.asked.append((name, properties))
        if self._refusal:
            raise RefusedError(self._refusal, "org.freedesktop.systemd1.UnitMasked")
        if set(self._unknown) & set(properties):
            raise RefusedError("Cannot set property", "org.freedesktop.DBus.Error.PropertyReadOnly")


def no_group(_pid: int) -> None:
    """A host without version 2."""


async def test_scope_is_delegated_and_stops_by_a_signal_that_tasks_ignore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the shim, in the slice, with more time to stop than the task's grace."""
    monkeypatch.setattr(grouping, "group_of_process", no_group)
    systemd, shim = Recorded(), identity_of(os.getpid())
    spec = make_spec("true", grace_period_s=30)
    assert await SystemdPlacement(systemd).place(spec, shim) is None
    [(name, properties)] = systemd.asked
    assert name == scope_name(spec.attempt_id, 1) == f"remotegpu-task-{spec.attempt_id}-1.scope"
    asked = {key: value.value for key, value in properties.items()}
    assert asked.pop("Description").startswith("Run 1 of task task")
    assert asked == {
        "Slice": "remotegpu-tasks.slice",
        "PIDs": [shim.pid],
        "Delegate": True,
        "CollectMode": "inactive-or-failed",
        "KillSignal": signal.SIGWINCH,
        "TimeoutStopUSec": 40_000_000,
        "OOMPolicy": "continue",
    }


async def test_the_spawner_has_the_agents_resource_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft and hard, as the operator has set them for the agent: a service of its own would have systemd's defaults."""
    systemd = Recorded(refusal="enough")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        with pytest.raises(RefusedError, match="enough"):
            await SystemdPlacement(systemd).start_spawner("python3")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    [(_, properties)] = systemd.asked
    assert (properties["LimitNOFILESoft"].value, properties["LimitNOFILE"].value) == (soft - 1, hard)
    core_hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    assert properties["LimitCORE"].value == (2**64 - 1 if core_hard == resource.RLIM_INFINITY else core_hard)


async def test_older_systemd_is_not_asked_again_for_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first scope is asked for twice, later ones once."""
    monkeypatch.setattr(grouping, "group_of_process", no_group)
    systemd, shim = Recorded("OOMPolicy"), identity_of(os.getpid())
    placement = SystemdPlacement(systemd)
    for run_no in (1, 2):
        await placement.place(make_spec("true", run_no=run_no), shim)
    assert ["OOMPolicy" in properties for _, properties in systemd.asked] == [True, False, False]


async def test_refusal_is_an_error_at_once() -> None:
    """No second try, and no other place."""
    systemd = Recorded(refusal="Unit remotegpu-tasks.slice is masked.")
    with pytest.raises(LaunchError, match="is masked"):
        await SystemdPlacement(systemd).place(make_spec("true"), identity_of(os.getpid()))
    assert len(systemd.asked) == 1


async def test_scope_that_did_not_take_the_shim_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What systemd says is checked: a run that stayed in the agent's group would go with its restart."""
    monkeypatch.setattr(
        grouping, "group_of_process", lambda _pid: "/sys/fs/cgroup/system.slice/remotegpu-agent.service"
    )
    with pytest.raises(LaunchError, match=r"but it is in .*remotegpu-agent.service"):
        await SystemdPlacement(Recorded()).place(make_spec("true"), identity_of(os.getpid()))
