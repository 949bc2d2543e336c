"""The checks behind `doctor`, each a generator of findings; none changes anything, none needs a running agent."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import http.client
import json
import os
import platform
import shutil
import socket
import ssl
import sys
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from remotegpu_agent import VERSION
from remotegpu_agent.cli.context import Globals
from remotegpu_agent.cli.exits import Stop, Unreachable

if TYPE_CHECKING:
    from remotegpu_agent.config import Config
    from remotegpu_agent.proxies import Proxy

_CLOCK_BOOTTIME: Final = 7
_PR_GET_CHILD_SUBREAPER: Final = 37
_CONNECT_TIMEOUT_S: Final = 5.0
_FREE_DISK_MIN_BYTES: Final = 1 << 30
_FREE_SHARE_MIN: Final = 0.05
_PROXY_MEND: Final = "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY in the environment"
_PLACEMENTS: Final = {
    "systemd": "a transient scope per run",
    "cgroup": "a control group per run",
    "process-group": "no control groups",
}


class Level(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Check:
    """One finding; `mend` says what to do, if there is something to do."""

    subject: str
    level: Level
    text: str
    mend: str = ""


def all_checks(options: Globals) -> Iterator[Check]:
    """Everything, in the order in which an operator would look."""
    yield _python()
    yield from _kernel()
    yield _shell()
    config = None
    for found in _config(options):
        if isinstance(found, Check):
            yield found
        else:
            config = found
    is_running = False
    for check in _agent(options):
        is_running = check.level is Level.OK
        yield check
    if config is not None:
        yield _placement(config)
        yield from _state_dir(config)
        yield from _secrets(config, options)
        if not is_running:
            yield from _port(config)
        yield from _control_plane(config, options)


def _python() -> Check:
    text = f"{platform.python_version()} at {sys.executable}, remotegpu-agent {VERSION}"
    if sys.version_info < (3, 11):  # noqa: UP036 - this is the check
        return Check("python", Level.PROBLEM, text, "install Python 3.11 or newer")
    return Check("python", Level.OK, text)


def _kernel() -> Iterator[Check]:
    """The features that supervision stands on: pidfd_open(2), timerfd_create(2), prctl(2), proc(5)."""
    release = platform.release()
    missing = []
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        missing.append("pidfd_open")
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        time.clock_gettime(time.CLOCK_BOOTTIME)
        descriptor = libc.timerfd_create(_CLOCK_BOOTTIME, 0)
        if descriptor < 0:
            missing.append("timerfd with CLOCK_BOOTTIME")
        else:
            os.close(descriptor)
    except (AttributeError, OSError):
        missing.append("CLOCK_BOOTTIME")
    if libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(ctypes.c_int()), 0, 0, 0) != 0:
        missing.append("child subreaper")
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        missing.append("/proc/PID/task/TID/children (CONFIG_PROC_CHILDREN)")
    if missing:
        yield Check(
            "kernel",
            Level.PROBLEM,
            f"{release} lacks {', '.join(missing)}",
            "use Linux 5.4 or newer, with /proc mounted, and no sandbox that hides these",
        )
    else:
        yield Check("kernel", Level.OK, f"{release} has pidfd, CLOCK_BOOTTIME timers, subreaper, /proc children")


def _shell() -> Check:
    found = shutil.which("bash", path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        return Check("bash", Level.WARNING, "not found: commands without args and scripts need it", "install bash")
    return Check("bash", Level.OK, found)


def _config(options: Globals) -> Iterator[Check | Config]:
    from remotegpu_agent.config import DEFAULT_PATH, check_files, load_config
    from remotegpu_schemas.errors import Misconfigured

    path = options.config or DEFAULT_PATH
    try:
        config = load_config(options.config, options.environ)
    except Misconfigured as error:
        yield Check("config", Level.PROBLEM, str(error), "mend it; `remotegpu-agent config check` shows this again")
        return
    if not os.path.exists(path):
        yield Check("config", Level.OK, f"{path} does not exist: defaults, a stand-alone agent")
    else:
        yield Check("config", Level.OK, str(path))
    for problem in check_files(config, options.environ):
        key, _, text = problem.partition(": ")
        yield Check(key, Level.PROBLEM, text)
    yield config


def _agent(options: Globals) -> Iterator[Check]:
    try:
        ping = options.client().get("/ping")
    except Unreachable as error:
        yield Check("agent", Level.WARNING, str(error))
        return
    except Stop as error:
        yield Check("agent", Level.PROBLEM, str(error))
        return
    version, state = ping.get("version"), ping.get("state")
    text = f"runs, version {version}, {state}"
    if version != VERSION:
        yield Check("agent", Level.WARNING, f"{text}, while this program is {VERSION}", "restart the agent")
    elif state not in {"ready", None}:
        yield Check("agent", Level.WARNING, text, "`remotegpu-agent status` says why")
    else:
        yield Check("agent", Level.OK, text)


def _placement(config: Config) -> Check:
    """Which placement the agent has if it runs as whoever calls this, and what is missing."""
    import asyncio

    from remotegpu_schemas.errors import Misconfigured
    from remotegpu_sidecar.placement import choose

    async def look() -> tuple[str, tuple[str, ...]]:
        placement = await choose(config.tasks.placement)
        await placement.close()
        return placement.kind, placement.missing

    try:
        kind, missing = asyncio.run(look())
    except Misconfigured as error:
        # Who is root already is not told to become it.
        mend = "set tasks.placement to auto" + ("" if os.geteuid() == 0 else ", or run the agent as root")
        return Check("placement", Level.PROBLEM, str(error), mend)
    text = f"{kind} ({_PLACEMENTS[kind]}), as uid {os.geteuid()}"
    if missing:
        return Check("placement", Level.WARNING, f"{text}; missing: {'; '.join(missing)}")
    return Check("placement", Level.OK, text)


def _state_dir(config: Config) -> Iterator[Check]:
    path = config.agent.state_dir
    if not os.path.isdir(path):
        yield Check("state directory", Level.OK, f"{path} does not exist yet; the agent makes it")
        return
    space = os.statvfs(path)
    free, total = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    text = f"{path}: {free / (1 << 30):.1f} GiB of {total / (1 << 30):.1f} GiB free"
    share = free / total if total else 1.0
    if free < _FREE_DISK_MIN_BYTES or share < _FREE_SHARE_MIN:
        yield Check("state directory", Level.WARNING, text, "free some space: results are kept here until delivered")
    elif space.f_files and space.f_favail / space.f_files < _FREE_SHARE_MIN:
        yield Check("state directory", Level.WARNING, f"{text}, but few inodes", "remove small files")
    else:
        yield Check("state directory", Level.OK, text)
    yield from _database(path)


def _database(state_dir: Path) -> Iterator[Check]:
    from remotegpu_queue import damage
    from remotegpu_queue.store import DATABASE_NAME

    path = state_dir / DATABASE_NAME
    for notice in damage.notices(path):
        yield Check("database", Level.WARNING, notice)
    if damage.suspect_path(path).exists():
        yield Check("database", Level.WARNING, f"{path} may be damaged", "restart the agent, which looks and mends it")


def _secrets(config: Config, options: Globals) -> Iterator[Check]:
    from remotegpu_agent.config import token_path

    paths = [token_path(config, options.environ) if config.control_plane.url else None, config.api.tokens_file]
    paths += [config.control_plane.client_key_file, config.api.tls_key_file]
    for path in paths:
        try:
            mode = path.stat().st_mode & 0o777 if path is not None else 0
        except OSError:
            continue  # reported with the config already
        if path is not None and mode & 0o077:
            text = f"{path} can be read by others (mode {mode:04o})"
            yield Check("secrets", Level.WARNING, text, f"chmod 600 {path}")
        elif path is not None:
            yield Check("secrets", Level.OK, f"{path} is for its owner only")


def _port(config: Config) -> Iterator[Check]:
    from remotegpu_agent.config import split_listen

    if config.api.listen is None:
        return
    address, port = split_listen(config.api.listen)
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((str(address), port))
        except OSError as error:
            mend = "stop what listens there (ss -ltnp), or set another port in api.listen"
            yield Check("api.listen", Level.PROBLEM, f"{config.api.listen}: {error.strerror or error}", mend)
        else:
            yield Check("api.listen", Level.OK, f"{config.api.listen} is free")


def _control_plane(config: Config, options: Globals) -> Iterator[Check]:
    """Name, connection, HTTP and token, by a renewal of a task that cannot exist: it changes nothing there."""
    subject = "control plane"
    url = config.control_plane.url
    if url is None:
        yield Check(subject, Level.OK, "none is set: a stand-alone agent for local tasks")
        return
    from remotegpu_agent.proxies import proxy_for
    from remotegpu_schemas.errors import Misconfigured

    parts = urllib.parse.urlsplit(url)
    try:
        proxy = proxy_for(url, options.environ)
    except Misconfigured:
        return  # reported with the config already
    if proxy is not None:
        yield Check(subject, Level.OK, f"{url} is reached by way of the proxy {proxy.name}")
    near = urllib.parse.urlsplit(url if proxy is None else proxy.url)
    whose, mend = ("", "check control_plane.url and the DNS") if proxy is None else ("the proxy ", _PROXY_MEND)
    host, port = near.hostname or "", near.port or (443 if near.scheme == "https" else 80)
    try:
        addresses = sorted({str(item[4][0]) for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except (OSError, UnicodeError) as error:  # UnicodeError: a host name that cannot be one
        reason = getattr(error, "strerror", None) or error
        yield Check(subject, Level.PROBLEM, f"{whose}{host} has no address: {reason}", mend)
        return
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        text = f"{whose}{host} ({', '.join(addresses)}) takes no connection on port {port}: {error.strerror or error}"
        yield Check(subject, Level.PROBLEM, text, "is it running, and does a firewall stand between?")
        return
    if parts.scheme == "http" and (proxy is not None or not _is_loopback(addresses)):
        text = f"{url} is not encrypted: the token can be read on the way"
        yield Check(subject, Level.WARNING, text, "use https if the plane has it")
    if parts.scheme == near.scheme == "https" and proxy is not None:
        text = "not tried: doctor has no TLS inside of a TLS proxy, which the agent has"
        yield Check(subject, Level.WARNING, text, "`remotegpu-agent status` says whether it is connected")
        return
    yield from _http_check(config, options, parts, proxy)


def _is_loopback(addresses: list[str]) -> bool:
    return all(address.startswith("127.") or address == "::1" for address in addresses)


def _http_check(
    config: Config, options: Globals, parts: urllib.parse.SplitResult, proxy: Proxy | None
) -> Iterator[Check]:
    from remotegpu_agent.config import read_control_plane_token
    from remotegpu_agent.tls import tls_sentence

    subject, plane = "control plane", config.control_plane
    try:
        token = read_control_plane_token(config, options.environ)
        connection, place, extra = _open(config, parts, proxy)
        body = {"agent_id": config.agent.id or "remotegpu-doctor", "attempt_id": "remotegpu-doctor", "extend_sec": 1}
        headers = {"Content-Type": "application/json", "X-Agent-Token": token, "Authorization": f"Bearer {token}"}
        path = place + parts.path.rstrip("/") + "/api/v1/agent/tasks/remotegpu-doctor/lease/renew"
        with contextlib.closing(connection):
            connection.request("POST", path, body=json.dumps(body), headers={**headers, **extra})
            response = connection.getresponse()
            answer = response.read(1 << 20)
    except ssl.SSLError as error:
        yield Check(subject, Level.PROBLEM, tls_sentence(error, parts.hostname or ""))
        return
    except ValueError:
        return  # no usable token; reported with the config already
    except (OSError, http.client.HTTPException) as error:
        whose = "" if proxy is None else f", by way of the proxy {proxy.name},"
        reason = str(error) or type(error).__name__
        yield Check(subject, Level.PROBLEM, f"{plane.url}{whose} does not speak HTTP as it should: {reason}")
        return
    code = _envelope_code(answer)
    if response.status in {401, 403} or code in {401, 403}:
        text = f"{plane.url} refuses the token (HTTP {response.status})"
        yield Check(subject, Level.PROBLEM, text, "put the token of this machine into control_plane.token_file")
    elif code is None:
        text = f"{plane.url} answers HTTP {response.status}, but not as a control plane"
        yield Check(subject, Level.WARNING, text, "check the host, port and path of control_plane.url")
    elif response.status >= 500 or code in range(500, 600) or code == 30099:
        yield Check(subject, Level.WARNING, f"{plane.url} answers with an internal error", "look into its log")
    else:
        yield Check(subject, Level.OK, f"{plane.url} answers and takes the token")


def _open(
    config: Config, parts: urllib.parse.SplitResult, proxy: Proxy | None
) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """A connection, what a request's path begins with there, and headers for the proxy that every request needs."""
    from remotegpu_agent.tls import TlsFiles

    plane, is_tls = config.control_plane, parts.scheme == "https"
    files = TlsFiles(plane.ca_file, plane.client_cert_file, plane.client_key_file)
    context = files.load() if is_tls or (proxy is not None and proxy.url.startswith("https:")) else None
    near = parts if proxy is None else urllib.parse.urlsplit(proxy.url)
    # With a tunnel http.client speaks TLS within it, and none with the proxy itself.
    connection = (
        http.client.HTTPConnection(near.hostname or "", near.port, timeout=_CONNECT_TIMEOUT_S)
        if context is None
        else http.client.HTTPSConnection(near.hostname or "", near.port, timeout=_CONNECT_TIMEOUT_S, context=context)
    )
    if proxy is None:
        return connection, "", {}
    if is_tls:
        connection.set_tunnel(parts.hostname or "", parts.port, headers=proxy.authorization)
        return connection, "", {}
    return connection, f"http://{parts.netloc}", proxy.authorization


def _envelope_code(body: bytes) -> int | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    code = value.get("code") if isinstance(value, dict) else None
    return code if isinstance(code, int) else None
