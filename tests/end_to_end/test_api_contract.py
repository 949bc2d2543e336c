"""The running agent does what its OpenAPI document says: thousands of calls that schemathesis derives from it.

What is submitted here has made-up commands, so nothing may start: the agent waits for 64 TiB of memory. What runs was
started before, by an agent that waited for nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import sys
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from remotegpu_agent.api.openapi import text
from remotegpu_agent.api.routes import ROUTES
from remotegpu_queue import outbox
from remotegpu_schemas.attempt import AttemptId
from tests.end_to_end.agent_process import REPOSITORY, AgentProcess
from tests.queue.support import open_inline
from tests.scale import IS_LONG, scaled

CASES_AT_LEAST: Final = 300
SLEEPERS: Final = tuple(f"sleeper-{number:02}" for number in range(60))
LETTERS: Final = 2 * len(SLEEPERS)
ALL_CHECKS: Final = {
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "use_after_free",
    "ensure_resource_availability",
    "ignored_auth",
    "object_level_authorization",
}
DEADLINE_S: Final = scaled(240, 3000)


def settings() -> dict[str, Any]:
    """TCP for schemathesis; and should anything start in spite of all, it has no rights."""
    user = {"run_as": "nobody"} if os.geteuid() == 0 else {}
    return {"api": {"listen": "127.0.0.1:0"}, "capacity": {"max_concurrent": len(SLEEPERS)}, "tasks": user}


@contextlib.asynccontextmanager
async def blocked_agent(directory: Path) -> AsyncGenerator[tuple[AgentProcess, dict[str, int]]]:
    """An agent that starts nothing, and the process ids by task of what runs all the same; both gone at the end."""
    async with AgentProcess(directory, settings()) as before:
        for task_id in SLEEPERS:
            await before.submit(id=task_id, command="echo begun; exec sleep 900")
        processes = {task_id: (await before.wait_running(task_id))["process_id"] for task_id in SLEEPERS}
    await asyncio.to_thread(add_dead_letters, directory / "state" / "queue.db")
    short = {**settings(), "admission": {"memory_free_gb": 65536}}
    async with AgentProcess(directory, short) as host:
        try:
            await host.until_shown("/queue/status", lambda status: "memory_short" in kinds(status))
            yield host, processes
        finally:
            for task_id in SLEEPERS:
                await host.call("POST", f"/tasks/{task_id}/resume")
                await host.call("POST", f"/tasks/{task_id}/cancel")
            for task_id in SLEEPERS:
                await host.wait_for(task_id)


def kinds(status: dict[str, Any]) -> list[str]:
    """What keeps the agent from starting anything."""
    return [block["kind"] for block in status["blocks"]]


def add_dead_letters(path: Path) -> None:
    """Reports of the tasks that run, as a control plane would have refused them."""
    now_ms = int(time.time() * 1000)
    with contextlib.closing(open_inline(path)) as db:
        attempts = [AttemptId(row["attempt_id"]) for row in db.execute("SELECT attempt_id FROM attempts")]
        for attempt_id in attempts:
            outbox.add_report(db, attempt_id, "start", {"run_no": 1}, now_ms, "boot")
            outbox.add_report(db, attempt_id, "progress", {"percent": 10}, now_ms, "boot")
        for row in db.execute("SELECT id FROM outbox").fetchall():
            outbox.report_dead(db, row["id"], "30005: no such run")
        db.commit()


def configuration(processes: dict[str, int]) -> str:
    """All phases and checks; what there is to find is named often, so that calls meet it."""
    examples = scaled(25, 400)
    return f"""\
seed = 1
continue-on-failure = true
request-timeout = 20
max-stream-events = 4
hooks = "tests.end_to_end.schemathesis_hooks"

[generation]
deterministic = true
database = "none"
max-examples = {examples}

[cache]
enabled = false

# What to send never hangs on what was answered, so that the cases are the same each time.
[phases]
examples.extra-data-sources.responses = false
coverage.extra-data-sources.responses = false
fuzzing.extra-data-sources.responses = false
fuzzing.error-feedback.enabled = false

[checks]
# 501 and 503 are refusals that the document tells of; 500 is never meant.
not_a_server_error.expected-statuses = ["2xx", "4xx", "501", "503"]
positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "409", "410", "501", "503"]

# Two thirds of all systematic cases are task files; the other phases have some as well.
[[operations]]
include-operation-id = "task_submit"
phases.coverage.enabled = {json.dumps(IS_LONG)}

[dictionaries]
tasks = {{ values = {json.dumps(SLEEPERS)} }}
letters = {{ values = {list(range(1, LETTERS + 1))} }}
processes = {{ values = {list(processes.values())} }}

[parameters]
"path.task_id" = {{ dictionary = "tasks", probability = 0.8 }}
"path.letter_id" = {{ dictionary = "letters", probability = 0.8 }}
"body.process_id" = {{ dictionary = "processes", probability = 0.5 }}
"""


async def schemathesis(url: str, token: str, config: Path, reports: Path) -> tuple[int, str]:
    """Exit code and what it printed.

    The document comes from a file: the place that it is loaded from would not be called otherwise.
    """
    described = reports / "openapi.json"
    described.write_text(text(ROUTES))
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run", str(described)]
    command += ["--url", f"{url}/api/v1", "--header", f"X-Agent-Token: {token}", "--no-color"]
    command += ["--report-ndjson-path", str(reports / "events"), "--report-json-path", str(reports / "report")]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SCHEMATHESIS_")}
    paths = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**kept, "REMOTEGPU_TEST_TOKEN": token, "PYTHONPATH": paths}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=reports, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode or 0, out.decode("utf-8", "replace")


def scenarios(events: Path) -> Iterator[dict[str, Any]]:
    """What was called, answered and checked."""
    for line in events.read_text("utf-8").splitlines():
        event = json.loads(line)
        if "ScenarioFinished" in event:
            yield event["ScenarioFinished"]["recorder"]


def runs_of(path: Path) -> list[str]:
    """The attempts of all runs that there have ever been."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return sorted(row[0] for row in db.execute("SELECT attempt_id FROM runs"))


@pytest.mark.timeout(2 * DEADLINE_S)
async def test_the_running_agent_keeps_what_its_description_promises(open_dir: Path, tmp_path: Path) -> None:
    """Every call, with good and with bad data: statuses, types, schemas, headers and rights as they are described.

    To replay: this test again, its cases are always the same; what fails is printed with the request.
    """
    config = tmp_path / "schemathesis.toml"
    async with blocked_agent(open_dir) as (host, processes):
        runs = runs_of(host.state_dir / "queue.db")
        url = json.loads((host.state_dir / "endpoints.json").read_bytes())["url"]
        token = (host.state_dir / "api-token").read_text().strip().rpartition(":")[2]
        config.write_text(configuration(processes))
        code, printed = await schemathesis(url, token, config, tmp_path)
        assert code == 0, printed[-20_000:]
        assert_much_was_tried(tmp_path)
        assert "api_request_failed" not in host.log.read_text()
        # Nothing has started: there is no run beyond those of the sleepers, in the database or on disk.
        assert runs_of(host.state_dir / "queue.db") == runs
        assert sorted(path.name for path in (host.state_dir / "attempts").iterdir() if path.name[0] != ".") == [
            f"{attempt_id}.1" for attempt_id in runs
        ]
        assert (await host.get("/tasks?state=pending"))["total"] > 0


def assert_much_was_tried(reports: Path) -> None:
    """Enough cases, each call once with success at least, and each check."""
    report = json.loads((reports / "report").read_bytes())
    assert report["test_cases"]["generated"] >= CASES_AT_LEAST
    assert report["operations"]["tested"] == len(ROUTES)
    assert {name: phase["status"] for name, phase in report["phases"].items()} == dict.fromkeys(
        ("examples", "coverage", "fuzzing", "stateful"), "success"
    )
    answered: dict[str, set[int]] = defaultdict(set)
    checked: set[str] = set()
    for recorder in scenarios(reports / "events"):
        checked.update(check["name"] for checks in recorder.get("checks", {}).values() for check in checks)
        for case_id, case in recorder.get("cases", {}).items():
            answer = recorder["interactions"].get(case_id, {}).get("response")
            if answer is not None:
                answered[f"{case['value']['method']} {case['value']['path']}"].add(answer["status_code"])
    assert checked == ALL_CHECKS
    assert [route.name for route in ROUTES if 200 not in answered[f"{route.method} {route.path}"]] == []
