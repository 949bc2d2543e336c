"""`remotegpu-agent run` with something wrong: exit code 2, one message that says what to do, nothing half-done."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.agent_process import AgentProcess, agent
from tests.waiting import DEADLINE_S


@pytest.fixture
def host(tmp_path: Path) -> AgentProcess:
    """An agent that has not been started; its config is good."""
    return AgentProcess(tmp_path, {})


async def refusal(host: AgentProcess, *flags: str, reaches_database: bool = False) -> str:
    """What a start says that is refused. All it may leave of itself is a database that the next start takes."""
    before = _entries(host.state_dir)
    tried = await asyncio.to_thread(
        subprocess.run,
        host.command("run", *flags),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert tried.returncode == 2, tried.stderr
    assert tried.stdout == ""
    assert "Traceback" not in tried.stderr
    assert "mistake in this program" not in tried.stderr
    if not reaches_database:
        assert _entries(host.state_dir) == before
    assert not (host.state_dir / "endpoints.json").exists()
    assert not host.socket.is_socket()
    return tried.stderr.partition("remotegpu-agent: ")[2]


def _entries(directory: Path) -> list[str]:
    return sorted(os.listdir(directory)) if directory.is_dir() else []


def change_config(host: AgentProcess, **sections: dict[str, Any]) -> None:
    """Lay these keys over the agent's config file."""
    config = json.loads(host.config.read_text())
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    host.config.write_text(json.dumps(config))


async def works(host: AgentProcess) -> None:
    """A start with the good config on the same state directory runs a task."""
    async with agent(host.directory) as good:
        assert (await good.wait_for(await good.submit(command="true")))["state"] == "completed"


async def test_an_unknown_key_is_named_with_its_place_and_the_nearest_one(host: AgentProcess) -> None:
    """A typing mistake in the file is shown with line, column and what was meant."""
    change_config(host, capacity={"max_concurent": 4})
    message = await refusal(host)
    assert message.startswith(f"{host.config}:1:")
    assert "unknown key 'max_concurent' in 'capacity'; did you mean 'max_concurrent'?" in message


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("api.listen=127.0.0.1:99999", "'api.listen' must be ADDRESS:PORT with a port from 0 to 65535; write for"),
        ("api.listen=localhost", "'api.listen' must be ADDRESS:PORT with a port from 0 to 65535; write for"),
        ("api.listen=0.0.0.0:0", "'api.listen' is reachable from other hosts: name the accepted tokens in"),
        ("control_plane.url=plane:8443", "'control_plane.url' must be a URL with http or https and a host; write for"),
        ("control_plane.url=//plane", "'control_plane.url' must be a URL with http or https and a host; write for"),
    ],
)
async def test_a_value_that_cannot_be_is_named_with_its_origin(host: AgentProcess, flag: str, message: str) -> None:
    """A port above the range, an address without one, a URL without a scheme: the flag, the rule, an example."""
    key = flag.partition("=")[0]
    assert (await refusal(host, "--set", flag)).startswith(f"--set {key}: {message}")
    assert not host.state_dir.exists()


async def test_a_busy_port_is_refused_and_a_free_one_works_afterwards(host: AgentProcess) -> None:
    """Somebody else listens there: the message names the address, and 0 as the way out."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        message = await refusal(host, "--set", f"api.listen={listen}", reaches_database=True)
    assert message == (
        f"api.listen: {listen} is in use by another program; stop it, or set another port (0 picks a free one)\n"
    )
    await works(host)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("/proc/remotegpu-agent", "agent.state_dir: cannot write to /proc: "),
        ("/dev/null/state", "agent.state_dir: cannot use /dev/null/state: Not a directory; "),
        ("/dev/null", "agent.state_dir: /dev/null is not a directory; "),
    ],
)
async def test_f25_a_state_directory_that_cannot_be_written(host: AgentProcess, place: str, message: str) -> None:
    """F25: a file system that takes no files, a file in the way: refused before anything is made."""
    said = await refusal(host, "--set", f"agent.state_dir={place}")
    assert said.startswith(message)
    assert said.endswith("let the agent write there, or name another directory\n")


async def test_f25_a_lock_file_that_cannot_be_made(host: AgentProcess) -> None:
    """F25: what only trying to write tells is refused in the same words."""
    (host.state_dir / "agent.lock").mkdir(parents=True)
    message = await refusal(host)
    assert message.startswith(f"the state directory {host.state_dir} cannot be written: Is a directory; create it")
    (host.state_dir / "agent.lock").rmdir()
    await works(host)


async def test_a_token_file_that_is_missing_or_unfit(host: AgentProcess, tmp_path: Path) -> None:
    """With a control plane a token is needed: no file named, no file there, none in it; nothing of it is shown."""
    change_config(host, control_plane={"url": "http://127.0.0.1:9"})
    assert await refusal(host) == (
        "control_plane.token_file: no token for the control plane; name the file that holds it, or give the systemd "
        'credential "control-plane-token"\n'
    )
    file = tmp_path / "token"
    change_config(host, control_plane={"token_file": str(file)})
    assert await refusal(host) == (
        f"control_plane.token_file: cannot read {file}: No such file or directory; write the token there, readable by "
        "the agent\n"
    )
    file.write_text("\n")
    assert f"{file} is empty; write the token of this machine there" in await refusal(host)
    file.write_text("s3cret one\n")
    message = await refusal(host)
    assert f"{file} must hold one token" in message
    assert "s3cret" not in message
    assert not host.state_dir.exists()


async def test_a_user_that_does_not_exist(host: AgentProcess) -> None:
    """`tasks.run_as` names a user of this host."""
    assert await refusal(host, "--set", "tasks.run_as=no-such-user") == (
        "tasks.run_as: there is no user 'no-such-user' on this host; create it or name another\n"
    )


async def test_f26_a_database_of_a_newer_version_is_left_alone(host: AgentProcess) -> None:
    """F26: refused, and not touched: the newer program finds all its tasks again."""
    await works(host)
    path = host.state_dir / "queue.db"
    (host.state_dir / "endpoints.json").unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        db.execute("PRAGMA user_version = 999")
    message = await refusal(host)
    assert message.startswith(f"the database {path} has version 999, this program knows up to {version}; start the")
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == 999
        assert db.execute("SELECT count(*) FROM attempts").fetchone()[0] == 1
        db.execute(f"PRAGMA user_version = {version}")
    await works(host)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT count(*) FROM attempts").fetchone()[0] == 2


async def test_f26_what_is_no_database_is_kept_and_the_agent_starts(host: AgentProcess) -> None:
    """F26: not a byte of it is lost, and it keeps nobody from working."""
    host.state_dir.mkdir()
    content = b"certainly not a database " * 400
    (host.state_dir / "queue.db").write_bytes(content)
    await works(host)
    [kept] = host.state_dir.glob("queue.db.damaged-*")
    assert kept.read_bytes() == content


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a file system")
async def test_f25_a_read_only_file_system(host: AgentProcess) -> None:
    """F25: refused in words that name the directory and the reason; once it can be written the agent works."""
    host.state_dir.mkdir()
    await _call("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(host.state_dir))
    try:
        message = await refusal(host)
        assert message.startswith(f"agent.state_dir: {host.state_dir} is on a read-only file system; ")
        await _call("mount", "-o", "remount,rw", str(host.state_dir))
        await works(host)
    finally:
        await _call("umount", str(host.state_dir))


async def _call(*argv: str) -> None:
    process = await asyncio.create_subprocess_exec(*argv)
    assert await process.wait() == 0, argv


async def test_a_file_in_the_way_of_the_socket_is_not_removed(host: AgentProcess) -> None:
    """What lies at `api.socket` and is no socket belongs to somebody else."""
    host.socket.write_text("mine")
    assert await refusal(host) == (
        f"api.socket: {host.socket} exists and is not a socket; move it away or name another path\n"
    )
    assert host.socket.read_text() == "mine"
    host.socket.unlink()
    await works(host)


async def test_a_socket_on_which_another_agent_listens_is_not_taken(tmp_path: Path) -> None:
    """A second agent with a state directory of its own and the first one's socket is refused; the first one goes on."""
    async with agent(tmp_path / "first") as first:
        second = AgentProcess(tmp_path, {"api": {"socket": str(first.socket)}})
        message = await refusal(second, reaches_database=True)
        assert message.startswith(f"api.socket: another agent is listening on {first.socket}; stop it, or give this")
        assert (await first.get("/ping"))["state"] == "ready"
