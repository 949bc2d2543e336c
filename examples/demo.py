"""`make demo`: a control plane and an agent on free ports, the example tasks through them, live output, the results.

Everything lives in one temporary directory and is gone at the end; `--keep` stays up until Ctrl-C instead. Exits 0 when
every task ended as its file says (label `expect`, else success).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from remotegpu_agent.cli.client import Client
from remotegpu_agent.cli.endpoints import Endpoint
from remotegpu_agent.cli.exits import Stop
from remotegpu_agent.cli.following import follow
from remotegpu_schemas.taskfile import load_task_file

EXAMPLES: Final = Path(__file__).resolve().parent
READY_TIMEOUT_S: Final = 60.0
TASKS_TIMEOUT_S: Final = 120.0
_POLL_S: Final = 0.1
_NAME_WIDTH: Final = 12


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


@dataclass(frozen=True)
class Plane:
    """The control plane as an operator calls it."""

    url: str
    token: str

    def call(self, method: str, path: str, body: bytes | None = None, content_type: str = "application/json") -> Any:
        """The data of an answer. Raises DemoError."""
        request = urllib.request.Request(f"{self.url}/api/v1/admin{path}", data=body, method=method)
        request.add_header("Authorization", f"Bearer {self.token}")
        request.add_header("Content-Type", content_type)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                envelope = json.load(answer)
        except urllib.error.HTTPError as error:
            raise DemoError(f"{method} {path}: HTTP {error.code}: {error.read(2000).decode()}") from None
        except OSError as error:
            raise DemoError(f"the control plane does not answer: {error}") from None
        return envelope["data"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="stay up at the end, and print the addresses")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    directory = Path(tempfile.mkdtemp(prefix="remotegpu-demo-"))
    try:
        with contextlib.ExitStack() as stack:
            return _demonstrate(directory, stack, keep=options.keep)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        for log in sorted(directory.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _demonstrate(directory: Path, stack: contextlib.ExitStack, *, keep: bool) -> int:
    plane = stack.enter_context(_control_plane(directory))
    print(f"control plane  {plane.url}")
    config = _configure(directory, plane)
    endpoint = stack.enter_context(_agent(directory, config))
    print(f"agent          {endpoint.url} (and {directory / 'agent.sock'})\n", flush=True)
    names: dict[str, str] = {}
    expected: dict[str, str] = {}
    for file in sorted((EXAMPLES / "tasks").glob("*.yaml")):
        content = file.read_bytes()
        task_ids = plane.call("POST", "/tasks", content, "application/yaml")["task_ids"]
        for task_id, submission in zip(task_ids, load_task_file(content, file.name), strict=True):
            names[task_id] = submission.form.name or file.stem
            expected[task_id] = submission.form.labels.get("expect", "succeeded")
    print(f"{len(names)} tasks submitted to the control plane; their output as it comes:\n", flush=True)
    results = _watch(plane, Client([Endpoint("demo", socket=str(directory / "agent.sock"))]), names)
    wrong = _print_results(results, names, expected)
    if keep:
        _stay(directory, plane, endpoint, config)
    return 1 if wrong else 0


# --- the two processes ---


@contextlib.contextmanager
def _control_plane(directory: Path) -> Generator[Plane]:
    token = os.urandom(16).hex()
    token_file = directory / "admin-token"
    token_file.touch(mode=0o600)
    token_file.write_text(token + "\n")
    command = [sys.executable, "-m", "control_plane", "--listen", "127.0.0.1:0", "--admin-token-file", str(token_file)]
    command += ["--database", str(directory / "plane.db"), "--ready-file", str(directory / "plane.json")]
    with _process(command, directory / "plane.log") as process:
        ready = _when_written(directory / "plane.json", process, "the control plane")
        yield Plane(ready["url"], token)


def _configure(directory: Path, plane: Plane) -> Path:
    """Enrol this machine and write the agent's config and token."""
    machine = plane.call("POST", "/machines", json.dumps({"name": "demo"}).encode())
    token_file = directory / "agent-token"
    token_file.touch(mode=0o600)
    token_file.write_text(machine["token"] + "\n")
    config = directory / "agent.yaml"
    sections = {
        "agent": {"machine_id": machine["machine_id"], "state_dir": str(directory / "state")},
        "control_plane": {"url": plane.url, "token_file": str(token_file)},
        "capacity": {"max_concurrent": 4},
        "api": {"listen": "127.0.0.1:0", "socket": str(directory / "agent.sock")},
    }
    config.write_text(json.dumps(sections, indent=2) + "\n")
    return config


@contextlib.contextmanager
def _agent(directory: Path, config: Path) -> Generator[Endpoint]:
    command = [sys.executable, "-m", "remotegpu_agent.cli", "--config", str(config), "run"]
    with _process(command, directory / "agent.log") as process:
        ready = _when_written(directory / "state" / "endpoints.json", process, "the agent")
        yield Endpoint("demo", url=ready["url"])


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
            process.wait(10)
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
            raise DemoError(f"{who} ended with code {process.returncode} before it was ready")
        time.sleep(0.02)
    raise DemoError(f"{who} was not ready within {READY_TIMEOUT_S:g} s")


# --- what a person sees ---


def _watch(plane: Plane, agent: Client, names: dict[str, str]) -> dict[str, Any]:
    """Show the output of each task from its start; the tasks as the plane has them once all have ended."""
    followed: dict[str, threading.Thread] = {}
    give_up_at = time.monotonic() + TASKS_TIMEOUT_S
    tasks: dict[str, Any] = {}
    while time.monotonic() < give_up_at:
        for task in agent.get("/tasks", [("limit", 200)])["tasks"]:
            if task["id"] in names and task["id"] not in followed and task["run_no"] > 0:
                thread = threading.Thread(target=_show_output, args=(agent, task["id"], names[task["id"]]), daemon=True)
                followed[task["id"]] = thread
                thread.start()
        tasks = {task_id: plane.call("GET", f"/tasks/{task_id}") for task_id in names}
        if all(task["status"] in {"completed", "failed", "cancelled"} for task in tasks.values()):
            for thread in followed.values():
                thread.join(10)
            return tasks
        time.sleep(_POLL_S)
    open_names = [names[task_id] for task_id, task in tasks.items() if task["status"] not in {"completed", "failed"}]
    raise DemoError(f"not ended within {TASKS_TIMEOUT_S:g} s: {', '.join(open_names)}")


def _show_output(agent: Client, task_id: str, name: str) -> None:
    rest = {"stdout": "", "stderr": ""}

    def write(stream: str, text: str) -> None:
        *lines, rest[stream] = (rest[stream] + text).split("\n")
        for line in lines:
            print(f"{name:<{_NAME_WIDTH}} | {line}", flush=True)

    with contextlib.suppress(Stop):
        follow(agent, task_id, ("stdout", "stderr"), write)


def _print_results(tasks: dict[str, Any], names: dict[str, str], expected: dict[str, str]) -> int:
    """The table; how many ended otherwise than they should."""
    print(f"\n{'NAME':<{_NAME_WIDTH}}  {'STATUS':<10}{'CAUSE':<12}{'EXIT':>5}{'RUNS':>6}{'SECONDS':>9}  ERROR")
    wrong = 0
    for task_id, task in tasks.items():
        result = task.get("result") or {}
        is_right = result.get("cause") == expected[task_id]
        wrong += not is_right
        seconds = (result.get("usage") or {}).get("wall_s")
        line = f"{names[task_id]:<{_NAME_WIDTH}}  {task['status']:<10}{result.get('cause') or '':<12}"
        line += f"{result.get('exit_code', ''):>5}{result.get('runs', ''):>6}"
        line += f"{seconds:>9.2f}" if seconds is not None else " " * 9
        remark = result.get("error") or ""
        if is_right and expected[task_id] != "succeeded":
            remark += " (as expected)"
        elif not is_right:
            remark += f" (expected: {expected[task_id]})"
        print(f"{line}  {remark}".rstrip())
    verdict = "every task ended as its file says" if not wrong else f"{wrong} tasks ended otherwise than expected"
    print(f"\n{len(tasks)} tasks, {verdict}.", flush=True)
    return wrong


def _stay(directory: Path, plane: Plane, endpoint: Endpoint, config: Path) -> None:
    """Print how to reach everything, and wait for Ctrl-C."""
    program = f"{Path(sys.executable).parent / 'remotegpu-agent'} --config {config}"
    print(
        f"\nIt stays up until Ctrl-C.\n"
        f"  control plane  {plane.url}   token: {plane.token}\n"
        f"  agent          {endpoint.url}   token: {(directory / 'state' / 'api-token').read_text().strip()}\n"
        f"  command line   {program} status\n"
        f"                 {program} submit --follow -- echo hello\n"
        f"  logs           {directory}/*.log",
        flush=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
