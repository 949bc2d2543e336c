"""Runs as transient scopes of systemd, made over D-Bus (org.freedesktop.systemd1(5)); the spawner as a service.

A scope keeps its run apart from the agent's own unit, whose restart would take it along. The spawner is a service of
its own, since whatever is forked from the agent inherits the agent's sandbox. Decides nothing about runs; what systemd
refuses is an error, never a reason to put a run elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from typing import Any, Final

from dbus_fast import BusType, Message, MessageType, Variant
from dbus_fast.aio import MessageBus
from dbus_fast.errors import DBusError

from remotegpu_schemas.attempt import PlacementKind, ProcessIdentity, RunSpec
from remotegpu_sidecar import grouping, spawning
from remotegpu_sidecar.shim import SCOPE_STOP_SIGNAL
from remotegpu_sidecar.spawning import LaunchError, Spawner

SLICE: Final = "remotegpu-tasks.slice"
CALL_TIMEOUT_S: Final = 30.0

_NAME, _PATH = "org.freedesktop.systemd1", "/org/freedesktop/systemd1"
_MANAGER, _PROPERTIES = f"{_NAME}.Manager", "org.freedesktop.DBus.Properties"
_STOP_RESERVE_S: Final = 10.0
_LIMITS: Final = tuple(
    "AS CORE CPU DATA FSIZE MEMLOCK MSGQUEUE NICE NOFILE NPROC RSS RTPRIO RTTIME SIGPENDING STACK".split()  # noqa: SIM905
)
_UNKNOWN_PROPERTY: Final = "org.freedesktop.DBus.Error.PropertyReadOnly"
_BUS_TROUBLE: Final = (OSError, EOFError, DBusError, TimeoutError, ValueError)


class RefusedError(LaunchError):
    """What systemd, or the way to it, said no with; `name` is the D-Bus error's."""

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class Systemd:
    """A connection to PID 1, made anew when it is lost."""

    def __init__(self) -> None:
        self._bus: MessageBus | None = None
        self._connecting = asyncio.Lock()
        self._jobs: dict[str, asyncio.Future[str]] = {}

    async def start_unit(self, name: str, properties: dict[str, Variant], fds: tuple[int, ...] = ()) -> None:
        """Start a transient unit, and return once its job is done. Raises RefusedError."""
        loop = asyncio.get_running_loop()
        done = self._jobs[name] = loop.create_future()
        try:
            body = [name, "fail", [[key, value] for key, value in properties.items()], []]
            await self.call(_MANAGER, "StartTransientUnit", "ssa(sv)a(sa(sv))", body, fds=fds)
            async with asyncio.timeout(CALL_TIMEOUT_S):
                result = await done
        except TimeoutError:
            raise RefusedError(f"systemd did not finish starting {name} within {CALL_TIMEOUT_S:g} s") from None
        finally:
            del self._jobs[name]
        if result != "done":
            raise RefusedError(f"systemd could not start {name}: {result}; `journalctl -u {name}` says more")

    async def main_pid(self, service: str) -> int:
        """The main process of a running service. Raises RefusedError."""
        [path] = await self.call(_MANAGER, "GetUnit", "s", [service])
        [value] = await self.call(_PROPERTIES, "Get", "ss", [f"{_NAME}.Service", "MainPID"], path=path)
        return int(value.value)

    async def call(
        self,
        interface: str,
        member: str,
        signature: str,
        body: list[Any],
        *,
        path: str = _PATH,
        fds: tuple[int, ...] = (),
    ) -> list[Any]:
        """Call a method of systemd's. Raises RefusedError."""
        message = Message(
            destination=_NAME,
            path=path,
            interface=interface,
            member=member,
            signature=signature,
            body=body,
            unix_fds=list(fds),
        )
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                reply = await (await self._connected()).call(message)
        except _BUS_TROUBLE as error:
            raise RefusedError(f"systemd cannot be reached over D-Bus: {error!r}") from error
        if reply.message_type is MessageType.ERROR:
            reason = reply.body[0] if reply.body else "no reason given"
            raise RefusedError(f"systemd refuses {member}: {reason}", reply.error_name or "")
        return list(reply.body)

    async def close(self) -> None:
        """Disconnect. Safe to repeat."""
        bus, self._bus = self._bus, None
        if bus is not None and bus.connected:
            bus.disconnect()
            with contextlib.suppress(*_BUS_TROUBLE):
                await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]  # the library has no types there

    async def _connected(self) -> MessageBus:
        async with self._connecting:
            if self._bus is not None and self._bus.connected:
                return self._bus
            bus = await MessageBus(bus_type=BusType.SYSTEM, negotiate_unix_fd=True).connect()
            bus.add_message_handler(self._on_message)
            match = f"type='signal',sender='{_NAME}',interface='{_MANAGER}',member='JobRemoved'"
            await bus.call(
                Message(
                    destination="org.freedesktop.DBus",
                    path="/org/freedesktop/DBus",
                    interface="org.freedesktop.DBus",
                    member="AddMatch",
                    signature="s",
                    body=[match],
                )
            )
            # Without a subscriber systemd tells nobody about its jobs.
            await bus.call(Message(destination=_NAME, path=_PATH, interface=_MANAGER, member="Subscribe"))
            self._bus = bus
            return bus

    def _on_message(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL and message.member == "JobRemoved" and len(message.body) == 4:
            _id, _job, unit, result = message.body
            done = self._jobs.get(unit)
            if done is not None and not done.done():
                done.set_result(result)


class SystemdPlacement:
    """A scope per run in `remotegpu-tasks.slice`, with a leaf for the shim and one for the task."""

    kind = PlacementKind.SYSTEMD

    def __init__(self, systemd: Systemd) -> None:
        self._systemd = systemd
        self._has_oom_policy = True
        self.missing = grouping.missing_under_root()

    async def start(self) -> None:
        """Systemd makes the slice with the first scope."""

    async def close(self) -> None:
        """Disconnect from systemd."""
        await self._systemd.close()

    async def start_spawner(self, python: str) -> Spawner:
        """As a transient service, whose standard input is the other end of the socket. Raises RefusedError, OSError.

        KillMode=process: what it has forked leaves it for a scope, or ends by itself when the agent is gone.
        """
        name = f"remotegpu-spawner-{os.urandom(6).hex()}.service"
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        argv = spawning.command(python, 0)
        properties = {
            "Description": Variant("s", "Starts the runs of remotegpu-agent"),
            "Type": Variant("s", "exec"),
            "ExecStart": Variant("a(sasb)", [[argv[0], argv, False]]),
            "Environment": Variant("as", [f"{key}={value}" for key, value in spawning.environment().items()]),
            "StandardInputFileDescriptor": Variant("h", 0),
            "StandardOutput": Variant("s", "null"),
            "KillMode": Variant("s", "process"),
            "CollectMode": Variant("s", "inactive-or-failed"),
            **_own_limits(),
        }
        try:
            with contextlib.closing(theirs):
                await self._systemd.start_unit(name, properties, (theirs.fileno(),))
            return Spawner(ours, await self._systemd.main_pid(name))
        except BaseException:
            ours.close()
            raise

    async def place(self, spec: RunSpec, shim: ProcessIdentity) -> str | None:
        """Make the run's scope around its shim, and the leaves in it. Raises RefusedError, OSError."""
        name = scope_name(spec.attempt_id, spec.run_no)
        try:
            await self._systemd.start_unit(name, self._scope(spec, shim))
        except RefusedError as error:
            if error.name != _UNKNOWN_PROPERTY or not self._has_oom_policy:
                raise
            self._has_oom_policy = False  # an older systemd, which has it for services only
            await self._systemd.start_unit(name, self._scope(spec, shim))
        group = grouping.group_of_process(shim.pid)
        if group is None:
            return None
        if not group.endswith(f"/{name}"):
            raise LaunchError(f"systemd says that shim {shim.pid} is in {name}, but it is in {group}")
        await asyncio.to_thread(grouping.divide, group, shim, spec.run_limits)
        return group

    def _scope(self, spec: RunSpec, shim: ProcessIdentity) -> dict[str, Variant]:
        stop_us = round((spec.grace_period_s + _STOP_RESERVE_S) * 1_000_000)
        properties = {
            "Description": Variant("s", f"Run {spec.run_no} of task {spec.task_id} ({spec.attempt_id})"),
            "Slice": Variant("s", SLICE),
            "PIDs": Variant("au", [shim.pid]),
            "Delegate": Variant("b", True),
            "CollectMode": Variant("s", "inactive-or-failed"),
            "KillSignal": Variant("i", SCOPE_STOP_SIGNAL),
            "TimeoutStopUSec": Variant("t", stop_us),
        }
        if self._has_oom_policy:
            properties["OOMPolicy"] = Variant("s", "continue")
        return properties

    def group_of(self, name: str) -> str | None:
        """Systemd removes them itself."""

    async def is_host_stopping(self) -> bool:
        """Whether systemd is on its way to a shutdown or reboot; False if it does not answer."""
        try:
            [state] = await self._systemd.call(_PROPERTIES, "Get", "ss", [_MANAGER, "SystemState"])
        except RefusedError:
            return False
        return bool(state.value == "stopping")


def _own_limits() -> dict[str, Variant]:
    """This process's resource limits (getrlimit(2)) as properties: what holds for the agent holds for its tasks."""
    properties: dict[str, Variant] = {}
    for name in _LIMITS:
        soft, hard = (limit % 2**64 for limit in resource.getrlimit(getattr(resource, f"RLIMIT_{name}")))
        properties |= {f"Limit{name}": Variant("t", hard), f"Limit{name}Soft": Variant("t", soft)}
    return properties


def scope_name(attempt_id: str, run_no: int) -> str:
    """A run's unit. All that an attempt id may hold may stand in a unit's name as it is (systemd.unit(5))."""
    return f"remotegpu-task-{attempt_id}-{run_no}.scope"


async def find() -> SystemdPlacement | str:
    """A placement by systemd, or the reason why there is none. PID 1 must be systemd. Makes no unit."""
    if os.geteuid() != 0:
        return f"systemd lets only root make scopes, and this is uid {os.geteuid()}"
    systemd = Systemd()
    try:
        await systemd.call(_PROPERTIES, "Get", "ss", [_MANAGER, "Version"])
    except RefusedError as error:
        await systemd.close()
        return f"{error}; is the package dbus installed?"
    return SystemdPlacement(systemd)
