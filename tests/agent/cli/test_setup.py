"""`setup`: flags or questions, a backup, and nothing written that could not work."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest

from remotegpu_agent.config import load_config
from tests.agent.cli.program import PROGRAM, Cli, environment
from tests.agent.cli.scripted_agent import DEADLINE_S


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Where the config is to be written."""
    return tmp_path / "etc" / "config.yaml"


@pytest.fixture(autouse=True)
def _socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMOTEGPU_AGENT__API__SOCKET", str(tmp_path / "agent.sock"))


def answer_all(config: Path, *answers: tuple[str, str], arguments: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run `setup` on a terminal of its own, give each answer to its question; the exit code and the whole screen."""
    screen, terminal = pty.openpty()
    environ = environment(REMOTEGPU_AGENT__API__SOCKET=os.environ["REMOTEGPU_AGENT__API__SOCKET"])
    with subprocess.Popen(
        [*PROGRAM, "setup", "--config", str(config), *arguments],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, env=environ,
    ) as child:  # fmt: skip
        os.close(terminal)
        deadline = time.monotonic() + DEADLINE_S
        seen, shown = "", ""
        try:
            for question, answer in (*answers, ("", "")):
                while not question or question not in seen:
                    piece = read_some(screen, deadline)
                    if not piece:
                        assert not question, f"{question!r} was not asked: {shown}"
                        break
                    seen, shown = seen + piece, shown + piece
                if answer == "\x03":
                    child.send_signal(signal.SIGINT)
                elif question:
                    os.write(screen, answer.encode() + (b"" if answer == "\x04" else b"\n"))
                seen = ""
            code = child.wait(DEADLINE_S)
        except BaseException:
            child.kill()
            raise
        finally:
            os.close(screen)
    assert "Traceback" not in shown
    return code, shown.replace("\r\n", "\n")


def read_some(screen: int, deadline: float) -> str:
    """What came to the screen; nothing once the program has gone (pty(7): EIO)."""
    ready, _, _ = select.select([screen], [], [], max(0.0, deadline - time.monotonic()))
    assert ready, "no output in time"
    with contextlib.suppress(OSError):
        return os.read(screen, 65536).decode()
    return ""


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A file with a token."""
    path = tmp_path / "my-token"
    path.write_text("hush\n")
    return path


# --- flags ---------------------------------------------------------------------------------------------------------


def test_flags(cli: Cli, config: Path, tmp_path: Path, token_file: Path) -> None:
    """With all flags and --yes nothing is asked, and the agent could run with what was written."""
    found = cli(
        "setup", "--config", config, "--url", "http://plane.example", "--machine-id", "007", "--token-file", token_file,
        "--state-dir", tmp_path / "state", "--yes",
    )  # fmt: skip
    assert (found.code, found.out) == (0, "")
    assert found.err.splitlines() == [
        f"written: {config}",
        f"good. Next: remotegpu-agent --config {config} doctor, then: remotegpu-agent --config {config} run",
    ]
    written = load_config(config, {})
    assert (written.agent.machine_id, written.agent.state_dir) == ("007", tmp_path / "state")
    assert (written.control_plane.url, written.control_plane.token_file) == ("http://plane.example", token_file)


def test_token(cli: Cli, config: Path, tmp_path: Path) -> None:
    """A token goes into a file beside the config that only its owner may read."""
    found = cli("setup", "--config", config, "--url", "http://p", "--token", " hush ", "--state-dir", tmp_path, "--yes")
    token_file = config.parent / "control-plane-token"
    assert (found.code, token_file.read_text()) == (0, "hush\n")
    assert token_file.stat().st_mode & 0o777 == 0o600
    assert config.stat().st_mode & 0o777 == 0o644
    assert "hush" not in found.err + config.read_text()


def test_stand_alone(cli: Cli, config: Path, tmp_path: Path) -> None:
    """Without a control plane there is nothing to ask for."""
    found = cli("setup", "--config", config, "--url", "", "--state-dir", tmp_path, "--yes", "--json")
    assert found.code == 0
    assert found.json() == {"written": [str(config)], "problems": []}
    assert load_config(config, {}).control_plane.url is None


def test_options_before_the_verb(cli: Cli, config: Path, tmp_path: Path, token_file: Path) -> None:
    """`--url` and `--token-file` in front of the verb are not lost."""
    cli("--url", "http://p", "--token-file", token_file, "setup", "--config", config, "--state-dir", tmp_path, "--yes")
    written = load_config(config, {}).control_plane
    assert (written.url, written.token_file) == ("http://p", token_file)


def test_backup(cli: Cli, config: Path, tmp_path: Path) -> None:
    """A config that is replaced is kept as it was, byte for byte, for its owner only."""
    config.parent.mkdir()
    config.write_bytes(b"log: {level: debug}\r\n# \xff\n")
    found = cli("setup", "--config", config, "--url", "", "--state-dir", tmp_path, "--yes")
    backup = config.with_name("config.yaml.bak")
    assert found.code == 0
    assert backup.read_bytes() == b"log: {level: debug}\r\n# \xff\n"
    assert backup.stat().st_mode & 0o777 == 0o600
    assert f"written: {backup}" in found.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "plane"], "'control_plane.url' must be a URL with http or https and a host"),
        (["--url", "", "--machine-id", "a b"], "'agent.machine_id' must begin with a letter or digit"),
        (["--url", "http://p", "--token", "two words"], "must hold one token: a single line"),
        (["--url", "http://p", "--token-file", "/none/token"], "--token-file: cannot read /none/token: No such file"),
        (["--url", "http://p", "--token-file", "/dev/null"], "the token /dev/null is empty"),
        (["--url", "http://p", "--token-file", "/dev/zero"], "the token /dev/zero is larger than"),
        (["--url", "http://p", "--token", "a", "--token-file", "/x"], "give --token or --token-file, not both"),
        (["--from-agent-yaml", "/x"], "--from-agent-yaml is not supported by this version"),
    ],
)
def test_nothing_is_written(cli: Cli, config: Path, arguments: list[str], message: str) -> None:
    """What could not work ends with 2, and the config that is there stays."""
    config.parent.mkdir()
    config.write_text("# mine\n")
    found = cli("setup", "--config", config, *arguments, "--yes")
    assert (found.code, found.out) == (2, "")
    assert message in found.err
    assert [path.name for path in config.parent.iterdir()] == ["config.yaml"]
    assert config.read_text() == "# mine\n"


def test_missing_token(cli: Cli, config: Path, tmp_path: Path) -> None:
    """A control plane without a token is written (the token may come from systemd), and told as a problem."""
    found = cli("setup", "--config", config, "--url", "http://p", "--state-dir", tmp_path, "--yes", "--json")
    assert found.code == 1
    assert found.json()["written"] == [str(config)]
    assert "problem: control_plane.token_file: no token for the control plane" in found.err
    assert f"mend this, then: remotegpu-agent --config {config} doctor" in found.err


@pytest.mark.parametrize("place", ["/proc/x/config.yaml", "/dev/null/config.yaml", "/dev/null", "/"])
def test_unwritable(cli: Cli, place: str) -> None:
    """A place where no config can be is an error."""
    found = cli("setup", "--config", place, "--url", "", "--yes")
    assert found.code in {1, 2}
    assert found.err.startswith(f"remotegpu-agent: {place}: ")


def test_no_terminal(cli: Cli, config: Path) -> None:
    """Without a terminal nobody can be asked."""
    found = cli("setup", "--config", config)
    assert found.code == 2
    assert "give the flags and --yes" in found.err
    assert not config.exists()


# --- questions -----------------------------------------------------------------------------------------------------


def test_questions(config: Path, tmp_path: Path) -> None:
    """On a terminal what is missing is asked for, and the token is not shown."""
    code, shown = answer_all(
        config,
        ("URL of the control plane", "http://plane.example"),
        ("machine_id", "gpu-17"),
        ("token (not shown)", "hush-hush"),
        ("directory for the agent's state", str(tmp_path / "state")),
    )
    assert code == 0
    assert "hush-hush" not in shown
    assert (config.parent / "control-plane-token").read_text() == "hush-hush\n"
    written = load_config(config, {})
    assert (written.agent.machine_id, written.control_plane.url) == ("gpu-17", "http://plane.example")


def test_only_what_is_missing_is_asked(config: Path, tmp_path: Path) -> None:
    """What the flags say is not asked again; a stand-alone agent needs no token."""
    code, shown = answer_all(config, ("URL of the control plane", ""), arguments=("--state-dir", str(tmp_path)))
    assert (code, "token" in shown, "machine_id" in shown) == (0, False, False)


@pytest.mark.parametrize(("answer", "code", "content"), [("n", 1, "# mine\n"), ("", 1, "# mine\n"), ("y", 0, None)])
def test_replace(config: Path, tmp_path: Path, answer: str, code: int, content: str | None) -> None:
    """A config that is there is replaced only by who says yes."""
    config.parent.mkdir()
    config.write_text("# mine\n")
    found, shown = answer_all(config, ("Replace it", answer), arguments=("--url", "", "--state-dir", str(tmp_path)))
    assert found == code
    assert content is None or config.read_text() == content
    assert ("nothing was changed" in shown) == (code == 1)


@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_interrupted(config: Path, key: str) -> None:
    """Ctrl-C and Ctrl-D at a question end with 130, and nothing is written."""
    code, shown = answer_all(config, ("URL of the control plane", key))
    assert code == 130
    assert shown.rstrip().endswith("interrupted")
    assert not config.exists()


def test_interrupted_at_the_token(config: Path) -> None:
    """So they do where nothing is shown."""
    code, _ = answer_all(config, ("URL", "http://p"), ("machine_id", ""), ("token", "\x04"))
    assert code == 130
    assert not config.exists()
