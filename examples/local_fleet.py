"""A control plane and agents on this machine, each a process of its own: for the demo and the benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

EXAMPLES: Final = Path(__file__).resolve().parent
READY_TIMEOUT_S: Final = 60.0
_STOP_TIMEOUT_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.02


class FleetError(Exception):
    """Something does not start or does not answer; the message says what."""


@dataclass(frozen=True)
class Plane:
    """The control plane as an operator calls it."""

    url: str
    token: str

    def call(self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json") -> Any:
        """The data of an answer. Raises FleetError."""
        request = urllib.request.Request(f"{self.url}/api/v1/admin{path}", data=body, method=method)
        request.add_header("Authorization", f"Bearer {self.token}")
        request.add_header("Content-Type", content_type)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                envelope = json.load(answer)
        except urllib.error.HTTPError as error:
            raise FleetError(f"{method} {path}: HTTP {error.code}: {error.read(2000).decode()}") from None
        except OSError as error:
            raise FleetError(f"the control plane does not answer: {error}") from None
        return envelope["data"]

    def enrol(self, directory: Path) -> dict[str, Any]:
        """Enrol a machine and keep its token in the directory; what an agent's config needs of it."""
        machine = self.call("POST", "/machines", json.dumps({"name": directory.name}).encode())
        token_file = directory / "agent-token"
        token_file.touch(mode=0o600)
        token_file.write_text(machine["token"] + "\n")
        return {
            "agent": {"machine_id": machine["machine_id"]},
            "control_plane": {"url": self.url, "token_file": str(token_file)},
        }


@dataclass(frozen=True)
class Agent:
    """A running agent and where it is reached."""

    config: Path
    state_dir: Path
    socket: Path
    url: str | None
    pid: int


@contextlib.contextmanager
def control_plane(directory: Path) -> Generator[Plane]:
    """A control plane on a free port, with its database and log in the directory."""
    token = os.urandom(16).hex()
    token_file = directory / "admin-token"
    token_file.touch(mode=0o600)
    token_file.write_text(token + "\n")
    command = [sys.executable, "-m", "control_plane", "--listen", "127.0.0.1:0", "--admin-token-file", str(token_file)]
    command += ["--database", str(directory / "plane.db"), "--ready-file", str(directory / "plane.json")]
    with _process(command, directory / "plane.log") as process:
        ready = _when_written(directory / "plane.json", process, "the control plane")
        yield Plane(ready["url"], token)


@contextlib.contextmanager
def agent(directory: Path, sections: Mapping[str, Mapping[str, Any]]) -> Generator[Agent]:
    """An agent with its state in the directory; `sections` of the config are laid over what keeps it there."""
    config: dict[str, Any] = {
        "agent": {"state_dir": str(directory / "state")},
        "api": {"listen": "127.0.0.1:0", "socket": str(directory / "agent.sock")},
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    file = directory / "agent.yaml"
    file.write_text(json.dumps(config, indent=2) + "\n")
    command = [sys.executable, "-m", "remotegpu_agent.cli", "--config", str(file), "run"]
    with _process(command, directory / "agent.log") as process:
        ready = _when_written(directory / "state" / "endpoints.json", process, "the agent")
        yield Agent(file, directory / "state", directory / "agent.sock", ready["url"], process.pid)


@contextlib.contextmanager
def _process(command: Sequence[str], log: Path) -> Generator[subprocess.Popen[bytes]]:
    """A background process with its output in a file; ended with SIGTERM, and SIGKILL if it does not hear."""
    environ = {**os.environ, "PYTHONPATH": str(EXAMPLES), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _when_written(path: Path, process: subprocess.Popen[bytes], who: str) -> dict[str, Any]:
    """The content of a file that a process writes when it is ready."""
    give_up_at = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < give_up_at:
        with contextlib.suppress(FileNotFoundError, ValueError):
            content: dict[str, Any] = json.loads(path.read_text())
            return content
        if process.poll() is not None:
            raise FleetError(f"{who} ended with code {process.returncode} before it was ready")
        time.sleep(_LOOK_AGAIN_S)
    raise FleetError(f"{who} was not ready within {READY_TIMEOUT_S:g} s")
