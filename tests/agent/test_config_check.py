"""What a valid config still needs on this host; each problem is one line that begins with its key."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent.config import Config, check_files, read_control_plane_token, token_path
from remotegpu_agent.config_check import TOKEN_MAX_BYTES, check_token, read_token
from remotegpu_schemas.limits import TOKENS_FILE_MAX_BYTES


def config_of(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    """A config whose paths lie in the test's own directory."""
    data: dict[str, dict[str, Any]] = {
        "agent": {"state_dir": tmp_path / "state"},
        "api": {"socket": tmp_path / "agent.sock"},
    }
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values}
    return Config.model_validate(data)


def problem_of(config: Config, environ: dict[str, str] | None = None) -> str:
    """The only problem, which is one line."""
    (problem,) = check_files(config, environ or {})
    assert "\n" not in problem
    return problem


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A file with a good token."""
    path = tmp_path / "token"
    path.write_text("hush-hush\n")
    return path


def test_nothing_to_complain_about(tmp_path: Path, token_file: Path) -> None:
    """A config whose files are there has no problem, and looking at them leaves nothing behind."""
    config = config_of(tmp_path, control_plane={"url": "http://plane", "token_file": token_file})
    before = sorted(tmp_path.iterdir())
    assert check_files(config, {}) == []
    assert sorted(tmp_path.iterdir()) == before


def test_stand_alone_needs_no_token(tmp_path: Path) -> None:
    """Without a control plane nobody asks for its token, nor for its certificates."""
    assert check_files(config_of(tmp_path, control_plane={"ca_file": "/nowhere"}), {}) == []


# --- token ---------------------------------------------------------------------------------------------------------


def test_no_token(tmp_path: Path) -> None:
    """A control plane without a token is a problem that names both ways to give one."""
    problem = problem_of(config_of(tmp_path, control_plane={"url": "http://plane"}))
    assert problem.startswith("control_plane.token_file: no token for the control plane; name the file")
    assert 'systemd credential "control-plane-token"' in problem


def test_missing_token_file(tmp_path: Path) -> None:
    """A token file that is not there is named, with what to do."""
    path = tmp_path / "none"
    assert problem_of(config_of(tmp_path, control_plane={"url": "http://plane", "token_file": path})) == (
        f"control_plane.token_file: cannot read {path}: No such file or directory; write the token there, readable by "
        "the agent"
    )


def test_unreadable_token_file(tmp_path: Path) -> None:
    """A token file that cannot be read is told with the reason."""
    problem = problem_of(config_of(tmp_path, control_plane={"url": "http://plane", "token_file": tmp_path}))
    assert problem.startswith(f"control_plane.token_file: cannot read {tmp_path}: Is a directory; ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; write the token of this machine there"),
        (b" \n\n", "is empty"),
        (b"hush hush", "must hold one token: a single line"),
        (b"hush\nhush\n", "must hold one token: a single line"),
        ("hüsh".encode(), "must hold one token"),
        (b"hush\x00", "must hold one token"),
        (b"h" * (TOKEN_MAX_BYTES + 1), f"is larger than {TOKEN_MAX_BYTES} bytes; is it the right file?"),
    ],
)
def test_bad_token(tmp_path: Path, token_file: Path, content: bytes, message: str) -> None:
    """What is no token is refused, and never shown."""
    token_file.write_bytes(content)
    problem = problem_of(config_of(tmp_path, control_plane={"url": "http://plane", "token_file": token_file}))
    assert problem.startswith(f"control_plane.token_file: {token_file} {message}")
    assert "hush" not in problem.replace(str(token_file), "")
    with pytest.raises(ValueError, match=r"^(?!.*hush)"):
        check_token(content)


def test_endless_token_file() -> None:
    """Of a token file only so much is read as a token may have."""
    with pytest.raises(ValueError, match=f"is larger than {TOKEN_MAX_BYTES} bytes"):
        read_token(Path("/dev/zero"))


def test_credential(tmp_path: Path) -> None:
    """The systemd credential stands in for the file; a file that is named wins."""
    (tmp_path / "control-plane-token").write_text("from-systemd")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    config = config_of(tmp_path, control_plane={"url": "http://plane"})
    assert read_control_plane_token(config, environ) == "from-systemd"
    assert check_files(config, environ) == []
    named = config_of(tmp_path, control_plane={"url": "http://plane", "token_file": tmp_path / "x"})
    assert token_path(named, environ) == tmp_path / "x"
    with pytest.raises(ValueError, match="cannot read"):
        read_control_plane_token(named, environ)
    with pytest.raises(ValueError, match="no token for the control plane"):
        read_control_plane_token(config, {})


# --- directories, socket, user -------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_file_in_the_way_of_the_state_dir(tmp_path: Path, below: str) -> None:
    """A state directory that is a file, or lies below one, is a problem that names the file."""
    (tmp_path / "file").write_text("")
    state_dir = tmp_path / "file" / below
    problem = problem_of(config_of(tmp_path, agent={"state_dir": state_dir}))
    assert problem.startswith("agent.state_dir: ")
    assert str(tmp_path / "file") in problem
    assert problem.endswith("; let the agent write there, or name another directory")


@pytest.mark.parametrize("path", ["/proc", "/proc/remotegpu", "/sys/kernel/remotegpu"])
def test_unwritable_state_dir(tmp_path: Path, path: str) -> None:
    """A place where nobody can make files is no state directory, whatever its mode allows."""
    problem = problem_of(config_of(tmp_path, agent={"state_dir": path}))
    assert problem.startswith("agent.state_dir: ")
    assert problem.endswith("; let the agent write there, or name another directory")


def test_state_dir_of_others(tmp_path: Path) -> None:
    """A user without the right to write is told so, and where."""
    (tmp_path / "closed").mkdir(mode=0o755)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    code = (
        "import os, sys; from pathlib import Path; from remotegpu_agent.config import Config, check_files\n"
        "path, run_as = Path(sys.argv[1]), sys.argv[2]\n"
        "config = Config.model_validate({'agent': {'state_dir': path}, 'api': {'socket': None}, "
        "'tasks': {'run_as': run_as}})\n"
        "if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print('\\n'.join(check_files(config, {})))"
    )
    for run_as, whom in (("root", "'root'"), ("submitter", "their submitters")):
        command = [sys.executable, "-c", code, str(tmp_path / "closed" / "state"), run_as]
        state, user = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        assert state.startswith(f"agent.state_dir: {tmp_path}/closed/state cannot be made: no right to write to ")
        assert user.startswith(f"tasks.run_as: only root can run tasks as {whom}; run the agent as root")


def test_file_in_the_way_of_the_socket(tmp_path: Path) -> None:
    """A socket's path that something else has is a problem; a socket that is there already is none."""
    path = tmp_path / "agent.sock"
    path.write_text("")
    assert problem_of(config_of(tmp_path)) == (
        f"api.socket: {path} exists and is not a socket; move it away or name another path"
    )
    path.unlink()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        assert check_files(config_of(tmp_path), {}) == []


def test_socket_below_a_file(tmp_path: Path) -> None:
    """The socket's directory must be one."""
    (tmp_path / "file").write_text("")
    problem = problem_of(config_of(tmp_path, api={"socket": tmp_path / "file" / "agent.sock"}))
    assert problem.startswith("api.socket: ")
    assert "name a path in a directory that the agent may write to, or null" in problem


def test_cpus_that_this_host_lacks(tmp_path: Path) -> None:
    """The first CPU that is not there is named, beside those that are; the host's own list is no problem."""
    online = Path("/sys/devices/system/cpu/online").read_text().strip()
    assert check_files(config_of(tmp_path, tasks={"allowed_cpus": online}), {}) == []
    assert problem_of(config_of(tmp_path, tasks={"allowed_cpus": "0,8000-8191"})) == (
        f"tasks.allowed_cpus: this host has no CPU 8000; it has {online}"
    )


def test_missing_user(tmp_path: Path) -> None:
    """A user that this host does not have is named."""
    assert problem_of(config_of(tmp_path, tasks={"run_as": "no-such-user"})) == (
        "tasks.run_as: there is no user 'no-such-user' on this host; create it or name another"
    )


# --- certificates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"garbage\x00\xff", b"-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n"]
)
def test_bad_ca_file(tmp_path: Path, token_file: Path, content: bytes) -> None:
    """A CA file without a certificate is a problem with its mend."""
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(content)
    plane = {"url": "https://plane", "token_file": token_file, "ca_file": ca_file}
    assert problem_of(config_of(tmp_path, control_plane=plane)) == (
        f"control_plane.ca_file: {ca_file} holds no certificate in PEM form; name the PEM file of who signed the "
        "control plane's certificate"
    )


def test_missing_ca_file(tmp_path: Path, token_file: Path) -> None:
    """A CA file that is not there is a problem with its mend."""
    plane = {"url": "https://plane", "token_file": token_file, "ca_file": tmp_path / "none"}
    problem = problem_of(config_of(tmp_path, control_plane=plane))
    assert problem.startswith(f"control_plane.ca_file: cannot read {tmp_path}/none: No such file or directory; name ")


def test_bad_client_certificate(tmp_path: Path, token_file: Path) -> None:
    """A client certificate that is none, or is not there, is a problem that names both files."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    plane = {"url": "https://plane", "token_file": token_file, "client_cert_file": cert, "client_key_file": key}
    config = config_of(tmp_path, control_plane=plane)
    assert f"cannot read {cert} or its key: No such file" in problem_of(config)
    cert.write_text("garbage")
    key.write_text("garbage")
    problem = problem_of(config)
    assert problem.startswith(f"control_plane.client_cert_file: {cert} and {key} are no certificate with its key")
    assert problem.endswith("name the pair that was issued for this machine")


# --- tokens of the API ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no token; write one a line, as name:role:token"),
        (b"# nothing\n\n", "has no token"),
        (b"ok-token\nci:admin:hush\n", ", line 2: write name:role:token, with the role 'read' or 'operate'"),
        (b"ci:hush\n", ", line 1: write name:role:token"),
        (b":read:hush\n", ", line 1: write name:role:token"),
        (b"x" * (TOKENS_FILE_MAX_BYTES + 1), f"is larger than {TOKENS_FILE_MAX_BYTES} bytes; is it the right file?"),
    ],
)
def test_bad_tokens_file(tmp_path: Path, content: bytes, message: str) -> None:
    """A tokens file that the API would refuse at its start is told before, by line and without its content."""
    path = tmp_path / "tokens"
    path.write_bytes(content)
    problem = problem_of(config_of(tmp_path, api={"tokens_file": path}))
    assert problem.startswith(f"api.tokens_file: {path}")
    assert message in problem
    assert "hush" not in problem.replace(str(path), "")


def test_missing_tokens_file(tmp_path: Path) -> None:
    """A tokens file that is not there comes with the command that makes it."""
    path = tmp_path / "tokens"
    problem = problem_of(config_of(tmp_path, api={"tokens_file": path}))
    assert problem.endswith(f"No such file or directory; make it with `remotegpu-agent token new --append {path}`")


def test_good_tokens_file(tmp_path: Path) -> None:
    """Bare tokens, named ones, comments and colons in a token are all good, as the API reads them."""
    path = tmp_path / "tokens"
    path.write_text("# who\nbare\n  ci:operate:to:ken\nboard:read:x\n")
    assert check_files(config_of(tmp_path, api={"tokens_file": path}), {}) == []
