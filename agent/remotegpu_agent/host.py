"""What this machine is and how busy it is: system information, heartbeat metrics, capacity, and its id.

Figures come from psutil and are blocking reads: the async functions put them on a thread. GPUs are not this
module's subject. It must not know who asks, nor the wire's dialects.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import hmac
import ipaddress
import math
import os
import platform
import secrets
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

import psutil

from remotegpu_agent import VERSION
from remotegpu_schemas.api import SystemInfo
from remotegpu_schemas.limits import GIB, MIB

ValueT = TypeVar("ValueT")

APPLICATION_ID: Final = uuid.UUID("6f1c1a52-0f0a-4a1e-9a9c-7c1d2f0d5b43")
"""Names this program when a machine id is derived; changing it changes the id of every machine."""

MACHINE_ID_PATH: Final = Path("/etc/machine-id")
CGROUP_ROOT: Final = Path("/sys/fs/cgroup")

_UNREADABLE: Final = (OSError, psutil.Error, RuntimeError, ValueError, LookupError, AttributeError)
"""What psutil and the standard library raise where /proc or /sys does not say it (containers hide parts of both)."""

_DEFAULT_ROUTE_PROBES: Final = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Documentation addresses (RFC 5737, RFC 3849): connecting a datagram socket sends nothing and shows our own."""


async def system_info(*, agent_id: str, machine_id: str, disk_path: Path) -> SystemInfo:
    """The answer of GET /system/info without GPUs; disk figures are those of the filesystem below `disk_path`.

    Never raises because a figure cannot be had: `warnings` says which and why. CPU, memory and disk figures are at
    least 1, because deployed control planes count zeros as "not collected".
    """
    return await asyncio.to_thread(read_system_info, agent_id=agent_id, machine_id=machine_id, disk_path=disk_path)


def read_system_info(*, agent_id: str, machine_id: str, disk_path: Path) -> SystemInfo:
    """As `system_info`, blocking."""
    warnings: list[str] = []

    def figure(name: str, read: Callable[[], int]) -> int:
        value = _read(warnings, name, read, 0)
        if value <= 0 and not any(warning.startswith(f"{name}:") for warning in warnings):
            warnings.append(f"{name}: the system says {value}; sent as 1, because 0 means not collected")
        return max(1, value)

    def disk(name: str, read: Callable[[os.statvfs_result], int]) -> int:
        return figure(name, lambda: read(os.statvfs(_existing(disk_path))))

    return SystemInfo(
        hostname=_read(warnings, "hostname", hostname, "unknown"),
        os=_read(warnings, "os", lambda: platform.freedesktop_os_release()["PRETTY_NAME"], "Linux"),
        kernel=platform.release() or "unknown",
        cpu_cores=figure("cpu_cores", lambda: psutil.cpu_count(logical=True) or os.cpu_count() or 0),
        memory_total=figure("memory_total", _memory_total_bytes),
        memory_free=figure("memory_free", lambda: int(psutil.virtual_memory().available)),
        disk_total=disk("disk_total", lambda stat: stat.f_blocks * stat.f_frsize),
        disk_free=disk("disk_free", lambda stat: stat.f_bavail * stat.f_frsize),
        gpu_count=0,
        gpu_info=[],
        uptime=_read(warnings, "uptime", lambda: int(time.clock_gettime(time.CLOCK_BOOTTIME)), 0),
        agent_id=agent_id,
        machine_id=machine_id,
        agent_version=VERSION,
        architecture=platform.machine() or "unknown",
        ip_addresses=_read(warnings, "ip_addresses", ip_addresses, []),
        boot_time=_read(warnings, "boot_time", lambda: _rfc3339(psutil.boot_time()), ""),
        load_average=_read(warnings, "load_average", lambda: [round(load, 2) for load in os.getloadavg()], []),
        warnings=warnings,
    )


class HostMetrics:
    """The `metrics` of a heartbeat. The processor percentage is the mean since the call before."""

    def __init__(self, disk_path: Path) -> None:
        self._disk_path = disk_path
        self._cpu_times = _cpu_times()

    async def heartbeat_metrics(self) -> dict[str, object]:
        """Percentages as floats, `*_gb` as integers (GiB, rounded down), as protocol.md section 1 asks.

        What cannot be had is left out.
        """
        return await asyncio.to_thread(self.read)

    def read(self) -> dict[str, object]:
        """As `heartbeat_metrics`, blocking; not safe to call from two threads at once."""
        metrics: dict[str, object] = {"gpu_metrics": []}
        metrics |= self._cpu()
        for name, read in (("memory", _memory_metrics), ("disk", lambda: _disk_metrics(self._disk_path))):
            nothing: dict[str, object] = {}
            metrics |= _read([], name, read, nothing)
        return metrics

    def _cpu(self) -> dict[str, object]:
        before, self._cpu_times = self._cpu_times, _cpu_times()
        percent = busy_percent(before, self._cpu_times)
        return {} if percent is None else {"cpu_usage_percent": percent}


def busy_percent(before: Mapping[str, float] | None, after: Mapping[str, float] | None) -> float | None:
    """The share of time, 0-100, in which the processors were busy between two readings; None where that is unknown.

    Guest time is part of user time already (proc_stat(5)) and is not counted twice.
    """
    if before is None or after is None:
        return None
    spent = {name: max(0.0, after[name] - before[name]) for name in after if name in before}
    total = sum(spent.values()) - spent.get("guest", 0.0) - spent.get("guest_nice", 0.0)
    if total <= 0:
        return None
    idle = spent.get("idle", 0.0) + spent.get("iowait", 0.0)
    return round(min(100.0, max(0.0, 100.0 * (total - idle) / total)), 1)


def derived_machine_id(machine_id_path: Path = MACHINE_ID_PATH) -> str | None:
    """The machine's id, 32 hexadecimal digits: the same after a reinstallation of the agent, and no way back.

    As sd_id128_get_machine_app_specific(3): HMAC-SHA256 of the application id, keyed by /etc/machine-id, which
    machine-id(5) asks to keep confidential. None when that file is missing, empty or not an id (a container, a first
    boot): the caller then makes one with `random_machine_id` and stores it.
    """
    try:
        key = bytes.fromhex(machine_id_path.read_text("ascii").strip())
    except (OSError, ValueError):
        return None
    if len(key) != 16 or not any(key):
        return None
    return _as_uuid4(hmac.new(key, APPLICATION_ID.bytes, hashlib.sha256).digest()[:16])


def random_machine_id() -> str:
    """A new id in the same form, for a machine that has none of its own."""
    return _as_uuid4(secrets.token_bytes(16))


def hostname() -> str:
    """The name of this host; raises OSError when nothing knows one."""
    name = socket.gethostname() or platform.node()
    if not name:
        raise OSError("the host has no name; set one in /etc/hostname")
    return name


def ip_addresses() -> list[str]:
    """The addresses that others may reach this host by, that of the default route first; no loopback, no link-local."""
    found = {
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6) and _is_reachable(address.address)
    }
    first = [address for address in map(_default_route_address, _DEFAULT_ROUTE_PROBES) if address in found]
    return first + sorted(found.difference(first), key=lambda text: (":" in text, text))


def total_cpus(cgroup_root: Path = CGROUP_ROOT) -> float:
    """The CPUs that tasks may share: those this process may run on, less where a container's quota says so."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota = _cpu_quota(cgroup_root)
    return allowed if quota is None else min(allowed, quota)


def total_memory_mb(cgroup_root: Path = CGROUP_ROOT) -> int:
    """The memory (MiB) that tasks may share: the machine's, or a container's limit where that is lower."""
    limits = [_memory_total_bytes()]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _text(cgroup_root / name)
        if text.isdigit() and int(text) > 0:
            limits.append(int(text))
    return max(1, min(limits) // MIB)


def _cpu_quota(cgroup_root: Path) -> float | None:
    """The quota in CPUs at the root of the mounted hierarchy: a container's own; a real root has none.

    The agent's own unit is not looked at: tasks run beside it, in a slice of their own.
    """
    words = _text(cgroup_root / "cpu.max").split()
    if not words:
        words = [_text(cgroup_root / "cpu/cpu.cfs_quota_us"), _text(cgroup_root / "cpu/cpu.cfs_period_us")]
    if len(words) == 2 and all(word.isdigit() and int(word) > 0 for word in words):
        return int(words[0]) / int(words[1])
    return None


def _read(warnings: list[str], name: str, read: Callable[[], ValueT], fallback: ValueT) -> ValueT:
    try:
        return read()
    except _UNREADABLE as error:
        warnings.append(f"{name}: cannot be read: {str(error) or type(error).__name__}")
        return fallback


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except (OSError, ValueError):
        return ""


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that exists (the state directory may not be made yet)."""
    return next((candidate for candidate in (path, *path.parents) if candidate.exists()), Path("/"))


def _memory_total_bytes() -> int:
    try:
        return int(psutil.virtual_memory().total)
    except _UNREADABLE:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory_metrics() -> dict[str, object]:
    memory = psutil.virtual_memory()
    used = memory.total - memory.available
    return {"memory_usage_percent": _percent(used, memory.total), "memory_used_gb": int(used // GIB)}


def _disk_metrics(path: Path) -> dict[str, object]:
    disk = psutil.disk_usage(str(_existing(path)))
    return {"disk_usage_percent": float(disk.percent), "disk_used_gb": int(disk.used // GIB)}


def _percent(part: float, whole: float) -> float:
    percent = 100.0 * part / whole if whole > 0 else 0.0
    return round(percent, 1) if math.isfinite(percent) else 0.0


def _cpu_times() -> dict[str, float] | None:
    try:
        return {name: float(value) for name, value in psutil.cpu_times()._asdict().items()}
    except _UNREADABLE:
        return None


def _rfc3339(wall_s: float) -> str:
    return datetime.datetime.fromtimestamp(wall_s, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _as_uuid4(raw: bytes) -> str:
    """Version and variant bits as systemd sets them, so that the id is a valid random UUID."""
    data = bytearray(raw)
    data[6] = (data[6] & 0x0F) | 0x40
    data[8] = (data[8] & 0x3F) | 0x80
    return data.hex()


def _is_reachable(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_link_local or address.is_unspecified)


def _default_route_address(probe: tuple[socket.AddressFamily, str]) -> str:
    family, remote = probe
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((remote, 9))
            return str(sock.getsockname()[0])
    except OSError:
        return ""
