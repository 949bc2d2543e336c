"""How the command line finds its agent, and what it says when it does not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from remotegpu_agent.cli import endpoints
from remotegpu_agent.cli.endpoints import Endpoint, find_endpoints
from remotegpu_agent.cli.exits import Stop
from tests.agent.cli.program import Cli, environment
from tests.agent.cli.scripted_agent import LiveAgent


def config_at(directory: Path, text: str = "") -> Path:
    """A config with its own state directory."""
    path = directory / "config.yaml"
    path.write_text(f"agent: {{state_dir: {directory}}}\n{text}")
    return path


def closed_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


# --- what is tried -------------------------------------------------------------------------------------------------


def test_order(tmp_path: Path) -> None:
    """`--config` wins over `--url`, that over the variable, and the standard socket is last."""
    config = config_at(tmp_path, "api: {socket: /run/a.sock, listen: null}")
    environ = {"REMOTEGPU_AGENT_SOCKET": "/run/b.sock"}
    assert find_endpoints(config, "http://c", None, environ) == [Endpoint("api.socket", socket="/run/a.sock")]
    assert find_endpoints(None, "http://c/", None, environ) == [Endpoint("--url", url="http://c")]
    assert find_endpoints(None, None, None, environ) == [Endpoint("REMOTEGPU_AGENT_SOCKET", socket="/run/b.sock")]
    assert find_endpoints(None, None, None, {}) == [
        Endpoint("the standard socket", socket="/run/remotegpu-agent/agent.sock")
    ]


def test_written_endpoints_win_over_the_config(tmp_path: Path) -> None:
    """What the running agent wrote down is tried first; port 0 and a socket that was moved are told there only."""
    config = config_at(tmp_path, "api: {listen: '127.0.0.1:0'}")
    (tmp_path / "api-token").write_text("operator:operate:hush\n")
    (tmp_path / "endpoints.json").write_text(json.dumps({"socket": "/run/x.sock", "url": "http://127.0.0.1:41"}))
    assert find_endpoints(config, None, None, {}) == [
        Endpoint("endpoints.json", socket="/run/x.sock"),
        Endpoint("endpoints.json", url="http://127.0.0.1:41", token="hush"),
    ]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"socket": null, "url": null}', "\x00" * 9, "[" * 50000])
def test_unusable_written_endpoints(tmp_path: Path, content: str) -> None:
    """A file that cannot be read leaves the config's own word; one that says null means it."""
    config = config_at(tmp_path)
    (tmp_path / "endpoints.json").write_text(content)
    found = find_endpoints(config, None, None, {})
    assert [endpoint.origin for endpoint in found] == ([] if "socket" in content else ["api.socket"])


def test_port_zero_without_written_endpoints(tmp_path: Path) -> None:
    """A port that only the agent knows cannot be tried."""
    config = config_at(tmp_path, "api: {listen: '127.0.0.1:0', socket: null}")
    assert find_endpoints(config, None, None, {}) == []


def test_variables_over_the_config(tmp_path: Path) -> None:
    """The variables that move the agent's socket and state move the command line with it."""
    config = config_at(tmp_path, "api: {socket: /run/a.sock}")
    environ = {"REMOTEGPU_AGENT__API__SOCKET": "/run/b.sock", "REMOTEGPU_AGENT__API__LISTEN": "null"}
    assert find_endpoints(config, None, None, environ) == [Endpoint("api.socket", socket="/run/b.sock")]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "endpoints.json").write_text('{"socket": "/run/c.sock"}')
    environ = {"REMOTEGPU_AGENT__AGENT__STATE_DIR": str(tmp_path / "other")}
    assert find_endpoints(config, None, None, environ)[0].socket == "/run/c.sock"


def test_configured_tokens_file(tmp_path: Path) -> None:
    """The token for TCP is the first of the config's own file, unless one is named."""
    (tmp_path / "tokens").write_text("# people\n\nboard:read:first:x\nsecond\n")
    (tmp_path / "named").write_text("bare\n")
    config = config_at(tmp_path, f"api: {{tokens_file: {tmp_path}/tokens, socket: null}}")
    assert find_endpoints(config, None, None, {})[0].token == "first:x"
    assert find_endpoints(config, None, tmp_path / "named", {})[0].token == "bare"


@pytest.mark.parametrize("text", ["agent: 5\napi: [x]", "- a", "just text", ""])
def test_config_of_the_wrong_shape(tmp_path: Path, text: str) -> None:
    """A config that the agent would refuse does not keep the command line from the standard places."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert find_endpoints(path, None, None, {})[0].socket == endpoints.DEFAULT_SOCKET


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read the config file: No such file"), (b"a: [", "never closed"), (b"\x00\xff", "not UTF-8")],
)
def test_unreadable_config(tmp_path: Path, content: bytes | None, message: str) -> None:
    """A config that cannot be read is wrong usage."""
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Stop, match=message) as stopped:
        find_endpoints(path, None, None, {})
    assert stopped.value.code == 2


def test_endless_files() -> None:
    """Nothing that is named is read beyond its bound."""
    with pytest.raises(Stop, match="is larger than"):
        find_endpoints(Path("/dev/zero"), None, None, {})
    with pytest.raises(Stop, match="no token in it"):
        find_endpoints(None, "http://x", Path("/dev/zero"), {})


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://x", "http://", "http://x:0", "http://x:99999", "http://[::1", "http://x:y"]
)
def test_wrong_url(cli: Cli, url: str) -> None:
    """A URL that is none is wrong usage, with an example."""
    found = cli("status", f"--url={url}")
    assert (found.code, found.out) == (2, "")
    assert "is no URL of an agent; write for example http://127.0.0.1:8090" in found.err


def test_token_file_alone(cli: Cli, tmp_path: Path) -> None:
    """A token without the place that it is for is not ignored."""
    found = cli("status", "--token-file", tmp_path / "x")
    assert (found.code, found.err) == (
        2,
        "remotegpu-agent: --token-file is the token for --url or --config; give one of them too\n",
    )


@pytest.mark.parametrize("content", [None, b"", b"# x\n", b"\xff\xfe", b"two words"])
def test_wrong_token_file(cli: Cli, tmp_path: Path, content: bytes | None) -> None:
    """A token file without a token is wrong usage, and its content is not shown."""
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    found = cli("status", "--url", "http://127.0.0.1:1", "--token-file", path)
    assert found.code == 2
    assert found.err.startswith(f"remotegpu-agent: token file {path}: ")
    assert "two words" not in found.err


# --- a running agent -----------------------------------------------------------------------------------------------


def test_url_with_token(agent: LiveAgent, cli: Cli) -> None:
    """TCP wants a token, and one that may do what is asked."""
    agent.do(lambda operations: operations.add("task-1"))
    reader = agent.directory / "reader"
    reader.write_text("reader-secret")
    assert cli("list", "--url", agent.url, "--token-file", agent.token_file).code == 0
    assert cli("list", "--url", agent.url, "--token-file", reader).code == 0
    refused = cli("cancel", "task-1", "--url", agent.url, "--token-file", reader)
    assert (refused.code, refused.out) == (5, "")
    assert "may only read" in refused.err
    refused = cli("list", "--url", agent.url)
    assert refused.code == 5
    assert "(code 30016)" in refused.err
    assert "give a token of the agent's api.tokens_file by --token-file" in refused.err


def test_written_endpoints_of_a_running_agent(agent: LiveAgent, cli: Cli) -> None:
    """`--config` is enough to find an agent on a free port, and TCP serves when the socket does not."""
    config = config_at(agent.directory, f"api: {{listen: '127.0.0.1:0', tokens_file: {agent.token_file}}}")
    path = agent.directory / "endpoints.json"
    path.write_text(json.dumps({"socket": str(agent.socket), "url": agent.url}))
    assert cli("status", "--config", config).code == 0
    path.write_text(json.dumps({"socket": "/nowhere/agent.sock", "url": agent.url}))
    assert cli("status", "--config", config).code == 0


def test_not_running(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody there ends with 3, and the message names every place and what to do."""
    monkeypatch.setenv("REMOTEGPU_AGENT_SOCKET", str(tmp_path / "agent.sock"))
    found = cli("status", "--json")
    assert (found.code, found.out) == (3, "")
    assert found.err == (
        f"remotegpu-agent: the agent cannot be reached at unix:{tmp_path}/agent.sock (REMOTEGPU_AGENT_SOCKET): there "
        "is no such socket. Is it running (systemctl status remotegpu-agent)? Else name it by --config, "
        "REMOTEGPU_AGENT_SOCKET or --url\n"
    )


def test_dead_socket_and_closed_port(cli: Cli, short_dir: Path) -> None:
    """A socket that a killed agent left behind, and a closed port, are both named."""
    path = short_dir / "dead.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    (short_dir / "api-token").write_text("x\n")
    config = config_at(short_dir, f"api: {{socket: {path}, listen: '127.0.0.1:{closed_port()}'}}")
    found = cli("status", "--config", config)
    assert found.code == 3
    assert f"unix:{path} (api.socket): nobody listens there; http://127.0.0.1:" in found.err


@pytest.mark.parametrize("name", ["x" * 200, "/dev/null", "/proc/self/mem"])
def test_what_is_no_socket(cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A path that cannot be a socket is an agent that cannot be reached."""
    monkeypatch.setenv("REMOTEGPU_AGENT_SOCKET", name)
    assert cli("status").code == 3


@pytest.mark.parametrize("host", ["no-such-host.invalid", f"{'x' * 70}.example", "a..b"])
def test_host_without_address(cli: Cli, host: str) -> None:
    """A host that has no address, or cannot have one, is an agent that cannot be reached."""
    found = cli("status", "--url", f"http://{host}:8090")
    assert found.code == 3
    assert "the agent cannot be reached at http://" in found.err


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed")
def test_closed_socket(agent: LiveAgent) -> None:
    """Who may not use the socket is told who may."""
    agent.directory.chmod(0o755)
    code = (
        "import os, sys\nfrom remotegpu_agent.cli import main\n"
        "import remotegpu_agent.cli.app, remotegpu_agent.cli.client, remotegpu_agent.cli.output\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\nmain(sys.argv[1:])"
    )
    environ = environment(REMOTEGPU_AGENT_SOCKET=str(agent.socket))
    done = subprocess.run(
        [sys.executable, "-c", code, "list"], capture_output=True, text=True, env=environ, check=False
    )
    assert done.returncode == 3
    assert "Run this as root or as a member of the group 'remotegpu'" in done.stderr


def test_a_config_with_tls(tmp_path: Path) -> None:
    """With a certificate the agent's address is https."""
    config = config_at(tmp_path, "api: {socket: null, tls_cert_file: /c, tls_key_file: /k}")
    assert find_endpoints(config, None, None, {}) == [Endpoint("api.listen", url="https://127.0.0.1:8090")]
