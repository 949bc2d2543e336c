"""What a valid config still needs on this host: files that can be read, directories that can be written, users.

Each problem is a sentence that begins with the key and says what to do. Changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import re
import ssl
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from remotegpu_agent.config_values import SUBMITTER
from remotegpu_agent.proxies import proxy_for
from remotegpu_agent.tls import no_password
from remotegpu_schemas.errors import Misconfigured
from remotegpu_schemas.limits import TOKENS_FILE_MAX_BYTES

if TYPE_CHECKING:
    from remotegpu_agent.config import Config, ControlPlaneSection

CREDENTIAL_NAME: Final = "control-plane-token"
"""The systemd credential that stands in for `control_plane.token_file` (systemd.exec(5), LoadCredential=)."""
_CA_MEND: Final = "name the PEM file of who signed the control plane's certificate"
_ONLINE_CPUS: Final = Path("/sys/devices/system/cpu/online")
NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
TOKEN_MAX_BYTES: Final = 8192
"""Servers refuse header lines above 8 KiB."""


def token_path(config: Config, environ: Mapping[str, str]) -> Path | None:
    """The file that holds the control plane's token: `token_file`, else the systemd credential, else None."""
    if config.control_plane.token_file is not None:
        return config.control_plane.token_file
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if directory and os.path.exists(credential := Path(directory, CREDENTIAL_NAME)):
        return credential
    return None


def check_files(config: Config, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Everything outside of the config that would keep the agent from working as it is told; empty if nothing."""
    problems = [_state_dir_problem(config.agent.state_dir)]
    if config.control_plane.url is not None:
        problems += [_token_problem(config, environ), *_tls_problems(config.control_plane)]
        problems.append(_proxy_problem(config.control_plane.url, environ))
    if config.api.tokens_file is not None:
        problems.append(_tokens_file_problem(config.api.tokens_file))
    if config.api.socket is not None:
        problems.append(_socket_problem(config.api.socket))
    if config.tasks.allowed_cpus is not None:
        problems.append(_cpus_problem(config.tasks.allowed_cpus))
    if config.tasks.run_as is not None:
        problems.append(_user_problem(config.tasks.run_as))
    return [problem for problem in problems if problem is not None]


def read_control_plane_token(config: Config, environ: Mapping[str, str]) -> str:
    """The control plane's token, read from its file now. Raises ValueError when it cannot be had, with the reason."""
    path = token_path(config, environ)
    if path is None:
        raise ValueError("no token for the control plane")
    try:
        return read_token(path)
    except OSError as error:
        raise ValueError(_cannot("read", path, error)) from error


def read_token(path: Path) -> str:
    """The token in a file of one line. Raises ValueError with a predicate that never shows the content, OSError."""
    with path.open("rb") as file:
        return check_token(file.read(TOKEN_MAX_BYTES + 1))


def check_token(raw: bytes) -> str:
    """The token itself, without blanks around it. Raises ValueError as `read_token` does."""
    token = raw.strip()
    if not token:
        raise ValueError("is empty; write the token of this machine there")
    if len(raw) > TOKEN_MAX_BYTES:
        raise ValueError(f"is larger than {TOKEN_MAX_BYTES} bytes; is it the right file?")
    if len(token.split()) > 1 or not all(0x21 <= byte <= 0x7E for byte in token):
        raise ValueError("must hold one token: a single line of printable ASCII characters without blanks")
    return token.decode("ascii")


def _token_problem(config: Config, environ: Mapping[str, str]) -> str | None:
    path = token_path(config, environ)
    if path is None:
        return (
            "control_plane.token_file: no token for the control plane; name the file that holds it, or give the "
            f'systemd credential "{CREDENTIAL_NAME}"'
        )
    try:
        read_token(path)
    except OSError as error:
        return f"control_plane.token_file: {_cannot('read', path, error)}; write the token there, readable by the agent"
    except ValueError as error:
        return f"control_plane.token_file: {path} {error}"
    return None


def _proxy_problem(url: str, environ: Mapping[str, str]) -> str | None:
    try:
        proxy_for(url, environ)
    except Misconfigured as error:
        return f"control_plane.url: {error}, in the environment of the agent"
    return None


def _tls_problems(plane: ControlPlaneSection) -> list[str | None]:
    problems: list[str | None] = []
    if plane.ca_file is not None:
        try:
            ssl.create_default_context(cafile=str(plane.ca_file))
        except ssl.SSLError:
            problems.append(f"control_plane.ca_file: {plane.ca_file} holds no certificate in PEM form; {_CA_MEND}")
        except OSError as error:
            problems.append(f"control_plane.ca_file: {_cannot('read', plane.ca_file, error)}; {_CA_MEND}")
    if plane.client_cert_file is not None and plane.client_key_file is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
                plane.client_cert_file, plane.client_key_file, password=no_password
            )
        except ssl.SSLError as error:
            problems.append(
                f"control_plane.client_cert_file: {plane.client_cert_file} and {plane.client_key_file} are no "
                f"certificate with its key in PEM form, without a pass phrase ({error.reason or 'not readable'}); "
                "name the pair that was issued for this machine"
            )
        except OSError as error:
            problems.append(
                f"control_plane.client_cert_file: cannot read {plane.client_cert_file} or its key: "
                f"{_reason(error)}; make both readable by the agent"
            )
    return problems


def _tokens_file_problem(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            text = file.read(TOKENS_FILE_MAX_BYTES + 1)
    except OSError as error:
        return (
            f"api.tokens_file: {_cannot('read', path, error)}; make it with `remotegpu-agent token new --append {path}`"
        )
    if len(text) > TOKENS_FILE_MAX_BYTES:
        return f"api.tokens_file: {path} is larger than {TOKENS_FILE_MAX_BYTES} bytes; is it the right file?"
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    entries = [(number, line) for number, line in lines if line and not line.startswith(b"#")]
    if not entries:
        return f"api.tokens_file: {path} has no token; write one a line, as name:role:token"
    for number, entry in entries:
        if b":" in entry and not re.fullmatch(rb"[^:]+:(read|operate):.+", entry):
            return f"api.tokens_file: {path}, line {number}: write name:role:token, with the role 'read' or 'operate'"
    return None


def _state_dir_problem(path: Path) -> str | None:
    return _directory_problem("agent.state_dir", path, "let the agent write there, or name another directory")


def _socket_problem(path: Path) -> str | None:
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        is_socket = True
    if not is_socket:
        return f"api.socket: {path} exists and is not a socket; move it away or name another path"
    return _directory_problem(
        "api.socket", path.parent, "name a path in a directory that the agent may write to, or null"
    )


def _directory_problem(key: str, path: Path, mend: str) -> str | None:
    """Why a directory cannot be used or made: the nearest one that exists decides."""
    try:
        nearest, mode = _nearest_existing(path)
    except OSError as error:
        return f"{key}: {_cannot('use', path, error)}; {mend}"
    if not stat.S_ISDIR(mode):
        return f"{key}: {nearest} is not a directory; {mend}"
    if os.statvfs(nearest).f_flag & os.ST_RDONLY:
        return f"{key}: {nearest} is on a read-only file system; {mend}"
    if not os.access(nearest, os.W_OK | os.X_OK):
        is_there = nearest == path
        what = f"{path} cannot be written to" if is_there else f"{path} cannot be made: no right to write to {nearest}"
        return f"{key}: {what}; {mend}"
    try:
        # Only trying tells of file systems that take no files, as /proc. The file has no name, or loses it at once.
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        if error.errno in NO_ROOM:
            return None  # the disk is full: the tasks that run there need their agent all the more
        return f"{key}: {_cannot('write to', nearest, error)}; {mend}"
    return None


def _nearest_existing(path: Path) -> tuple[Path, int]:
    for candidate in (path, *path.parents):
        with contextlib.suppress(FileNotFoundError):
            return candidate, candidate.stat().st_mode
    raise FileNotFoundError(path)


def _cpus_problem(allowed: str) -> str | None:
    """A task that may use none of this host's CPUs would be refused by the kernel, or use all of them."""
    online = _cpus_of(_ONLINE_CPUS.read_text())
    missing = sorted(_cpus_of(allowed) - online)
    if not missing:
        return None
    return f"tasks.allowed_cpus: this host has no CPU {missing[0]}; it has {_ONLINE_CPUS.read_text().strip()}"


def _cpus_of(text: str) -> set[int]:
    """The numbers of a list of CPUs (the list format of cpuset(7))."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus


def _user_problem(name: str) -> str | None:
    if name == SUBMITTER:
        only_root = "tasks.run_as: only root can run tasks as their submitters; run the agent as root"
        return only_root if os.geteuid() != 0 else None
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        return f"tasks.run_as: there is no user {name!r} on this host; create it or name another"
    if os.geteuid() not in {0, user.pw_uid}:
        return f"tasks.run_as: only root can run tasks as {name!r}; run the agent as root, or leave this out"
    return None


def _cannot(verb: str, path: Path, error: OSError) -> str:
    return f"cannot {verb} {path}: {_reason(error)}"


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
