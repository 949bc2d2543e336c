"""F24, F25: the state directory's disk, a small one of its own, is full at a start or later, or turns read-only."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from remotegpu_schemas.limits import MIB
from tests.end_to_end.agent_process import AgentProcess
from tests.end_to_end.fleet import fleet
from tests.end_to_end.gates import Gate
from tests.waiting import DEADLINE_S, until, until_so

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")

KINDS = ["admission", "store"]
"""Who notices first: the look at what is free, or the write that fails."""


class SmallDisk:
    """A file system of 8 MiB, which a file can fill."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ballast = directory / "ballast"

    def fill(self) -> None:
        """Leave not a byte."""
        with self._ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def empty(self) -> None:
        """Make room again."""
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """Mounted, and gone afterwards."""
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)], check=True)
    yield SmallDisk(directory)
    subprocess.run(["umount", "--lazy", str(directory)], check=True)


def settings(disk: SmallDisk | LockableDisk, kind: str = "admission") -> dict[str, Any]:
    """An agent on the small disk."""
    floors = {"disk_free_gb": 0.001 if kind == "admission" else 0, "inodes_free": 0}
    return {"agent": {"state_dir": str(disk.directory / "state")}, "admission": floors}


async def serves(host: AgentProcess) -> None:
    """Until this process answers, though it may have had no room to say where."""

    async def answers() -> bool:
        assert host.is_running, host.log.read_text()[-3000:]
        with contextlib.suppress(OSError, aiohttp.ClientError):
            return (await host.call("GET", "/ping"))[0] == 200
        return False

    await until(answers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "stopped"])
async def test_f24_a_restart_on_a_full_disk(tmp_path: Path, disk: SmallDisk, kind: str, is_killed: bool) -> None:
    """F24: it starts, adopts what runs and keeps its lease, refuses more with a reason, and recovers by itself."""
    gate = Gate(tmp_path / "gate")
    async with fleet(tmp_path, settings(disk, kind), is_started=False) as all_of_it:
        host = all_of_it.host
        host.state_dir = disk.directory / "state"
        await host.start()
        [claimed] = await all_of_it.submit({"command": f"echo precious; {gate.wait}"})
        before = await host.wait_running(claimed)
        await host.until_shown(f"/tasks/{claimed}/logs", lambda log: log["text"] == "precious\n")
        if is_killed:
            await host.kill()
        else:
            await host.stop()
        disk.fill()
        await host.start(until_ready=False)
        await serves(host)
        assert (await host.get(f"/tasks/{claimed}"))["process_id"] == before["process_id"]
        status, body = await host.call("POST", "/tasks", data='{"task": {"id": "late", "command": "true"}}')
        assert status == 503, body
        assert ("of the state directory's disk are free" if kind == "admission" else "full") in body["message"]
        gate.open()
        await until_so(lambda: not Path(f"/proc/{before['process_id']}").exists())
        assert (await host.get(f"/tasks/{claimed}"))["state"] == "running"  # its end has no room yet
        disk.empty()
        [task] = await all_of_it.ended([claimed])
        assert (task["status"], task["result"]["stdout"]) == ("completed", "precious\n")

        async def is_taken() -> bool:
            return (await host.call("POST", "/tasks", data='{"task": {"id": "late", "command": "true"}}'))[0] == 200

        await until(is_taken)
        assert (await host.wait_for("late"))["state"] == "completed"
        await until_so((host.state_dir / "endpoints.json").exists)
        await host.wait_ready()


async def test_f24_a_disk_that_fills_up_while_the_agent_runs(tmp_path: Path, disk: SmallDisk) -> None:
    """F24: what runs goes on, nothing is claimed and the plane is told why; with room everything goes on."""
    gate = Gate(tmp_path / "gate")
    polls = {"control_plane": {"heartbeat_interval": 0.2, "long_poll": 0, "poll_interval": 0.1}}
    async with fleet(tmp_path, settings(disk) | polls, is_started=False) as all_of_it:
        host, faults = all_of_it.host, all_of_it.plane.faults
        host.state_dir = disk.directory / "state"
        await host.start()
        [running] = await all_of_it.submit({"command": f"{gate.wait}; exit 5"})
        await host.wait_running(running)
        disk.fill()

        async def is_told() -> bool:
            return any(
                "MiB of the state directory's disk" in why for why in (await host.get("/queue/status"))["reasons"]
            )

        await until(is_told)
        await faults.wait_calls("heartbeat", faults.calls["heartbeat"] + 2, DEADLINE_S)  # no claim is on its way now
        claims = faults.calls["claim"]
        [waiting] = await all_of_it.submit({"command": "true"})
        await faults.wait_calls("heartbeat", faults.calls["heartbeat"] + 2, DEADLINE_S)
        assert faults.calls["claim"] == claims
        assert (await all_of_it.operator.task(waiting))["status"] == "pending"
        told = await all_of_it.heartbeat()
        assert (told["state"], ["of the state directory's disk" in why for why in told["reasons"]]) == (
            "degraded",
            [True],
        )
        gate.open()
        disk.empty()
        [first, second] = await all_of_it.ended([running, waiting])
        assert (first["result"]["exit_code"], second["status"]) == (5, "completed")


class LockableDisk:
    """A file system of 32 MiB that turns read-only under open files, and can be written again.

    A real remount is refused while anything is open for writing, and one that an error has turned read-only stays so
    until nobody uses it. So a read-only mount of the same disk lies over it: what is opened is refused as read-only.
    What is open already is made immutable: each write is refused. (But for SQLite's shared memory, which is no data.)
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def lock(self) -> None:
        """Nothing can be written any more."""
        self._mark("+i")
        _run("mount", "--bind", str(self.directory), str(self.directory))
        _run("mount", "-o", "remount,ro,bind", str(self.directory))
        with pytest.raises(OSError, match="Read-only file system"):
            (self.directory / "new").touch()

    def unlock(self) -> None:
        """As before."""
        _run("umount", str(self.directory))
        self._mark("-i")

    def _mark(self, change: str) -> None:
        for parent, _, names in os.walk(self.directory):
            paths = [Path(parent), *(Path(parent) / name for name in names)]
            marked = [str(path) for path in paths if path.name[-4:] != "-shm" and (path.is_dir() or path.is_file())]
            _run("chattr", change, *marked)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True)


@pytest.fixture
def lockable(tmp_path: Path) -> Iterator[LockableDisk]:
    """Mounted, and gone afterwards."""
    if shutil.which("mkfs.ext4") is None or shutil.which("chattr") is None:
        pytest.skip("needs mkfs.ext4 and chattr")
    image, directory = tmp_path / "image", tmp_path / "lockable"
    directory.mkdir()
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    _run("mkfs.ext4", "-q", "-F", str(image))
    _run("mount", "-o", "loop", str(image), str(directory))
    yield LockableDisk(directory)
    _run("umount", "--recursive", "--lazy", str(directory))


async def test_f25_a_disk_that_turns_read_only_while_the_agent_runs(tmp_path: Path, lockable: LockableDisk) -> None:
    """F25: the task goes on, more is refused with a reason; once writing is possible its end is told and more taken."""
    gate, later = Gate(tmp_path / "gate"), Gate(tmp_path / "later")
    async with fleet(tmp_path, settings(lockable, "store"), is_started=False) as all_of_it:
        host = all_of_it.host
        host.state_dir = lockable.directory / "state"
        await host.start()
        alive = tmp_path / "alive"
        [claimed] = await all_of_it.submit(
            {"command": f"echo precious; {gate.wait}; touch {alive}; {later.wait}; exit 5"}
        )
        before = await host.wait_running(claimed)
        await host.until_shown(f"/tasks/{claimed}/logs", lambda log: log["text"] == "precious\n")
        lockable.lock()
        status, body = await host.call("POST", "/tasks", data='{"task": {"id": "late", "command": "true"}}')
        assert (status, "read-only" in body["message"] or "cannot be written" in body["message"]) == (503, True), body
        await host.until_shown(
            "/queue/status", lambda status: [block["kind"] for block in status["blocks"]] == ["disk_read_only"]
        )
        [waiting] = await all_of_it.submit({"command": "true"})
        gate.open()
        await until_so(alive.exists)
        later.open()
        await until_so(lambda: not Path(f"/proc/{before['process_id']}").exists())
        assert (await host.get(f"/tasks/{claimed}"))["state"] == "running"  # its end cannot be stored yet
        lockable.unlock()
        [task, second] = await all_of_it.ended([claimed, waiting])
        assert (task["result"]["exit_code"], task["result"]["stdout"]) == (5, "precious\n")
        assert second["status"] == "completed"

        async def is_taken() -> bool:
            return (await host.call("POST", "/tasks", data='{"task": {"id": "late", "command": "true"}}'))[0] == 200

        await until(is_taken)
        assert (await host.wait_for("late"))["state"] == "completed"
