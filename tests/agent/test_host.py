"""Figures of this very machine, and what is sent where a figure cannot be had."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import uuid
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from remotegpu_agent import host
from remotegpu_schemas.api import SystemInfo
from remotegpu_schemas.limits import GIB, MIB

FIGURES = ("cpu_cores", "memory_total", "memory_free", "disk_total", "disk_free")


def broken(*_: object, **__: object) -> NoReturn:
    """Stands for anything that this system does not tell."""
    raise OSError("not here")


def read(disk_path: Path) -> SystemInfo:
    """The answer for this machine."""
    return host.read_system_info(agent_id="agent-1", machine_id="machine-1", disk_path=disk_path)


async def test_this_machine(tmp_path: Path) -> None:
    """Every field is filled from the real system, without a warning."""
    info = await host.system_info(agent_id="agent-1", machine_id="machine-1", disk_path=tmp_path)
    assert info.warnings == []
    assert info.hostname == socket.gethostname()
    assert info.kernel == os.uname().release
    assert info.cpu_cores == psutil.cpu_count()
    assert info.memory_total == psutil.virtual_memory().total
    assert 0 < info.memory_free <= info.memory_total
    assert info.disk_total == shutil.disk_usage(tmp_path).total
    assert 0 < info.disk_free <= info.disk_total
    assert info.uptime > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", info.boot_time)
    assert len(info.load_average) == 3
    assert (info.gpu_count, info.gpu_info) == (0, [])
    assert (info.agent_id, info.machine_id) == ("agent-1", "machine-1")


def test_figures_are_never_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deployed planes count zeros as "not collected": what cannot be had, or is zero, is sent as 1 with a warning."""
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: None)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.setattr(psutil, "virtual_memory", broken)
    monkeypatch.setattr(os, "sysconf", lambda name: 0)
    monkeypatch.setattr(os, "statvfs", broken)
    info = read(tmp_path)
    for name in FIGURES:
        assert getattr(info, name) == 1
    assert {warning.partition(":")[0] for warning in info.warnings} == set(FIGURES)
    assert "disk_total: cannot be read: not here" in info.warnings


def test_memory_total_has_a_second_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where psutil fails, the C library still knows the memory in all."""
    total = psutil.virtual_memory().total
    monkeypatch.setattr(psutil, "virtual_memory", broken)
    assert abs(read(tmp_path).memory_total - total) < total / 10


def test_names_and_lists_fall_back_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without a name, without interfaces, without boot time still answers."""
    monkeypatch.setattr(socket, "gethostname", lambda: "")
    monkeypatch.setattr("platform.node", lambda: "")
    monkeypatch.setattr("platform.freedesktop_os_release", broken)
    monkeypatch.setattr(psutil, "net_if_addrs", broken)
    monkeypatch.setattr(psutil, "boot_time", broken)
    monkeypatch.setattr(os, "getloadavg", broken)
    info = read(tmp_path)
    assert (info.hostname, info.os, info.ip_addresses, info.boot_time, info.load_average) == (
        "unknown",
        "Linux",
        [],
        "",
        [],
    )
    names = [warning.partition(":")[0] for warning in info.warnings]
    assert names == ["hostname", "os", "ip_addresses", "boot_time", "load_average"]
    assert "set one in /etc/hostname" in info.warnings[0]


def test_the_disk_below_a_directory_that_is_not_made_yet(tmp_path: Path) -> None:
    """The figures are those of the filesystem on which it will be."""
    assert read(tmp_path / "not" / "yet").disk_total == read(tmp_path).disk_total


def test_addresses_leave_out_what_others_cannot_reach() -> None:
    """No loopback, no link-local, no duplicates."""
    addresses = host.ip_addresses()
    assert len(set(addresses)) == len(addresses)
    assert not [text for text in addresses if text.startswith(("127.", "169.254.", "fe80", "::1"))]


async def test_heartbeat_metrics(tmp_path: Path) -> None:
    """`*_gb` are integers (a float there makes a deployed plane refuse the whole heartbeat), percentages 0-100."""
    sampler = host.HostMetrics(tmp_path)
    sum(range(3_000_000))  # spends a tick or two, so that time has passed for the kernel
    metrics = await sampler.heartbeat_metrics()
    assert set(metrics) >= {
        "memory_usage_percent",
        "memory_used_gb",
        "disk_usage_percent",
        "disk_used_gb",
        "gpu_metrics",
    }
    assert metrics["gpu_metrics"] == []
    for name, value in metrics.items():
        if name.endswith("_gb"):
            assert type(value) is int
            assert value >= 0
        if name.endswith("_percent"):
            assert type(value) is float
            assert 0 <= value <= 100
    memory = psutil.virtual_memory()
    used = metrics["memory_used_gb"]
    assert isinstance(used, int)
    assert abs(used - (memory.total - memory.available) / GIB) < 2


def test_metrics_leave_out_what_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No zeros, no nulls: the keys are missing."""
    sampler = host.HostMetrics(tmp_path)
    monkeypatch.setattr(psutil, "cpu_times", broken)
    monkeypatch.setattr(psutil, "virtual_memory", broken)
    monkeypatch.setattr(psutil, "disk_usage", broken)
    assert sampler.read() == {"gpu_metrics": []}


@pytest.mark.parametrize(
    ("before", "after", "percent"),
    [
        ({"user": 10, "idle": 90}, {"user": 35, "idle": 165}, 25.0),
        ({"user": 0, "idle": 0, "iowait": 0}, {"user": 1, "idle": 1, "iowait": 2}, 25.0),
        ({"user": 0, "idle": 0, "guest": 0}, {"user": 50, "idle": 50, "guest": 40}, 50.0),
        ({"user": 5, "idle": 5}, {"user": 5, "idle": 5}, None),
        ({"user": 9, "idle": 5}, {"user": 8, "idle": 6}, 0.0),
        (None, {"user": 1}, None),
        ({"user": 1}, None, None),
    ],
)
def test_processor_percentage(
    before: dict[str, float] | None, after: dict[str, float] | None, percent: float | None
) -> None:
    """Waiting for disks is idle, guests are not counted twice, counters that go back do no harm."""
    assert host.busy_percent(before, after) == (None if percent is None else pytest.approx(percent, abs=0.1))


def test_the_machine_id_is_what_systemd_derives() -> None:
    """The same id as `systemd-id128 machine-id --app-specific` gives, which is an independent implementation."""
    program = shutil.which("systemd-id128")
    if program is None or host.derived_machine_id() is None:
        pytest.skip("no systemd-id128 or no /etc/machine-id here; the next test has systemd's own test value")
    answer = subprocess.run(
        [program, "machine-id", f"--app-specific={host.APPLICATION_ID.hex}"], capture_output=True, text=True, check=True
    )
    assert host.derived_machine_id() == answer.stdout.strip()


def test_systemds_own_test_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value that systemd's src/test/test-id128.c expects of sd_id128_get_app_specific."""
    path = tmp_path / "machine-id"
    path.write_text("51df0b4bc3b04c9780e299b98ca373b8\n")
    monkeypatch.setattr(host, "APPLICATION_ID", uuid.UUID("f03daaeb1c334b43a732172944bf772e"))
    assert host.derived_machine_id(path) == "1dee5954e75c4d6fb96cc6c04ca18a86"


def test_the_machine_id_is_stable(tmp_path: Path) -> None:
    """A fixed machine id gives a fixed id (a change would re-enrol a whole fleet), which does not contain it."""
    path = tmp_path / "machine-id"
    path.write_text("51df0b4bc3b04c9780e299b98ca373b8\n")
    assert host.derived_machine_id(path) == "5f75a5cb3c904e1f9cb0372a9eea2286"


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\n",
        b"uninitialized\n",
        b"51df0b4b",
        b"0" * 32,
        b"zz" * 16,
        b"51df0b4bc3b04c9780e299b98ca373b8ff",
        b"\xff\xfe",
    ],
)
def test_a_machine_without_an_id(tmp_path: Path, content: bytes | None) -> None:
    """A missing, empty, unfinished or odd file gives None; the caller makes a random one and keeps it."""
    path = tmp_path / "machine-id"
    if content is not None:
        path.write_bytes(content)
    assert host.derived_machine_id(path) is None


def test_random_machine_ids() -> None:
    """They have the same form and differ."""
    first, second = host.random_machine_id(), host.random_machine_id()
    assert re.fullmatch(r"[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}", first)
    assert first != second


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "50000 100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "25000", "cpu/cpu.cfs_period_us": "100000"}, 0.25),
        ({"cpu.max": "nonsense"}, None),
        ({"cpu.max": "99900000 100000"}, None),
    ],
)
def test_cpus_within_a_containers_quota(tmp_path: Path, files: dict[str, str], cpus: float | None) -> None:
    """A quota below what the process may use counts, of either cgroup version; no quota means all."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert host.total_cpus(tmp_path) == (cpus or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("files", "memory_mb"),
    [
        ({}, None),
        ({"memory.max": "max"}, None),
        ({"memory.max": str(64 * MIB)}, 64),
        ({"memory/memory.limit_in_bytes": str(32 * MIB)}, 32),
        ({"memory/memory.limit_in_bytes": str(0x7FFFFFFFFFFFF000)}, None),
    ],
)
def test_memory_within_a_containers_limit(tmp_path: Path, files: dict[str, str], memory_mb: int | None) -> None:
    """As for CPUs."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert host.total_memory_mb(tmp_path) == (memory_mb or psutil.virtual_memory().total // MIB)
