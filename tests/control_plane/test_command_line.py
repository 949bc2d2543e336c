"""`python -m control_plane` as a process: where it listens, how it ends, what it says when it cannot start."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import aiohttp
import pytest

from tests.control_plane.support import ADMIN_TOKEN, DEADLINE_S, request

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{EXAMPLES}:{os.environ.get('PYTHONPATH', '')}"}


def command(database: Path | str, *more: str, listen: str = "127.0.0.1:0") -> list[str]:
    """The command line."""
    token = () if any(word.startswith("--admin-token") for word in more) else ("--admin-token", ADMIN_TOKEN)
    base = (sys.executable, "-m", "control_plane", "--listen", listen, "--database", str(database))
    return [*base, *token, *more]


@contextlib.contextmanager
def running(database: Path | str, *more: str) -> Generator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL, once it listens; it is gone afterwards."""
    process = subprocess.Popen(
        command(database, *more), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())["url"]
        finally:
            process.kill()


def refused(arguments: list[str]) -> str:
    """The one line on standard error of a process that cannot start."""
    done = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    return line


async def test_serves_until_sigterm(tmp_path: Path, database: Path | str, session: aiohttp.ClientSession) -> None:
    """One line of JSON says where, also in the ready file; SIGTERM ends it with 0 and without a word."""
    token_file, ready_file = tmp_path / "token", tmp_path / "ready"
    token_file.write_text(f"{ADMIN_TOKEN}\n")
    more = ("--admin-token-file", str(token_file), "--ready-file", str(ready_file))
    with running(database, *more) as (process, url):
        assert json.loads(ready_file.read_text()) == {"url": url}
        answer = await request(session, "GET", f"{url}/api/v1/admin/stats", {"Authorization": f"Bearer {ADMIN_TOKEN}"})
        assert answer.code == 0
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=DEADLINE_S)
        assert (process.returncode, stdout, stderr) == (0, "", "")


async def test_mode_and_lease_by_option(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """`--compat` and `--lease-ttl` reach the plane."""
    with running(tmp_path / "plane.db", "--compat", "--lease-ttl", "7") as (_process, url):
        admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        machine = await request(session, "POST", f"{url}/api/v1/admin/machines", admin, json={"machine_id": "m"})
        await request(session, "POST", f"{url}/api/v1/admin/tasks", admin, json={"id": "t", "command": "true"})
        body = {"agent_id": "a", "machine_id": "m", "limit": 1, "request_id": "r"}
        headers = {"X-Agent-Token": machine.data["token"]}
        claimed = await request(session, "POST", f"{url}/api/v1/agent/tasks/claim", headers, json=body)
        assert claimed.message == "success"
        task = await request(session, "GET", f"{url}/api/v1/admin/tasks/t", admin)
        assert task.data["attempt_list"][0]["lease_ttl_ms"] == 7000


async def test_uploads_by_option(tmp_path: Path, session: aiohttp.ClientSession) -> None:
    """`--uploads` offers the feature, and makes the directory."""
    uploads = tmp_path / "uploads"
    with running(tmp_path / "plane.db", "--uploads", str(uploads)) as (_process, url):
        admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
        machine = await request(session, "POST", f"{url}/api/v1/admin/machines", admin, json={"machine_id": "m"})
        headers = {"X-Agent-Token": machine.data["token"]}
        body = {"agent_id": "a", "machine_id": "m"}
        answer = await request(session, "POST", f"{url}/api/v1/agent/register", headers, json=body)
        assert answer.data["features"] == ["release", "upload-url"]
    assert uploads.is_dir()


def test_busy_port(tmp_path: Path) -> None:
    """Exit code 2 and one line that names the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refused(command(tmp_path / "plane.db", listen=listen))
    assert line.startswith(f"control_plane: cannot listen on {listen}: ")


@pytest.mark.parametrize("kind", ["no folder", "a folder", "no database"])
def test_unusable_database(tmp_path: Path, kind: str) -> None:
    """Exit code 2 and one line that names the file."""
    database = tmp_path / "plane.db"
    match kind:
        case "no folder":
            database = tmp_path / "nowhere" / "plane.db"
        case "a folder":
            database.mkdir()
        case _:
            database.write_text("this is a letter, not a database\n" * 100)
    assert refused(command(database)).startswith(f"control_plane: the database {database} cannot be used: ")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://plane:secret-word@/plane?host=/nonexistent", "No such file or directory"),
        ("postgresql://plane:secret-word@127.0.0.1:1/plane?sslmode=disable", "Connect call failed"),
        ("postgresql://plane:secret-word@127.0.0.1:port/plane", "is no URL such as postgresql://user@host/name"),
    ],
)
def test_postgres_out_of_reach(url: str, reason: str) -> None:
    """Exit code 2 and one line that says why, without the password."""
    line = refused(command(url))
    assert line.startswith("control_plane: the database ")
    assert reason in line
    assert "secret-word" not in line


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--listen", "8080"), "--listen 8080: not HOST:PORT"),
        (("--lease-ttl", "0"), "--lease-ttl 0: "),
        (("--admin-token-file", "/nonexistent/token"), "--admin-token-file /nonexistent/token cannot be read"),
        (("--admin-token", ""), "--admin-token is empty"),
        (("--uploads", "/dev/null/uploads"), "the directory for uploads /dev/null/uploads cannot be used"),
        (("--public-url", "plane.example"), "--public-url plane.example: not an address"),
        (("--ready-file", "/nonexistent/ready"), "--ready-file /nonexistent/ready cannot be written"),
    ],
)
def test_bad_option(tmp_path: Path, more: tuple[str, ...], named: str) -> None:
    """Exit code 2 and one line that names the option."""
    assert refused(command(tmp_path / "plane.db", *more)).startswith(f"control_plane: {named}")
