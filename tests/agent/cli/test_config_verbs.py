"""`config`, `validate`, `token`, `version` and `run`: what needs no running agent."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from remotegpu_agent.config import Config
from remotegpu_schemas.errors import Misconfigured
from tests.agent.cli.program import Cli, run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config whose paths lie in the test's own directory."""
    path = tmp_path / "config.yaml"
    path.write_text(
        f"agent: {{state_dir: {tmp_path}/state}}\n"
        f"api:\n  socket: {tmp_path}/agent.sock\n"
        "tasks: {env: {WANDB_KEY: hush}}\n"
        "log:\n  level: warning\n"
    )
    return path


# --- config --------------------------------------------------------------------------------------------------------


def test_show(cli: Cli, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting is shown with its origin, file and line for one; the variables of tasks are hidden."""
    monkeypatch.setenv("REMOTEGPU_AGENT__LEASE__TTL", "10m")
    found = cli("config", "show", "--config", config, "--set", "log.format=json")
    assert (found.code, found.err) == (0, "")
    lines = found.out.splitlines()
    assert f'  state_dir: "{config.parent}/state"  # {config}:1' in lines
    assert f'  level: "warning"  # {config}:6' in lines
    assert '  format: "json"  # --set log.format' in lines
    assert "  ttl: 600.0  # environment variable REMOTEGPU_AGENT__LEASE__TTL" in lines
    assert '  listen: "127.0.0.1:8090"  # default' in lines
    assert '  max_concurrent: "auto"  # default' in lines
    assert '"WANDB_KEY": "[hidden]"' in found.out
    assert "hush" not in found.out


def test_show_json(cli: Cli, config: Path) -> None:
    """With --json all sections are one document, without what may be secret."""
    found = cli("config", "show", "--json", "--config", config)
    document = found.json()
    assert set(document) == set(Config.model_fields)
    assert document["tasks"]["env"] == {"WANDB_KEY": "[hidden]"}
    assert document["log"] == {"level": "warning", "format": "auto"}


@pytest.mark.parametrize("verb", ["show", "check"])
def test_invalid(cli: Cli, config: Path, verb: str) -> None:
    """A config with mistakes ends with 2 and the report."""
    config.write_text("log:\n  levl: info\n")
    found = cli("config", verb, "--config", config)
    assert (found.code, found.out) == (2, "")
    assert f"{config}:2:3: unknown key 'levl' in 'log'; did you mean 'level'?" in found.err


def test_check(cli: Cli, config: Path) -> None:
    """A config that can be used is called good, and nothing is made by looking."""
    found = cli("config", "check", "--config", config)
    assert (found.code, found.out, found.err) == (0, f"{config}: good\n", "")
    assert cli("config", "check", "--json", "--config", config).json() == {"problems": []}
    assert [path.name for path in config.parent.iterdir()] == ["config.yaml"]


def test_check_files(cli: Cli, config: Path) -> None:
    """What the config names and is not there ends with 2, a line each; with --json they are one document."""
    arguments = ["--set", "control_plane.url=http://plane", "--set", "tasks.run_as=no-such-user"]
    found = cli("config", "check", "--config", config, *arguments)
    assert (found.code, found.out) == (2, "")
    first, second = found.err.splitlines()
    assert first.startswith("remotegpu-agent: control_plane.token_file: no token for the control plane; name the file")
    assert second == "tasks.run_as: there is no user 'no-such-user' on this host; create it or name another"
    problems = cli("config", "check", "--json", "--config", config, *arguments)
    assert problems.code == 2
    assert len(problems.json()["problems"]) == 2


def test_path(cli: Cli, config: Path) -> None:
    """The path is the one that is used, whether it exists or not."""
    assert cli("config", "path").out == "/etc/remotegpu-agent/config.yaml\n"
    assert cli("--config", config, "config", "path").out == f"{config}\n"
    assert cli("config", "path", "--json", "--config", "/none").json() == {"path": "/none", "exists": False}


def test_missing(cli: Cli, tmp_path: Path) -> None:
    """A config that was named and is not there is wrong usage."""
    found = cli("config", "check", "--config", tmp_path / "none.yaml")
    assert found.code == 2
    assert found.err == (
        f"remotegpu-agent: {tmp_path}/none.yaml: there is no such config file; make one with `remotegpu-agent setup`\n"
    )


# --- run -----------------------------------------------------------------------------------------------------------


def test_run_with_a_wrong_config(config: Path) -> None:
    """The daemon does not start with a config that cannot work: code 2, and every reason."""
    config.write_text(config.read_text() + "lease: {ttl: soon}\n")
    found = run("run", "--config", config)
    assert (found.code, found.out) == (2, "")
    assert "'lease.ttl' must be a duration, not 'soon'" in found.err


def test_run_with_missing_files(config: Path) -> None:
    """Nor does it start where a file that it needs is missing."""
    found = run("run", "--config", config, "--set", f"agent.state_dir={config}/x")
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("remotegpu-agent: agent.state_dir: ")


@pytest.mark.parametrize(("ends", "code"), [(0, 0), (3, 3), (Misconfigured("api.listen: taken"), 2)])
def test_run(cli: Cli, config: Path, monkeypatch: pytest.MonkeyPatch, ends: int | Exception, code: int) -> None:
    """`run` hands the checked config to the daemon, and ends as it does."""
    import remotegpu_agent

    given: list[Config] = []

    def run_daemon(found: Config) -> int:
        given.append(found)
        if isinstance(ends, Exception):
            raise ends
        return ends

    daemon = types.ModuleType("remotegpu_agent.daemon")
    daemon.run = run_daemon  # type: ignore[attr-defined]  # a stand-in for the module
    monkeypatch.setitem(sys.modules, "remotegpu_agent.daemon", daemon)
    monkeypatch.setattr(remotegpu_agent, "daemon", daemon, raising=False)
    monkeypatch.setattr("remotegpu_agent.logging.set_up", lambda *_: None)
    found = cli("run", "--config", config, "--set", "log.level=debug")
    assert found.code == code
    assert given[0].log.level == "debug"
    assert found.err == ("remotegpu-agent: api.listen: taken\n" if code == 2 else "")


# --- validate ------------------------------------------------------------------------------------------------------


def test_validate(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files of all directories are checked; those that are good and those that are not are told apart."""
    monkeypatch.chdir(tmp_path)
    Path("tasks").mkdir()
    Path("tasks/a.yaml").write_text("task: {command: a}\n---\ntask: {command: b}\n")
    Path("tasks/b.json").write_text('{"task": {"comand": "x"}}')
    Path("tasks/readme.txt").write_text("no task")
    Path("c.yml").write_bytes(b"\x00\xff")
    found = cli("validate", "tasks", "c.yml")
    assert (found.code, found.out) == (2, "tasks/a.yaml: good, 2 tasks\n")
    assert "tasks/b.json:1:11: unknown key 'comand' in the task; did you mean 'command'?" in found.err
    assert found.err.endswith("2 of 3 files cannot be used.\n")
    document = cli("validate", "--json", "tasks").json()
    assert [(file["file"], file["tasks"], len(file["problems"])) for file in document["files"]] == [
        ("tasks/a.yaml", 2, 0),
        ("tasks/b.json", 0, 1),
    ]


def test_validate_good(cli: Cli, tmp_path: Path) -> None:
    """Good files end with 0."""
    (tmp_path / "a.yaml").write_text("task: {command: a}")
    assert cli("validate", tmp_path / "a.yaml").out == f"{tmp_path}/a.yaml: good, 1 task\n"


@pytest.mark.parametrize("name", ["none.yaml", ".", "/proc/self/mem"])
def test_validate_nothing(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A file that is not there, a directory without task files, and what cannot be read, are wrong usage."""
    monkeypatch.chdir(tmp_path)
    found = cli("validate", name)
    assert (found.code, found.out) == (2, "")
    assert len(found.err.splitlines()) == 1


# --- token ---------------------------------------------------------------------------------------------------------


def test_token(cli: Cli) -> None:
    """A token is printed as the line of a tokens file, and is never the same."""
    lines = {cli("token", "new", "--name", "grafana", "--role", "read").out for _ in range(3)}
    assert len(lines) == 3
    assert all(line.startswith("grafana:read:") and len(line.strip()) > 50 for line in lines)


def test_token_append(cli: Cli, tmp_path: Path) -> None:
    """Appended tokens stand a line each, in a file that is its owner's only, and the API accepts them."""
    from remotegpu_agent.api.tokens import Role, load_tokens

    path = tmp_path / "tokens"
    first = cli("token", "new", "--append", path).out.strip()
    path.write_text(path.read_text().rstrip("\n"))
    second = cli("token", "new", "--append", path, "--role", "read", "--name", "board", "--json").json()
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text().splitlines()) == 2
    tokens = load_tokens(path)
    found = tokens.find(first), tokens.find(second["token"])
    assert [(token.name, token.role) for token in found if token is not None] == [
        ("operator", Role.OPERATE),
        ("board", Role.READ),
    ]


def test_token_append_fails(cli: Cli, tmp_path: Path) -> None:
    """A file that cannot be written, and a link, are refused; no token that nobody stored is printed."""
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for path in (tmp_path / "none" / "tokens", tmp_path, tmp_path / "link"):
        found = cli("token", "new", "--append", path)
        assert (found.code, found.out) == (1, "")
        assert f"{path}: cannot be written: " in found.err
    assert not (tmp_path / "target").exists()


# --- version -------------------------------------------------------------------------------------------------------


def test_version(cli: Cli) -> None:
    """The version of program and Python, for people and for programs."""
    assert cli("version").out.startswith("remotegpu-agent 0.1.0 (Python 3.")
    assert set(cli("version", "--json").json()) == {"version", "python"}
    assert json.loads(run("version", "--json").out)["version"] == "0.1.0"
