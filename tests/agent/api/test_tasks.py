"""Tasks over HTTP: listing, showing, waiting, cancelling; ids and parameters that do not fit."""

from __future__ import annotations

import asyncio
import urllib.parse

import pytest

from remotegpu_schemas.errors import CODES, Code, Refused
from tests.agent.api.conftest import READER, Api
from tests.agent.api.fake_operations import TASK_ID

ONE = f"/api/v1/tasks/{TASK_ID}"


async def test_a_page_of_tasks(api: Api) -> None:
    """Filters and paging reach the daemon, repeated and with commas; without any it is the first page of all."""
    status, body = await api.call("GET", "/api/v1/tasks", headers=READER)
    assert status == 200
    assert [task["id"] for task in body["data"]["tasks"]] == [TASK_ID]
    await api.call("GET", "/api/v1/tasks?state=failed,running&state=pending&label=team=a=b&label=k=&limit=7&offset=14")
    assert api.operations.calls == [
        ("list_tasks", {"states": [], "labels": {}, "limit": 100, "offset": 0}),
        (
            "list_tasks",
            {
                "states": ["failed", "running", "pending"],
                "labels": {"team": "a=b", "k": ""},
                "limit": 7,
                "offset": 14,
            },
        ),
    ]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("state=flying", "state.0"),
        ("state=", "state.0"),
        ("state=running,", "state.1"),
        ("label=team", "label.0"),
        ("label==x", "label.0"),
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=many", "limit"),
        ("offset=-1", "offset"),
        (f"offset={2**64}", "offset"),
        ("limit=0&offset=-1", "limit"),
    ],
)
async def test_bad_filters(api: Api, query: str, field: str) -> None:
    """Each is INVALID_PARAMETERS with its name."""
    status, body = await api.call("GET", f"/api/v1/tasks?{query}")
    assert (status, body["code"]) == (400, 30005)
    assert body["message"].startswith(f"{field}: ")
    assert api.operations.calls == []


async def test_many_problems_are_told_at_once(api: Api) -> None:
    """All fields that do not fit are named."""
    _, body = await api.call("GET", "/api/v1/tasks?limit=0&offset=-1")
    assert "limit: " in body["message"]
    assert "offset: " in body["message"]


async def test_one_task(api: Api) -> None:
    """GET /tasks/{id} is the task with its runs."""
    status, body = await api.call("GET", ONE, headers=READER)
    assert status == 200
    assert body["data"]["state"] == "running"
    assert body["data"]["runs"] == []


async def test_waiting_for_the_end(api: Api) -> None:
    """With `wait` the answer comes when the task has ended."""
    waiting = asyncio.create_task(api.call("GET", ONE + "?wait=60"))
    async with asyncio.timeout(20):
        await api.operations.show_waits.wait()
        api.operations.task_ended.set()
        _, body = await waiting
    assert body["data"]["state"] == "completed"


async def test_waiting_is_over_in_time(api: Api) -> None:
    """When the time is over, the answer is the present state."""
    _, body = await api.call("GET", ONE + "?wait=0.05")
    assert body["data"]["state"] == "running"


async def test_a_waiting_client_that_goes_ends_the_wait(api: Api) -> None:
    """A long poll whose client has gone is cancelled in the daemon at once."""
    waiting = asyncio.create_task(api.call("GET", ONE + "?wait=60"))
    async with asyncio.timeout(20):
        await api.operations.show_waits.wait()
        waiting.cancel()
        await api.operations.show_cancelled.wait()
    await asyncio.gather(waiting, return_exceptions=True)


@pytest.mark.parametrize(("asked", "wait_s"), [("300", 300.0), ("1e9", 300.0), ("0", 0.0), ("1.5", 1.5)])
async def test_waits_are_bounded(api: Api, asked: str, wait_s: float) -> None:
    """More than the longest wait counts as that: the client asks again."""
    api.operations.task_ended.set()
    assert (await api.call("GET", f"{ONE}?wait={asked}"))[0] == 200
    assert api.operations.calls == [("show_task", {"task_id": TASK_ID, "wait_s": wait_s})]


@pytest.mark.parametrize("wait", ["-1", "nan", "inf", "soon", ""])
async def test_bad_waits(api: Api, wait: str) -> None:
    """A wait that is no length of time is refused."""
    status, body = await api.call("GET", f"{ONE}?wait={wait}")
    assert (status, body["code"]) == (400, 30005)
    assert body["message"].startswith("wait: ")


async def test_suspending_and_resuming(api: Api) -> None:
    """POST /tasks/{id}/suspend and /resume; the wrong state is a conflict with its code, and both are audited."""
    status, body = await api.call("POST", ONE + "/suspend")
    assert (status, body["data"]["state"]) == (200, "suspended")
    status, body = await api.call("POST", ONE + "/resume")
    assert (status, body["code"]) == (409, 30020)
    lines = [line for line in api.audit_lines() if line["what"] in {"task_suspend", "task_resume"}]
    assert [(line["what"], line["outcome"] == "ok") for line in lines] == [
        ("task_suspend", True),
        ("task_resume", False),
    ]


async def test_cancelling(api: Api) -> None:
    """POST /tasks/{id}/cancel answers with the task, and is in the audit log with it."""
    status, body = await api.call("POST", ONE + "/cancel")
    assert status == 200
    assert body["data"]["state"] == "cancelled"
    (line,) = api.audit_lines()
    assert (line["who"], line["what"], line["outcome"]) == ("token:ci", "task_cancel", "ok")
    assert line["detail"] == {"task_id": TASK_ID}


async def test_reading_is_not_audited(api: Api) -> None:
    """What a token's holder reads leaves no line."""
    await api.call("GET", ONE)
    assert api.audit_lines() == []


@pytest.mark.parametrize(("method", "suffix"), [("GET", ""), ("GET", "?wait=1"), ("POST", "/cancel"), ("GET", "/logs")])
async def test_an_unknown_task(api: Api, method: str, suffix: str) -> None:
    """It is 404 with its own code, which differs from that of an unknown route."""
    status, body = await api.call(method, "/api/v1/tasks/other" + suffix)
    assert (status, body["code"]) == (404, 30004)


HOSTILE_IDS = [
    "../../etc/passwd",
    "..",
    ".hidden",
    "a/b",
    "a\0b",
    "a\nb",
    "a b",
    "-rf",
    "'; drop table tasks; --",
    "x" * 129,
    "x" * 10_000,
    "tаsk",  # noqa: RUF001 - the second letter is Cyrillic
    "ｔask",  # noqa: RUF001 - a fullwidth letter
    "task\u202e",
    "\ud800",
]


@pytest.mark.parametrize("task_id", HOSTILE_IDS, ids=range(len(HOSTILE_IDS)))
async def test_hostile_ids(api: Api, task_id: str) -> None:
    """F34: path parts, NUL, 10 kB and look-alikes are refused at the edge in one short sentence."""
    quoted = urllib.parse.quote(task_id.encode("utf-8", "surrogatepass"), safe="").replace(".", "%2E")
    for method, suffix in (("GET", ""), ("GET", "/logs"), ("GET", "/logs?follow=1"), ("POST", "/cancel")):
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(
            f"{method} /api/v1/tasks/{quoted}{suffix} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            "X-Agent-Token: operator-secret\r\n\r\n".encode()
        )
        answer = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        await writer.wait_closed()
        assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 ")), answer[:300]
        assert b'"code":30005' in answer or b'"code":30022' in answer
        assert len(answer) < 1000
    assert api.operations.calls == []


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
async def test_every_code_has_its_status(api: Api, code: Code) -> None:
    """A refusal of the daemon goes out with its code, its HTTP status and its message."""
    api.operations.failure = Refused(code)
    status, body = await api.call("GET", "/api/v1/queue/status")
    assert (status, body["code"], body["message"]) == (CODES[code].http_status, code, CODES[code].meaning)


async def test_messages_that_are_no_text(api: Api) -> None:
    """A message with lone surrogates (from a file name) goes out readable."""
    api.operations.failure = Refused(Code.STATE_CONFLICT, "file \udcff is busy")
    _, body = await api.call("GET", "/api/v1/queue/status")
    assert body["message"] == "file ? is busy"
