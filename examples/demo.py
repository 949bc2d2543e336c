"""`make demo`: a control plane and an agent on free ports, the example tasks through them, live output, the results.

Everything lives in one temporary directory and is gone at the end; `--keep` stays up until Ctrl-C instead. Exits 0 when
every task ended as its file says (label `expect`, else success).
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from local_fleet import EXAMPLES, Agent, FleetError, Plane, agent, control_plane
from remotegpu_agent.cli.client import Client
from remotegpu_agent.cli.endpoints import Endpoint
from remotegpu_agent.cli.exits import Stop
from remotegpu_agent.cli.following import follow
from remotegpu_schemas.taskfile import load_task_file

TASKS_TIMEOUT_S: Final = 120.0
_LOOK_AGAIN_S: Final = 0.1
_NAME_WIDTH: Final = 12


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
    except FleetError as error:
        print(f"demo: {error}", file=sys.stderr)
        for log in sorted(directory.glob("*.log")):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _demonstrate(directory: Path, stack: contextlib.ExitStack, *, keep: bool) -> int:
    plane = stack.enter_context(control_plane(directory))
    print(f"control plane  {plane.url}")
    sections = {**plane.enrol(directory), "capacity": {"max_concurrent": 4}}
    host = stack.enter_context(agent(directory, sections))
    print(f"agent          {host.url} (and {host.socket})\n", flush=True)
    names: dict[str, str] = {}
    expected: dict[str, str] = {}
    for file in sorted((EXAMPLES / "tasks").glob("*.yaml")):
        content = file.read_bytes()
        task_ids = plane.call("POST", "/tasks", content, "application/yaml")["task_ids"]
        for task_id, submission in zip(task_ids, load_task_file(content, file.name), strict=True):
            names[task_id] = submission.form.name or file.stem
            expected[task_id] = submission.form.labels.get("expect", "succeeded")
    print(f"{len(names)} tasks submitted to the control plane; their output as it comes:\n", flush=True)
    results = _watch(plane, Client([Endpoint("demo", socket=str(host.socket))]), names)
    wrong = _print_results(results, names, expected)
    if keep:
        _stay(directory, plane, host)
    return 1 if wrong else 0


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
        time.sleep(_LOOK_AGAIN_S)
    open_names = [names[task_id] for task_id, task in tasks.items() if task["status"] not in {"completed", "failed"}]
    raise FleetError(f"not ended within {TASKS_TIMEOUT_S:g} s: {', '.join(open_names)}")


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


def _stay(directory: Path, plane: Plane, host: Agent) -> None:
    """Print how to reach everything, and wait for Ctrl-C."""
    program = f"{Path(sys.executable).parent / 'remotegpu-agent'} --config {host.config}"
    print(
        f"\nIt stays up until Ctrl-C.\n"
        f"  control plane  {plane.url}   token: {plane.token}\n"
        f"  agent          {host.url}   token file: {host.state_dir / 'api-token'}\n"
        f"  command line   {program} status\n"
        f"                 {program} submit --follow -- echo hello\n"
        f"  logs           {directory}/*.log",
        flush=True,
    )
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
