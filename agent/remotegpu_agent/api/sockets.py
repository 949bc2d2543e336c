"""The listening sockets: opened here, so that what is wrong with them is one clear sentence. Knows nothing of HTTP."""

from __future__ import annotations

import errno
import grp
import ipaddress
import os
import socket
import stat
from pathlib import Path

import structlog

from remotegpu_agent.api.settings import IpAddress
from remotegpu_schemas.errors import Misconfigured
from remotegpu_schemas.limits import API_BACKLOG_MAX, API_SOCKET_BUFFER_BYTES

log: structlog.typing.FilteringBoundLogger = structlog.get_logger(__name__)


def parse_listen(listen: str) -> tuple[IpAddress, int]:
    """Split `127.0.0.1:8090` or `[::1]:0`; `localhost` is 127.0.0.1. Raises Misconfigured."""
    host, _, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise _bad_listen(listen)
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise _bad_listen(listen) from error
    if not (port.isascii() and port.isdigit() and int(port) <= 65535):
        raise _bad_listen(listen)
    return address, int(port)


def open_tcp(address: IpAddress, port: int) -> socket.socket:
    """A listening TCP socket; `::` takes IPv4 callers too. Raises Misconfigured."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    is_dual = address == ipaddress.IPv6Address("::") and socket.has_dualstack_ipv6()
    try:
        sock = socket.create_server(
            (str(address), port), family=family, backlog=API_BACKLOG_MAX, dualstack_ipv6=is_dual
        )
    except OSError as error:
        raise Misconfigured(f"api.listen: {_tcp_problem(error, address, port)}") from error
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # for those that are accepted (socket(7), tcp(7))
        sock.setsockopt(socket.SOL_SOCKET, option, API_SOCKET_BUFFER_BYTES)
    return sock


def url_of(sock: socket.socket, *, is_tls: bool = False) -> str:
    """The base URL of a listening TCP socket."""
    host, port = sock.getsockname()[:2]
    scheme = "https" if is_tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def open_unix(path: Path, group_id: int | None) -> socket.socket:
    """A listening Unix socket, mode 0660, of the given group; what a dead agent left there is replaced.

    Raises Misconfigured when a live one answers there, or the path cannot be used.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            _bind_closed(sock, path)
            _hand_to_group(path, group_id)
            path.chmod(0o660)
            sock.listen(API_BACKLOG_MAX)
        except BaseException:
            sock.close()
            raise
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise Misconfigured(
            f"api.socket: cannot listen on {path}: {reason}; name a path (at most 107 bytes) in a directory that the "
            "agent may write to, or set api.socket to null"
        ) from error
    return sock


def remove_unix(path: Path, sock_inode: int) -> None:
    """Take the socket file away if it is still ours (another agent may have put its own there since)."""
    try:
        if path.lstat().st_ino == sock_inode:
            path.unlink()
    except OSError as error:
        log.warning("api_socket_not_removed", path=str(path), error=str(error))


def group_id_of(name: str) -> int | None:
    """The id of a group, or None if this host has none of that name."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Misconfigured(f"api.socket: {path} exists and is not a socket; move it away or name another path")
    if _answers(path):
        raise Misconfigured(
            f"api.socket: another agent is listening on {path}; stop it, or give this one its own api.socket"
        )
    path.unlink()


def _answers(path: Path) -> bool:
    """Whether somebody listens there; a full backlog (EAGAIN) is a listener too."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                return False
            raise
    return True


def _bind_closed(sock: socket.socket, path: Path) -> None:
    """Bind with a umask under which nobody else can connect before the mode is set (bind(2) applies the umask)."""
    before = os.umask(0o177)
    try:
        sock.bind(os.fspath(path))
    finally:
        os.umask(before)


def _hand_to_group(path: Path, group_id: int | None) -> None:
    if group_id is None:
        return
    try:
        os.chown(path, -1, group_id)
    except PermissionError:
        log.warning(
            "api_socket_group_not_set",
            path=str(path),
            mend="run the agent as root or as a member of the group, else only its own user can use the socket",
        )


def _tcp_problem(error: OSError, address: IpAddress, port: int) -> str:
    where = f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
    match error.errno:
        case errno.EADDRINUSE:
            return f"{where} is in use by another program; stop it, or set another port (0 picks a free one)"
        case errno.EADDRNOTAVAIL:
            return f"this host has no address {address}; name one of its own, or 127.0.0.1"
        case errno.EACCES:
            return f"no right to listen on {where}; ports below 1024 are for root: set a higher one"
        case _:
            return f"cannot listen on {where}: {error.strerror or error}; set another address"


def _bad_listen(listen: str) -> Misconfigured:
    return Misconfigured(
        f"api.listen: {listen[:100]!r} is not ADDRESS:PORT; write for example 127.0.0.1:8090 or [::1]:8090, "
        "or null to switch TCP off"
    )
