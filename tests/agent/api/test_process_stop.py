"""POST /process/stop and GET /system/info, as deployed control planes call them; F32 at the edge."""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import json
import os
from typing import Any

import pytest

from remotegpu_agent.api import LegacyCall, LegacyCaller
from remotegpu_schemas.errors import Code, Refused
from tests.agent.api.conftest import READER, Api, StartApi
from tests.agent.api.fake_operations import PROCESS_ID, TASK_ID

PATH = "/api/v1/process/stop"
LOOPBACK = (LegacyCaller(ipaddress.ip_network("127.0.0.0/8"), frozenset(LegacyCall)),)


def deployed_plane(port: int, method: str, path: str, body: str | None = None) -> tuple[int, dict[str, Any]]:
    """Call as a deployed plane does: a Go client, no token, JSON without saying so, gives up after 10 s."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"User-Agent": "Go-http-client/1.1", "Accept-Encoding": "gzip"}
    if body is not None:
        headers["Content-Type"] = "text/plain; charset=utf-8"
    connection.request(method, path, body=body, headers=headers)
    answer = connection.getresponse()
    result = answer.status, json.loads(answer.read())
    connection.close()
    return result


STOP_BODY = json.dumps({"process_id": PROCESS_ID, "signal": "SIGTERM", "host_id": "0b9c"})


async def test_a_deployed_plane_is_refused_by_default(api: Api) -> None:
    """Without a token and without `legacy_callers` both calls are 401, and nothing is asked of the daemon."""
    for method, path, body in (("GET", "/api/v1/system/info", None), ("POST", PATH, STOP_BODY)):
        status, answer = await asyncio.to_thread(deployed_plane, api.port, method, path, body)
        assert (status, answer["code"]) == (401, 30016)
    assert api.operations.calls == []
    assert api.audit_lines() == []


async def test_a_deployed_plane_is_served_when_listed(start_api: StartApi) -> None:
    """With its network in `legacy_callers` both calls work without a token, and each use is in the audit log."""
    async with start_api(legacy_callers=LOOPBACK) as api:
        status, info = await asyncio.to_thread(deployed_plane, api.port, "GET", "/api/v1/system/info")
        assert status == 200
        assert min(info[name] for name in ("cpu_cores", "memory_total", "memory_free", "disk_total", "disk_free")) > 0
        status, stopped = await asyncio.to_thread(deployed_plane, api.port, "POST", PATH, STOP_BODY)
        assert (status, stopped["code"], stopped["data"]["state"]) == (200, 0, "stopped")
        who = "legacy:127.0.0.0/8"
        assert [(line["who"], line["what"], line["from"], line["outcome"]) for line in api.audit_lines()] == [
            (who, "system_info", "127.0.0.1", "ok"),
            (who, "process_stop", "127.0.0.1", "ok"),
        ]
        assert api.audit_lines()[1]["detail"] == {
            "process_id": PROCESS_ID,
            "signal": "SIGTERM",
            "task_id": TASK_ID,
            "state": "stopped",
        }


async def test_a_listed_network_may_do_no_more(start_api: StartApi) -> None:
    """The other calls still need a token, and so does a call that the network is not listed for."""
    only_info = (LegacyCaller(ipaddress.ip_network("127.0.0.0/8"), frozenset({LegacyCall.SYSTEM_INFO})),)
    async with start_api(legacy_callers=only_info) as api:
        assert (await api.call("GET", "/api/v1/tasks", headers={}))[0] == 401
        assert (await api.call("POST", PATH, headers={}, data=STOP_BODY))[0] == 401
        assert (await api.call("GET", "/api/v1/system/info", headers={"X-Agent-Token": "wrong"}))[0] == 401
        assert (await api.call("GET", "/api/v1/system/info", headers={}))[0] == 200


async def test_a_forwarded_address_is_not_believed(start_api: StartApi) -> None:
    """A header cannot put a caller into a listed network."""
    listed = (LegacyCaller(ipaddress.ip_network("10.0.0.0/8"), frozenset(LegacyCall)),)
    async with start_api(legacy_callers=listed) as api:
        headers = {"X-Forwarded-For": "10.0.0.1", "Forwarded": "for=10.0.0.1", "X-Real-IP": "10.0.0.1"}
        assert (await api.call("GET", "/api/v1/system/info", headers=headers))[0] == 401


async def test_a_refused_use_is_audited_too(start_api: StartApi) -> None:
    """What a legacy caller tried and did not get is in the audit log with its code."""
    async with start_api(legacy_callers=LOOPBACK) as api:
        await api.call("POST", PATH, headers={}, json={"process_id": 1})
        (line,) = api.audit_lines()
        assert line["outcome"].startswith("30010 PROCESS_NOT_MANAGED: ")
        assert line["detail"] == {"process_id": 1, "signal": "SIGTERM"}


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ("", "body"),
        ("{", "body"),
        ("[]", "body"),
        ("null", "body"),
        ('{"process_id": 4711', "body"),
        ("[" * 100_000, "body"),
        ("{}", "process_id"),
        ('{"process_id": null}', "process_id"),
        ('{"process_id": "4711"}', "process_id"),
        ('{"process_id": 4711.0}', "process_id"),
        ('{"process_id": true}', "process_id"),
        ('{"process_id": -1}', "process_id"),
        ('{"process_id": -4711}', "process_id"),
        ('{"process_id": 0}', "process_id"),
        ('{"process_id": 2147483648}', "process_id"),
        ('{"process_id": 100000000000000000000000}', "process_id"),
        ('{"process_id": [4711]}', "process_id"),
        ('{"process_id": NaN}', "process_id"),
        ('{"process_id": 4711, "signal": "SIGSTOP"}', "signal"),
        ('{"process_id": 4711, "signal": 9}', "signal"),
    ],
)
async def test_bad_requests(api: Api, body: str, field: str) -> None:
    """F32: what names no process is INVALID_PARAMETERS with its field, and no signal is asked for."""
    status, answer = await api.call("POST", PATH, data=body)
    assert (status, answer["code"]) == (400, 30005)
    assert answer["message"].startswith(f"{field}: ")
    assert api.operations.calls == []


@pytest.mark.parametrize("process_id", [1, os.getpid()])
async def test_init_and_the_agent_are_nobodys_run(api: Api, process_id: int) -> None:
    """F32: process 1 and the agent itself are refused at the edge, by name."""
    status, answer = await api.call("POST", PATH, json={"process_id": process_id})
    assert (status, answer["code"]) == (404, 30010)
    assert str(process_id) in answer["message"]
    assert api.operations.calls == []


@pytest.mark.parametrize(
    ("code", "status"), [(Code.PROCESS_NOT_MANAGED, 404), (Code.PROCESS_GONE, 410), (Code.STATE_CONFLICT, 409)]
)
async def test_refusals_of_the_daemon(api: Api, code: Code, status: int) -> None:
    """F32: unknown, foreign, reused and finished processes come through with the daemon's code."""
    api.operations.failure = Refused(code, "that one is not ours")
    got, answer = await api.call("POST", PATH, json={"process_id": PROCESS_ID})
    assert (got, answer["code"], answer["message"]) == (status, code, "that one is not ours")


@pytest.mark.parametrize(
    ("extra", "signal"),
    [
        ({}, "SIGTERM"),
        ({"signal": None}, "SIGTERM"),
        ({"signal": ""}, "SIGTERM"),
        ({"signal": "SIGKILL"}, "SIGKILL"),
        ({"host_id": {"any": ["thing"]}, "unknown": 1}, "SIGTERM"),
    ],
)
async def test_what_deployed_planes_send(api: Api, extra: dict[str, object], signal: str) -> None:
    """A missing, null or empty signal is SIGTERM; `host_id` is anything; unknown keys are ignored."""
    status, _ = await api.call("POST", PATH, json={"process_id": PROCESS_ID, **extra})
    assert status == 200
    assert api.operations.calls == [("stop_process", {"process_id": PROCESS_ID, "signal": signal})]


async def test_the_answer_does_not_wait_for_ever(start_api: StartApi) -> None:
    """A daemon that does not answer in time is answered for, so that the caller does not run into its own timeout."""
    async with start_api(stop_answer_s=0.05) as api:
        api.operations.stop_may_go.clear()
        status, answer = await api.call("POST", PATH, json={"process_id": PROCESS_ID})
        assert (status, answer["code"]) == (503, 30023)


async def test_a_reader_may_not_stop(api: Api) -> None:
    """The role `read` is forbidden to change anything."""
    status, answer = await api.call("POST", PATH, headers=READER, json={"process_id": PROCESS_ID})
    assert (status, answer["code"]) == (403, 30017)
    assert api.operations.calls == []
