"""POST /tasks: a task file as YAML or JSON, accepted whole or refused with the whole report."""

from __future__ import annotations

import asyncio
import io
import json
import uuid

import pytest

from remotegpu_agent.api.submission import parse_submission
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.task import TaskId
from tests.agent.api.conftest import READER, Api
from tests.agent.api.fake_operations import MACHINE_ID

PATH = "/api/v1/tasks"

TWO_TASKS = b"""\
task: {id: first, command: nvidia-smi}
---
name: second
labels: {team: vision}
task:
  command: python
  args: [train.py, --epochs=100]
  timeout: 24h
"""


async def test_yaml(api: Api) -> None:
    """A file of two documents: both tasks are stored, an id is made where none is asked for."""
    status, body = await api.call("POST", PATH, data=TWO_TASKS, headers={"X-Agent-Token": "operator-secret"})
    assert status == 200
    first, second = api.operations.submitted
    assert (first.id, first.command, first.args) == ("first", "nvidia-smi", None)
    assert (second.name, second.args, second.timeout_s) == ("second", ("train.py", "--epochs=100"), 86400.0)
    assert str(uuid.UUID(second.id)) == second.id
    assert body["data"] == {"task_ids": ["first", second.id]}
    (line,) = api.audit_lines()
    assert (line["what"], line["outcome"]) == ("task_submit", "ok")
    assert line["detail"] == {"tasks": 2, "task_ids": f"first {second.id}"}


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"task": {"command": "echo \U0001f600 ü / \\", "env": {"A": "1"}}}),
        json.dumps({"task": {"command": "echo \U0001f600 ü / \\", "env": {"A": "1"}}}, ensure_ascii=False, indent=2),
        json.dumps({"task": {"command": "echo \U0001f600 ü / \\", "env": {"A": "1"}}}, indent="\t"),
        json.dumps({"task": {"command": "echo \U0001f600 ü / \\", "env": {"A": "1"}}}).replace("/", "\\/"),
    ],
    ids=["escaped", "indented", "tabs", "escaped-slash"],
)
async def test_json(api: Api, body: str) -> None:
    """The same as JSON, however it is written, whatever its content type."""
    status, answer = await api.call("POST", PATH, data=body.encode())
    assert status == 200, answer
    (task,) = api.operations.submitted
    assert (task.command, task.env) == ("echo \U0001f600 ü / \\", {"A": "1"})


async def test_a_bad_file_is_reported_whole(api: Api) -> None:
    """All problems with line and column, and nothing submitted, not even the good document."""
    text = b"task: {command: echo}\n---\ntask:\n  comand: echo\n  priority: 11\n"
    status, body = await api.call("POST", PATH, data=text)
    assert (status, body["code"]) == (400, 30005)
    assert "body:4:3: unknown key 'comand'" in body["message"]
    assert "did you mean 'command'?" in body["message"]
    assert "body:5:" in body["message"]
    assert "nothing was submitted" in body["message"]
    assert api.operations.calls == []
    assert api.audit_lines()[0]["outcome"].startswith("30005 INVALID_PARAMETERS")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"   \n",
        b"\0",
        b"\xff\xfe\xfd",
        b"{",
        b"[]",
        b"null",
        b"task",
        b"task: {}",
        b"task: {command: ''}",
        b"task: [command]",
        b"task: {command: x, id: ../../etc}",
        b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        b"[" * 10_000,
        b"task: {command: x}\ntask: {command: y}\n",
        b"task: {id: a, command: x}\n---\ntask: {id: a, command: y}\n",
        b"task: !!python/object/apply:os.system [id]",
        b"x" * 2_000_000,
    ],
    ids=range(18),
)
async def test_what_is_no_task_file(api: Api, text: bytes) -> None:
    """F33: each is INVALID_PARAMETERS with a report; none reaches the daemon."""
    status, body = await api.call("POST", PATH, data=io.BytesIO(text))
    assert (status, body["code"]) == (400, 30005)
    assert body["message"]
    assert api.operations.calls == []


async def test_a_secret_is_not_echoed(api: Api) -> None:
    """F49: the report on a bad file hides what looks like a secret, and the audit log has no environment."""
    text = b"task: {command: x, env: {API_TOKEN: hunter2}, oops: 1}\n"
    _, body = await api.call("POST", PATH, data=text)
    assert "oops" in body["message"]
    assert "hunter2" not in body["message"]
    assert "hunter2" not in json.dumps(api.audit_lines())


async def test_a_reader_may_not_submit(api: Api) -> None:
    """The role `read` is refused before the file is looked at."""
    status, body = await api.call("POST", PATH, headers=READER, data=TWO_TASKS)
    assert (status, body["code"]) == (403, 30017)
    assert api.operations.calls == []


@pytest.mark.parametrize("code", [Code.DRAINING, Code.QUEUE_FULL, Code.ALREADY_EXISTS, Code.POLICY_REFUSED])
async def test_refusals_of_the_queue(api: Api, code: Code) -> None:
    """What the daemon does not take comes back with its code."""
    api.operations.failure = Refused(code, "not now")
    _, body = await api.call("POST", PATH, data=TWO_TASKS)
    assert (body["code"], body["message"]) == (code, "not now")


async def test_others_are_served_while_a_long_file_is_read(api: Api) -> None:
    """F33: a long file, which is read on a thread, is accepted, and a request beside it is answered."""
    text = b"task:\n  command: x\n  env:\n" + b"".join(b"    KEY%d: value\n" % number for number in range(2000))
    sending = asyncio.create_task(api.call("POST", PATH, data=text))
    assert (await api.call("GET", "/api/v1/ping"))[0] == 200
    assert (await sending)[0] == 200


@pytest.mark.parametrize(
    "target",
    [
        f"machine_id: {MACHINE_ID}",
        f"targets: {{machine_ids: [other, {MACHINE_ID}]}}",
        "targets: {ips: [10.9.9.9, 10.0.0.1]}",
        "targets: {machine_ids: [other], ips: ['FD00:0::1']}",
    ],
)
def test_tasks_for_this_machine(target: str) -> None:
    """A file may name this machine by its id or by an address, in any spelling, beside others."""
    (task,) = parse(f"task: {{command: x, {target}}}")
    assert task == "made"


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("machine_id: other", "other"),
        ("targets: {machine_ids: [a, b]}", "a, b"),
        ("targets: {ips: [10.0.0.2, nonsense]}", "10.0.0.2, nonsense"),
    ],
)
def test_tasks_for_other_machines(target: str, named: str) -> None:
    """They are refused, naming both machines; the other tasks of the file are not submitted either."""
    with pytest.raises(
        Refused, match=rf"body:\d+: the task is for {named}, and this machine is {MACHINE_ID}"
    ) as caught:
        parse(f"task: {{command: x}}\n---\ntask: {{command: x, {target}}}")
    assert caught.value.code is Code.INVALID_PARAMETERS


def parse(text: str) -> list[str]:
    """The ids of the tasks, on a machine of two addresses."""
    tasks = parse_submission(
        text.encode(),
        machine_id=MACHINE_ID,
        own_addresses=lambda: ["10.0.0.1", "fd00::1"],
        new_id=lambda: TaskId("made"),
    )
    return [task.id for task in tasks]
