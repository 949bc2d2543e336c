"""What an operator does: enrol, submit, look."""

from __future__ import annotations

import time
from typing import Any

import pytest

from remotegpu_schemas.task import Task, TaskId
from remotegpu_schemas.taskfile import load_task_file
from remotegpu_schemas.wire import Claim, parse_claims
from tests.control_plane.support import MACHINE, Agent, Operator

TASK_FILE = """
labels: {team: vision}
task:
  id: train
  name: pytorch-train
  type: python
  command: python
  args: [train.py, --epochs=100]
  workdir: /workspace
  env: {SEED: "1"}
  resources: {gpus: 2, cpus: 8, memory_gb: 64}
  timeout: 24h
  grace_period: 30s
  priority: 3
  stop_signal: SIGINT
  retry: {max: 3, delay: 60s, backoff: exponential, max_delay: 10m, on: [exit_code, timed_out], exit_codes: [75]}
  machine_id: machine-1
---
task: {script: "echo hello", interpreter: bash, lease_ttl_sec: 90, max_retries: 2}
"""


async def test_machine_gets_a_name_and_a_token(operator: Operator) -> None:
    """An id is made up if none is given; the list shows no token."""
    made = (await operator.call("POST", "/machines", json={"name": "rack 4"})).data
    assert made["machine_id"].startswith("machine-")
    [listed] = (await operator.call("GET", "/machines")).data["machines"]
    assert (listed["machine_id"], listed["name"], listed["agents"]) == (made["machine_id"], "rack 4", [])
    assert made["token"] not in str(listed)


async def test_machines_show_their_agents(agent: Agent, operator: Operator) -> None:
    """With the last registration and heartbeat as they were sent."""
    await agent.register(hostname="gpu-7", hardware={"cpu_cores": 8})
    await agent.heartbeat(metrics={"cpu_usage_percent": 12.5}, reasons=["disk is full"])
    [machine] = (await operator.call("GET", "/machines")).data["machines"]
    [found] = machine["agents"]
    assert found["registration"]["hardware"] == {"cpu_cores": 8}
    assert found["heartbeat"]["metrics"] == {"cpu_usage_percent": 12.5}
    assert found["heartbeat_at"] == "2026-02-02T02:40:00.000Z"


@pytest.mark.parametrize("body", [{"command": "true"}, [{"command": "true"}]])
async def test_one_task_or_a_list(operator: Operator, body: Any) -> None:
    """Both give ids."""
    [task_id] = (await operator.call("POST", "/tasks", json=body)).data["task_ids"]
    found = await operator.task(task_id)
    assert (found["status"], found["machine_id"], found["completions"]["accepted"]) == ("pending", None, 0)


async def test_task_file(agent: Agent, operator: Operator) -> None:
    """What an agent claims is what the file says, to the last field."""
    answer = await operator.call(
        "POST", "/tasks", data=TASK_FILE.encode(), headers={"Content-Type": "application/yaml"}
    )
    ids = answer.data["task_ids"]
    assert ids[0] == "train"
    assert (await operator.task("train"))["machine_id"] == MACHINE
    claims = parse_claims((await agent.claim(limit=2)).data)
    meant: list[Task] = [
        submission.task(TaskId(task_id))
        for submission, task_id in zip(load_task_file(TASK_FILE.encode()), ids, strict=True)
    ]
    assert [claim.task for claim in claims if isinstance(claim, Claim)] == meant
    assert [claim.lease_ttl_s for claim in claims if isinstance(claim, Claim)] == [60.0, 90.0]


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("task: {command: true, dependson: [a]}", 30005, "unknown key 'dependson'"),
        ("task: {command: a, targets: {machine_ids: [a, b]}}", 30025, "one machine"),
        ("task: {command: a, args: []}", 30025, "empty 'args'"),
    ],
)
async def test_bad_task_file(operator: Operator, text: str, code: int, named: str) -> None:
    """The report, and nothing is submitted."""
    answer = await operator.call("POST", "/tasks", data=text.encode(), headers={"Content-Type": "application/yaml"})
    assert answer.code == code
    assert named in answer.message
    assert (await operator.call("GET", "/tasks")).data["total"] == 0


@pytest.mark.parametrize(
    ("tasks", "code", "named"),
    [
        ([], 30005, "there is no task"),
        ([{"command": "true"}, 7], 30005, "tasks[1]: a task is an object"),
        ([{"id": "a/b", "command": "true"}], 30005, "tasks[0]: id: "),
        ([{"name": "x"}], 30005, "a task needs a command or a script"),
        ([{"command": "true", "timeout": "soon"}], 30005, "timeout"),
        ([{"command": "true", "machine_id": 7}], 30005, "tasks[0]: machine_id: "),
        ([{"command": "true", "machine_id": "a/b"}], 30005, "tasks[0]: machine_id: "),
        ([{"command": "true", "name": "\ud800"}], 30005, "name"),
        ([{"command": "true", "lease_ttl_sec": float("inf")}], 30005, "lease_ttl_sec"),
        ([{"command": "true", "lease_ttl_sec": float("nan")}], 30005, "lease_ttl_sec"),
        ([{"id": "a", "command": "true"}, {"id": "a", "command": "true"}], 30005, "two of the tasks have the id a"),
        ([{"command": "true"}] * 10_001, 30005, "at most 10000"),
    ],
)
async def test_bad_tasks(operator: Operator, tasks: list[Any], code: int, named: str) -> None:
    """All or none: the first bad one is named."""
    answer = await operator.call("POST", "/tasks", json=tasks)
    assert answer.code == code
    assert named in answer.message
    assert (await operator.call("GET", "/tasks")).data["total"] == 0


async def test_taken_id(operator: Operator) -> None:
    """409, and none of the others is added."""
    await operator.submit({"id": "a", "command": "true"})
    answer = await operator.call("POST", "/tasks", json=[{"command": "true"}, {"id": "a", "command": "false"}])
    assert (answer.status, answer.code) == (409, 30024)
    assert (await operator.call("GET", "/tasks")).data["total"] == 1


async def test_many_at_once(operator: Operator) -> None:
    """500 tasks in one call take less than a second."""
    began = time.perf_counter()
    ids = await operator.submit(*[{"command": "true", "env": {"A": "1"}}] * 500)
    assert time.perf_counter() - began < 1
    assert len(set(ids)) == 500


async def test_listing_is_filtered_and_paged(agent: Agent, operator: Operator) -> None:
    """Oldest first."""
    ids = await operator.submit(*[{"command": "true"}] * 5)
    await agent.complete(await agent.claim_one())
    page = (await operator.call("GET", "/tasks?status=pending&limit=2&offset=1")).data
    assert page["total"] == 4
    assert [task["id"] for task in page["tasks"]] == ids[2:4]
    [done] = (await operator.call("GET", "/tasks?status=completed")).data["tasks"]
    assert done["result"]["exit_code"] == 0


@pytest.mark.parametrize("query", ["status=done", "limit=x", "offset=-1"])
async def test_bad_query(operator: Operator, query: str) -> None:
    """30005 with the name."""
    answer = await operator.call("GET", f"/tasks?{query}")
    assert answer.code == 30005
    assert answer.message.startswith(query.partition("=")[0])


async def test_stats_count_every_status(agent: Agent, operator: Operator) -> None:
    """Those without a task too."""
    await operator.submit(*[{"command": "true"}] * 3)
    task, _ = (await agent.claim(limit=2)).data["tasks"]
    await agent.start(task)
    counts = {"waiting": 0, "pending": 1, "assigned": 1, "running": 1, "completed": 0, "failed": 0, "cancelled": 0}
    assert (await operator.call("GET", "/stats")).data == {"tasks": counts}


async def test_unknown_task(operator: Operator) -> None:
    """30004."""
    assert (await operator.call("GET", "/tasks/nobody")).code == 30004
