"""Drain, undrain and dead letters over HTTP."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.agent.api.conftest import READER, Api
from tests.agent.api.fake_operations import DEAD_LETTER


def audited(api: Api) -> list[dict[str, Any]]:
    """The lines of the audit log."""
    return [json.loads(line) for file in sorted(api.audit_dir.iterdir()) for line in file.read_text().splitlines()]


async def test_drain_says_who_and_why(api: Api) -> None:
    """The order carries the caller's name and reason, and stands in the audit log."""
    status, body = await api.call("POST", "/api/v1/drain", json={"reason": "new driver"})
    assert (status, body["data"]["is_draining"], body["data"]["running"]) == (200, True, 1)
    assert api.operations.calls == [("drain", {"by": "token:ci", "reason": "new driver"})]
    assert (audited(api)[-1]["what"], audited(api)[-1]["detail"]) == ("drain", {"reason": "new driver"})


async def test_drain_without_a_body(api: Api) -> None:
    """As `curl -X POST` sends it."""
    assert (await api.call("POST", "/api/v1/drain"))[0] == 200
    assert (await api.call("POST", "/api/v1/undrain"))[1]["data"]["is_draining"] is False
    assert [name for name, _ in api.operations.calls] == ["drain", "undrain"]


async def test_how_far_the_host_is_emptied(api: Api) -> None:
    """GET /drain waits as long as it is asked to, within the bound."""
    await api.call("GET", "/api/v1/drain?wait=7")
    await api.call("GET", "/api/v1/drain?wait=100000", headers=READER)
    assert [call["wait_s"] for _, call in api.operations.calls] == [7.0, 300.0]


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"reason": 7}', b'{"reason": "' + b"x" * 501 + b'"}'])
async def test_orders_that_make_no_sense(api: Api, body: bytes) -> None:
    """A body that is no order is refused as one, and nothing happens."""
    status, answer = await api.call("POST", "/api/v1/drain", data=body)
    assert (status, answer["code"]) == (400, 30005)
    assert api.operations.calls == []


async def test_dead_letters(api: Api) -> None:
    """Listed by anybody who may read; sent again and dropped by operators, with a line in the audit log."""
    listed = await api.call("GET", "/api/v1/dead-letters?limit=5&offset=2", headers=READER)
    assert (listed[0], listed[1]["data"]["total"]) == (200, 1)
    assert api.operations.calls == [("dead_letters", {"limit": 5, "offset": 2})]
    shown = await api.call("GET", "/api/v1/dead-letters/17", headers=READER)
    assert shown[1]["data"] == DEAD_LETTER.model_dump(mode="json")
    assert (await api.call("POST", "/api/v1/dead-letters/17/resend"))[0] == 200
    assert (await api.call("DELETE", "/api/v1/dead-letters/17"))[0] == 200
    assert [line["what"] for line in audited(api)] == ["dead_letter_resend", "dead_letter_drop"]
    assert audited(api)[-1]["detail"]["task_id"] == DEAD_LETTER.task_id


@pytest.mark.parametrize(("method", "path"), [("POST", "/dead-letters/17/resend"), ("DELETE", "/dead-letters/17")])
async def test_readers_change_nothing(api: Api, method: str, path: str) -> None:
    """A token that may only read sends nothing again and drops nothing."""
    status, body = await api.call(method, f"/api/v1{path}", headers=READER)
    assert (status, body["code"]) == (403, 30017)
    assert api.operations.calls == []


@pytest.mark.parametrize(
    ("number", "expected"), [("18", (404, 30026)), ("x", (400, 30005)), ("-1", (400, 30005)), ("9" * 40, (400, 30005))]
)
async def test_numbers_of_no_dead_letter(api: Api, number: str, expected: tuple[int, int]) -> None:
    """One that is not there is said so; what is no number is refused."""
    status, body = await api.call("GET", f"/api/v1/dead-letters/{number}")
    assert (status, body["code"]) == expected


@pytest.mark.parametrize("path", ["/metrics", "/api/v1/metrics"])
async def test_metrics_need_a_token_that_may_read(api: Api, path: str) -> None:
    """Prometheus finds them at either place; nobody without a token does."""
    async with api.tcp.get(api.url + path, headers=READER) as answer:
        assert (answer.status, answer.content_type, await answer.text()) == (200, "text/plain", "# EOF")
    status, body = await api.call("GET", path, headers={})
    assert (status, body["code"]) == (401, 30016)
