"""Addresses that an operator writes, and socket files that others left."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from remotegpu_agent.api.sockets import open_tcp, open_unix, parse_listen, remove_unix, url_of
from remotegpu_schemas.errors import Misconfigured


@pytest.mark.parametrize(
    ("listen", "address", "port"),
    [
        ("127.0.0.1:8090", "127.0.0.1", 8090),
        ("localhost:0", "127.0.0.1", 0),
        ("0.0.0.0:65535", "0.0.0.0", 65535),
        ("[::1]:0", "::1", 0),
        ("[::]:8090", "::", 8090),
    ],
)
def test_addresses(listen: str, address: str, port: int) -> None:
    """IPv4, IPv6 in brackets, and localhost."""
    parsed, parsed_port = parse_listen(listen)
    assert (str(parsed), parsed_port) == (address, port)


@pytest.mark.parametrize(
    "listen",
    [
        "",
        ":",
        ":8090",
        "8090",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:65536",
        "127.0.0.1:-1",
        "127.0.0.1:http",
        "127.0.0.1:٣",
        "::1:8090",
        "[::1]",
        "[127.0.0.1:80",
        "gpu.example:8090",
        "1.2.3:80",
        "x" * 9000,
    ],
)
def test_bad_addresses(listen: str) -> None:
    """Anything else is one short sentence that shows what to write."""
    with pytest.raises(Misconfigured, match=r"^api\.listen: .* is not ADDRESS:PORT; write for example") as caught:
        parse_listen(listen)
    assert len(str(caught.value)) < 300


def test_an_address_of_another_host() -> None:
    """It is said which address is missing."""
    address, port = parse_listen("192.0.2.1:0")
    with pytest.raises(Misconfigured, match=r"this host has no address 192\.0\.2\.1"):
        open_tcp(address, port)


def test_a_free_port_is_reported() -> None:
    """Port 0 is replaced by the one that was given out."""
    with open_tcp(*parse_listen("127.0.0.1:0")) as sock:
        assert url_of(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"


def test_the_socket_file(short_dir: Path) -> None:
    """Its directory is made, its mode is 0660, its group the given one."""
    path = short_dir / "run" / "remotegpu" / "agent.sock"
    group = os.getegid()
    with open_unix(path, group):
        assert path.stat().st_mode & 0o777 == 0o660
        assert path.stat().st_gid == group


def test_a_stale_socket_is_replaced(short_dir: Path) -> None:
    """What a dead agent left does not keep the next one from starting."""
    path = short_dir / "agent.sock"
    open_unix(path, None).close()
    assert path.is_socket()
    with open_unix(path, None), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_live_socket_is_refused(short_dir: Path) -> None:
    """F36: a second agent does not take a live one's socket away, be its backlog full or not."""
    path = short_dir / "agent.sock"
    with open_unix(path, None) as first:
        with pytest.raises(Misconfigured, match=r"api\.socket: another agent is listening on"):
            open_unix(path, None)
        first.listen(0)
        with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
            for client in (one, two):
                client.setblocking(False)
                client.connect_ex(str(path))
            with pytest.raises(Misconfigured, match="another agent is listening"):
                open_unix(path, None)
        assert path.is_socket()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_is_left_alone(short_dir: Path, kind: str) -> None:
    """A file, a directory or a link in its place is never removed."""
    path = short_dir / "agent.sock"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/etc/passwd")
    with pytest.raises(Misconfigured, match=r"exists and is not a socket; move it away"):
        open_unix(path, None)
    assert os.path.lexists(path)


@pytest.mark.parametrize(
    "name", ["x" * 200, "file/below/a-file/agent.sock", "nul\0/agent.sock"], ids=["long", "below-a-file", "nul"]
)
def test_an_unusable_path(short_dir: Path, name: str) -> None:
    """A path that is too long, below a file, or no path at all: one sentence with what to do."""
    (short_dir / "file").write_text("")
    with pytest.raises(Misconfigured, match=r"^api\.socket: cannot listen on .*; name a path"):
        open_unix(short_dir / name, None)


def test_only_our_own_socket_is_removed(short_dir: Path) -> None:
    """A file that another agent put there meanwhile stays; a missing one is no error."""
    path = short_dir / "agent.sock"
    with open_unix(path, None):
        inode = path.stat().st_ino
        remove_unix(path, inode + 1)
        assert path.is_socket()
        remove_unix(path, inode)
        assert not path.exists()
        remove_unix(path, inode)
