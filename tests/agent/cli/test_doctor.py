"""`doctor`: what is wrong with host, config, control plane and agent, against a real small HTTP server."""

from __future__ import annotations

import http.server
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from remotegpu_sidecar import grouping, placement
from remotegpu_sidecar.grouping import CgroupPlacement
from remotegpu_sidecar.placement import NO_GROUPS, NO_SCOPES
from remotegpu_sidecar.scopes import Systemd, SystemdPlacement
from tests import middle
from tests.agent.cli.program import Cli, run
from tests.agent.cli.scripted_agent import DEADLINE_S, LiveAgent

TOKEN = "hush-hush"


class Plane:
    """A control plane that gives one answer to everything, and keeps what it was asked."""

    def __init__(self) -> None:
        self.status, self.body = 404, json.dumps({"code": 30004, "message": "task not found", "data": None}).encode()
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        plane = self

        class Handler(http.server.BaseHTTPRequestHandler):
            """Answers."""

            def do_POST(self) -> None:
                """As it says."""
                body = self.rfile.read(int(self.headers["Content-Length"]))
                plane.asked.append((self.path, dict(self.headers), body))
                self.send_response(plane.status)
                self.send_header("Content-Length", str(len(plane.body)))
                self.end_headers()
                self.wfile.write(plane.body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class calls it so
                """Nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def secure(self, context: ssl.SSLContext) -> None:
        """From now on by TLS."""
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def start(self) -> None:
        """Serve."""
        self._thread.start()

    def stop(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._thread.join(DEADLINE_S)
        self._server.server_close()


@pytest.fixture
def plane() -> Iterator[Plane]:
    """A control plane."""
    plane = Plane()
    plane.start()
    yield plane
    plane.stop()


@pytest.fixture
def config(short_dir: Path) -> Path:
    """A stand-alone config in the test's own directory."""
    path = short_dir / "config.yaml"
    path.write_text(
        f"agent: {{state_dir: {short_dir}}}\napi: {{listen: '127.0.0.1:0', socket: {short_dir}/agent.sock}}\n"
    )
    return path


@pytest.fixture
def enrolled(config: Path, plane: Plane) -> Path:
    """The same with the control plane."""
    token = config.parent / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    config.write_text(config.read_text() + f"control_plane: {{url: {plane.url}/base, token_file: {token}}}\n")
    return config


def checks(cli: Cli, config: Path, code: int = 0) -> dict[str, dict[str, Any]]:
    """The findings by subject, from one JSON document."""
    found = cli("doctor", "--json", "--config", config)
    document = found.json()
    assert (found.code, found.err) == (code, "")
    assert (document["problems"] > 0) == (code == 1)
    assert TOKEN not in found.out
    return {check["subject"]: check for check in document["checks"]}


def test_stand_alone(cli: Cli, config: Path) -> None:
    """A good host without a running agent has no problem; that nobody runs is a warning."""
    found = checks(cli, config)
    assert {found[subject]["level"] for subject in ("python", "kernel", "bash", "config", "state directory")} == {"ok"}
    assert found["agent"]["level"] == "warning"
    assert found["control plane"]["text"] == "none is set: a stand-alone agent for local tasks"


def test_a_damaged_database_is_a_warning(cli: Cli, config: Path) -> None:
    """F26: one that was set aside is named until it is moved away, and so is one that is under suspicion."""
    aside = config.parent / "queue.db.damaged-20260101T000000Z"
    for path in (aside, aside.with_name(f"{aside.name}-wal")):
        path.touch()
    found = checks(cli, config)["database"]
    assert found["level"] == "warning"
    assert f"{aside.name} is what there was" in found["text"]
    aside.unlink()
    (config.parent / "queue.db.suspect").touch()
    assert "may be damaged" in checks(cli, config)["database"]["text"]


def test_text(config: Path) -> None:
    """For people each finding is a line, and the sum goes to standard error."""
    found = run("doctor", "--config", config)
    assert found.code == 0
    assert found.out.startswith("ok       python: ")
    warnings = sum(line.startswith("warning") for line in found.out.splitlines())
    assert warnings >= 1  # nobody runs; a host without all control groups has another one
    assert found.err == f"0 problems, {warnings} warning{'' if warnings == 1 else 's'}.\n"


def test_running_agent(agent: LiveAgent, cli: Cli, config: Path) -> None:
    """A running agent is asked for its version; its port is its own."""
    found = checks(cli, config)
    assert found["agent"] == {"subject": "agent", "level": "ok", "text": "runs, version 0.1.0, ready", "mend": ""}
    assert "api.listen" not in found


def test_taken_port(cli: Cli, config: Path) -> None:
    """A port that somebody else has is a problem."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        text = config.read_text().replace("127.0.0.1:0", f"127.0.0.1:{other.getsockname()[1]}")
        config.write_text(text)
        found = checks(cli, config, code=1)
    assert found["api.listen"]["level"] == "problem"
    assert "Address already in use" in found["api.listen"]["text"]


def test_invalid_config(cli: Cli, config: Path) -> None:
    """A config with mistakes is one finding among the others."""
    config.write_text("log: {levl: x}\n")
    found = checks(cli, config, code=1)
    assert "unknown key 'levl'" in found["config"]["text"]
    assert "python" in found


@pytest.mark.parametrize("content", [b"\x00\xff", b"a: [", b"- x"])
def test_garbage_config(cli: Cli, config: Path, content: bytes) -> None:
    """Whatever the config holds, the doctor goes on."""
    config.write_bytes(content)
    assert checks(cli, config, code=1)["config"]["level"] == "problem"


def test_missing_config(cli: Cli, tmp_path: Path) -> None:
    """A config that is not there is a problem, and no reason to stop."""
    assert checks(cli, tmp_path / "none.yaml", code=1)["config"]["level"] == "problem"


def test_plane(cli: Cli, enrolled: Path, plane: Plane) -> None:
    """A plane that does not know the task has taken the token; the call names a task that cannot exist."""
    found = checks(cli, enrolled)
    assert found["control plane"]["text"] == f"{plane.url}/base answers and takes the token"
    ((path, headers, _body),) = plane.asked
    assert path == "/base/api/v1/agent/tasks/remotegpu-doctor/lease/renew"
    assert (headers["X-Agent-Token"], headers["Authorization"]) == (TOKEN, f"Bearer {TOKEN}")


@pytest.mark.parametrize(
    ("status", "body", "level", "text"),
    [
        (200, b'{"code": 30004, "message": "x"}', "ok", "answers and takes the token"),
        (200, b'{"code": 0, "data": {}}', "ok", "answers and takes the token"),
        (401, b"no", "problem", "refuses the token (HTTP 401)"),
        (403, b"{}", "problem", "refuses the token (HTTP 403)"),
        (200, b'{"code": 401}', "problem", "refuses the token (HTTP 200)"),
        (200, b"<html>", "warning", "answers HTTP 200, but not as a control plane"),
        (404, b"\x00\xff", "warning", "answers HTTP 404, but not as a control plane"),
        (200, b"[" * 99999, "warning", "but not as a control plane"),
        (500, b'{"code": 30099}', "warning", "answers with an internal error"),
    ],
)
def test_answers_of_a_plane(
    cli: Cli, enrolled: Path, plane: Plane, status: int, body: bytes, level: str, text: str
) -> None:
    """Every kind of answer has its own finding."""
    plane.status, plane.body = status, body
    found = checks(cli, enrolled, code=1 if level == "problem" else 0)["control plane"]
    assert found["level"] == level
    assert text in found["text"]
    assert found["mend"] or level == "ok"


def test_closed_port(cli: Cli, enrolled: Path, plane: Plane) -> None:
    """A plane that takes no connection is a problem."""
    closed = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    closed.close()
    enrolled.write_text(enrolled.read_text().replace(plane.url, url))
    found = checks(cli, enrolled, code=1)["control plane"]
    assert "takes no connection on port" in found["text"]
    assert "Connection refused" in found["text"]


def test_what_is_no_http(cli: Cli, enrolled: Path, plane: Plane) -> None:
    """A plane that does not speak HTTP, or hangs up, is a problem."""
    from tests.agent.cli.test_app import Garbage

    with Garbage(b"\x00\xff\r\n") as server:
        enrolled.write_text(enrolled.read_text().replace(plane.url, server.url))
        found = checks(cli, enrolled, code=1)["control plane"]
    assert "does not speak HTTP as it should" in found["text"]


@pytest.mark.parametrize("host", ["no-such-host.invalid", f"{'x' * 70}.example"])
def test_host_without_address(cli: Cli, enrolled: Path, plane: Plane, host: str) -> None:
    """A name without an address is a problem of the name."""
    enrolled.write_text(enrolled.read_text().replace(plane.url, f"http://{host}"))
    assert f"{host} has no address" in checks(cli, enrolled, code=1)["control plane"]["text"]


@pytest.mark.parametrize(
    ("name", "is_known", "text"),
    [
        ("127.0.0.1", True, "answers and takes the token"),
        ("127.0.0.1", False, "the certificate of 127.0.0.1 is from a CA that is not trusted here"),
        ("other.test", True, "the certificate of 127.0.0.1 is for another host name"),
    ],
)
def test_tls(cli: Cli, enrolled: Path, plane: Plane, tmp_path: Path, name: str, is_known: bool, text: str) -> None:
    """A certificate that is not accepted is a problem in words; one of the CA in `ca_file` is fine."""
    ca, other = trustme.CA(), trustme.CA()
    plane.secure(middle.serving(ca.issue_cert(name)))
    file = middle.write_ca(ca if is_known else other, tmp_path / "ca.pem")
    mended = enrolled.read_text().replace("http://", "https://").replace("token_file:", f"ca_file: {file}, token_file:")
    enrolled.write_text(mended)
    is_fine = is_known and name == "127.0.0.1"
    found = checks(cli, enrolled, 0 if is_fine else 1)["control plane"]
    assert (found["level"] == "ok") == is_fine
    assert text in found["text"]


def test_a_proxy_that_cannot_be_used(cli: Cli, enrolled: Path, plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is named, never its value; loopback is reached without a proxy, so another plane is named."""
    enrolled.write_text(enrolled.read_text().replace(plane.url, "http://plane.test"))
    monkeypatch.setenv("HTTP_PROXY", "socks5://u:s3cret@127.0.0.1:1")
    found = cli("doctor", "--json", "--config", enrolled)
    [check] = [check for check in found.json()["checks"] if "HTTP_PROXY" in check["text"]]
    assert (check["subject"], check["level"]) == ("control_plane.url", "problem")
    assert "s3cret" not in found.out


def test_no_token(cli: Cli, enrolled: Path) -> None:
    """A missing token is one problem, told once."""
    (enrolled.parent / "token").unlink()
    found = checks(cli, enrolled, code=1)
    assert "cannot read" in found["control_plane.token_file"]["text"]
    assert "control plane" not in found


def test_open_secrets(cli: Cli, enrolled: Path) -> None:
    """A token that others can read is a warning with its mend."""
    token = enrolled.parent / "token"
    token.chmod(0o644)
    found = checks(cli, enrolled)["secrets"]
    assert (found["level"], found["mend"]) == ("warning", f"chmod 600 {token}")


# --- the placement in force, and what is missing with it ---

NO_MEMORY = "memory_gb is not enforced, and an OOM kill is not told from another SIGKILL: no memory controller"
NO_CPU = "cpus is not enforced: no cpu controller"
NO_PIDS = "the number of a run's processes is not bounded: no pids controller"


class Host:
    """What the host would offer for runs; the choice among it is the agent's own."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        self._set = monkeypatch.setattr
        self.offers()

    def offers(self, *, scopes: str | None = None, groups: str | None = None, is_systemd: bool = False) -> None:
        """Scopes and groups with these controllers; None where there are none of them."""

        async def find_scopes() -> SystemdPlacement | str:
            return "systemd is not for you" if scopes is None else SystemdPlacement(Systemd())

        self._set(placement, "_is_systemd_booted", lambda: is_systemd)
        self._set(placement, "_find_scopes", find_scopes)
        for name in ("cgroup.controllers", "cgroup.procs", "cgroup.subtree_control"):
            (self._directory / name).write_text("")
        (self._directory / "cgroup.controllers").write_text(scopes or groups or "")
        # As the kernel shows it to whoever looks for what systemd's groups can have.
        self._set(grouping, "find_mount", lambda _mountinfo: (str(self._directory), "/"))
        found = "no group for you" if groups is None else CgroupPlacement(str(self._directory))
        self._set(grouping, "find", lambda: found)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host that offers nothing yet."""
    return Host(tmp_path, monkeypatch)


def wish(config: Path, kind: str) -> None:
    """Set tasks.placement."""
    config.write_text(config.read_text() + f"tasks: {{placement: {kind}}}\n")


@pytest.mark.parametrize("kind", ["systemd", "auto"])
def test_runs_in_scopes(cli: Cli, config: Path, host: Host, kind: str) -> None:
    """Scopes with all controllers lack nothing; they are the best, so `auto` is them."""
    host.offers(scopes="cpu memory pids", is_systemd=True)
    wish(config, kind)
    found = checks(cli, config)["placement"]
    text = f"systemd (a transient scope per run), as uid {os.geteuid()}"
    assert found == {"subject": "placement", "level": "ok", "text": text, "mend": ""}


@pytest.mark.parametrize("kind", ["cgroup", "auto"])
def test_runs_in_control_groups(cli: Cli, config: Path, host: Host, kind: str) -> None:
    """Control groups with all controllers lack nothing; without systemd they are the best."""
    host.offers(groups="cpu memory pids io")
    wish(config, kind)
    found = checks(cli, config)["placement"]
    text = f"cgroup (a control group per run), as uid {os.geteuid()}"
    assert found == {"subject": "placement", "level": "ok", "text": text, "mend": ""}


@pytest.mark.parametrize("kind", ["systemd", "cgroup"])
@pytest.mark.parametrize(
    ("controllers", "missing"),
    [
        ("memory pids", (NO_CPU,)),
        ("cpu pids", (NO_MEMORY,)),
        ("cpu memory", (NO_PIDS,)),
        ("cpu", (NO_MEMORY, NO_PIDS)),
        ("", (NO_MEMORY, NO_CPU, NO_PIDS)),
    ],
)
def test_controllers_that_are_missing(
    cli: Cli, config: Path, host: Host, kind: str, controllers: str, missing: tuple[str, ...]
) -> None:
    """What is lost with each controller that is not there is said, and nothing else."""
    if kind == "systemd":
        host.offers(scopes=controllers, is_systemd=True)
    else:
        host.offers(groups=controllers)
    wish(config, kind)
    found = checks(cli, config)["placement"]
    assert found["level"] == "warning"
    assert found["text"].startswith(f"{kind} (")
    assert found["text"].partition("; missing: ")[2] == "; ".join(missing)


@pytest.mark.parametrize(
    ("kind", "is_systemd", "reasons"),
    [
        ("process-group", False, ()),
        ("process-group", True, (NO_SCOPES,)),
        ("auto", False, ("no scopes: process 1 is not systemd", "no control groups: no group for you")),
        (
            "auto",
            True,
            (
                "no scopes: systemd is not for you",
                "no control groups: systemd owns the control groups of this host",
                NO_SCOPES,
            ),
        ),
    ],
)
def test_runs_in_process_groups(
    cli: Cli, config: Path, host: Host, kind: str, is_systemd: bool, reasons: tuple[str, ...]
) -> None:
    """Wanted or for want of better: why there is nothing better comes first, then everything that is lost."""
    host.offers(is_systemd=is_systemd)
    wish(config, kind)
    found = checks(cli, config)["placement"]
    assert found["level"] == "warning"
    head, _, missing = found["text"].partition("; missing: ")
    assert head == f"process-group (no control groups), as uid {os.geteuid()}"
    assert missing == "; ".join((*reasons, *NO_GROUPS))


@pytest.mark.parametrize(
    ("kind", "is_systemd", "reason"),
    [
        ("systemd", False, "no scopes: process 1 is not systemd"),
        ("systemd", True, "no scopes: systemd is not for you"),
        ("cgroup", False, "no control groups: no group for you"),
        ("cgroup", True, "no control groups: systemd owns the control groups of this host"),
    ],
)
@pytest.mark.parametrize(
    ("uid", "mend"),
    [(0, "set tasks.placement to auto"), (1000, "set tasks.placement to auto, or run the agent as root")],
)
def test_a_placement_that_cannot_be(
    cli: Cli,
    config: Path,
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    is_systemd: bool,
    reason: str,
    uid: int,
    mend: str,
) -> None:
    """A wish that this host cannot fulfil is a problem, with the reason and a mend that is still to be had."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    host.offers(is_systemd=is_systemd)
    wish(config, kind)
    found = checks(cli, config, code=1)["placement"]
    assert found == {
        "subject": "placement",
        "level": "problem",
        "text": f"tasks.placement: {kind} is not possible here; {reason}",
        "mend": mend,
    }
