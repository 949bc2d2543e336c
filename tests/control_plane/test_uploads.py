"""Files of attempts: a signed URL for the agent, a checked upload, a download for operators."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest

from control_plane import CannotServe, Settings, serve
from remotegpu_agent.clock import SystemClock
from remotegpu_agent.control_plane import ControlPlane
from remotegpu_schemas.task import TaskId
from remotegpu_schemas.wire import UploadUrlRequest, parse_upload_target
from tests.control_plane.support import DEADLINE_S, MACHINE, Agent, Answer, MovableClock, Operator, request

CONTENT = b"weights " * 500_000
"""Four megabytes: several writes."""
FAILURE = {"exit_code": 1, "status": "failed", "cause": "exit_code"}


@pytest.fixture
def settings(settings: Settings, tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """A plane that takes uploads, within the bounds that a test asks for."""
    bounds: dict[str, Any] = getattr(request, "param", {})
    return dataclasses.replace(settings, uploads_dir=tmp_path / "uploads", **bounds)


@pytest.fixture
async def task(agent: Agent, operator: Operator) -> dict[str, Any]:
    """A task that the agent holds."""
    await operator.submit({"id": "t", "command": "true"})
    return await agent.claim_one()


def about(content: bytes, name: str = "model.pt") -> dict[str, Any]:
    """What an agent tells about a file."""
    return {"name": name, "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


async def ask(agent: Agent, task: dict[str, Any], content: bytes = CONTENT, **more: Any) -> Answer:
    """POST /tasks/{id}/result/upload-url."""
    return await agent.about("result/upload-url", task, **about(content) | more)


async def put(agent: Agent, target: dict[str, Any], content: bytes | AsyncIterator[bytes]) -> Answer:
    """The upload."""
    body = io.BytesIO(content) if isinstance(content, bytes) else content
    return await request(agent.session, target["method"], target["url"], target["headers"], data=body)


def kept(settings: Settings) -> list[bytes]:
    """What lies in the directory, and in no place beside."""
    assert settings.uploads_dir is not None
    assert list((settings.uploads_dir / ".partial").iterdir()) == []
    return [path.read_bytes() for path in settings.uploads_dir.iterdir() if path.is_file()]


async def download(operator: Operator, task: dict[str, Any], name: str = "model.pt") -> aiohttp.ClientResponse:
    """GET of an operator, read to its end."""
    path = f"/api/v1/admin/tasks/{task['id']}/artifacts/{task['attempt_id']}/{name}"
    response = await operator.session.get(operator.plane.url + path, headers=operator.headers)
    await response.read()
    return response


async def test_feature_is_offered(agent: Agent) -> None:
    """Only a plane with a directory has it."""
    assert (await agent.register()).data["features"] == ["release", "upload-url"]


async def test_upload_and_download(agent: Agent, operator: Operator, task: dict[str, Any]) -> None:
    """The bytes are the same; the URL needs no token, the download the operator's; a browser only saves it."""
    target = (await ask(agent, task)).data
    assert target["key"] == f"t/{task['attempt_id']}/model.pt"
    stored = (await put(agent, target, CONTENT)).data
    assert stored == {"key": target["key"]} | {key: about(CONTENT)[key] for key in ("size_bytes", "sha256")}
    response = await download(operator, task)
    assert await response.read() == CONTENT
    assert response.headers["Content-Disposition"] == "attachment; filename*=UTF-8''model.pt"
    assert response.headers["Content-Type"] == "application/octet-stream"
    operator.headers = {"Authorization": f"Bearer {agent.token}"}
    assert (await download(operator, task)).status == 401


async def test_listing(agent: Agent, operator: Operator, task: dict[str, Any]) -> None:
    """With those that have not come."""
    await put(agent, (await ask(agent, task)).data, CONTENT)
    await ask(agent, task, b"log", name="log.txt")
    found = (await operator.call("GET", "/tasks/t/artifacts")).data["artifacts"]
    assert {each["name"]: each["stored_at"] for each in found} == {
        "model.pt": "2026-02-02T02:40:00.000Z",
        "log.txt": None,
    }
    assert (await download(operator, task, "log.txt")).status == 404


async def test_asking_is_idempotent(
    agent: Agent, operator: Operator, task: dict[str, Any], clock: MovableClock
) -> None:
    """By task, attempt and name: the same key and file, with a URL that is good for as long again."""
    first = (await ask(agent, task)).data
    clock.time_s += 30
    second = (await ask(agent, task)).data
    assert (first["key"], first["url"].partition("?")[0]) == (second["key"], second["url"].partition("?")[0])
    assert first["url"] != second["url"]
    assert [(await put(agent, each, CONTENT)).code for each in (first, second)] == [0, 0]
    assert len((await operator.call("GET", "/tasks/t/artifacts")).data["artifacts"]) == 1


async def test_same_name_with_another_content(agent: Agent, task: dict[str, Any]) -> None:
    """30005: one name is one file."""
    await ask(agent, task)
    answer = await ask(agent, task, b"other")
    assert answer.code == 30005
    assert answer.message.startswith("name: model.pt")


async def test_upload_comes_twice(agent: Agent, settings: Settings, task: dict[str, Any]) -> None:
    """An agent that got no answer uploads again: one file."""
    target = (await ask(agent, task)).data
    assert [(await put(agent, target, CONTENT)).code for _ in range(2)] == [0, 0]
    assert kept(settings) == [CONTENT]


@pytest.mark.parametrize(
    ("content", "code"),
    [(CONTENT[:-1], 30005), (CONTENT + b"x", 30018), (CONTENT[:-1] + b"x", 30005), (b"", 30005)],
    ids=["short", "long", "other", "empty"],
)
async def test_wrong_content(agent: Agent, settings: Settings, task: dict[str, Any], content: bytes, code: int) -> None:
    """Refused, and nothing is kept; the right one may follow."""
    target = (await ask(agent, task)).data
    assert (await put(agent, target, content)).code == code
    assert kept(settings) == []
    assert (await put(agent, target, CONTENT)).code == 0


async def test_empty_file(agent: Agent, settings: Settings, task: dict[str, Any]) -> None:
    """A file of no bytes is one."""
    await put(agent, (await ask(agent, task, b"")).data, b"")
    assert kept(settings) == [b""]


async def test_endless_upload_is_cut(agent: Agent, settings: Settings, task: dict[str, Any]) -> None:
    """Without a length the plane stops reading above the announced size."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(1024)

    target = (await ask(agent, task, b"small")).data
    async with asyncio.timeout(DEADLINE_S):
        with contextlib.suppress(aiohttp.ClientError):  # the connection may be closed on the sender
            assert (await put(agent, target, endless())).code == 30018
    assert kept(settings) == []


async def test_upload_that_breaks_off(
    agent: Agent, settings: Settings, operator: Operator, task: dict[str, Any]
) -> None:
    """What came is thrown away; the next attempt of the agent starts from the beginning."""
    target = (await ask(agent, task)).data
    url = urlsplit(target["url"])
    _, writer = await asyncio.open_connection("127.0.0.1", operator.plane.port)
    head = f"PUT {url.path}?{url.query} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(CONTENT)}\r\n\r\n"
    writer.write(head.encode() + CONTENT[:1_500_000])
    await writer.drain()
    await operator.plane.faults.wait_calls("upload", 1, DEADLINE_S)
    writer.close()
    await operator.plane.stop()
    assert kept(settings) == []


async def test_uploads_at_once_are_bounded(
    agent: Agent, operator: Operator, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more than the bound is told to come again; when another has ended there is room."""
    monkeypatch.setattr("control_plane.uploads.UPLOADS_AT_ONCE_MAX", 1)
    slow, fast = [(await ask(agent, task, name=name)).data for name in ("slow", "fast")]
    may_end = asyncio.Event()
    has_begun = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield CONTENT[:1_500_000]
        has_begun.set()
        await may_end.wait()
        yield CONTENT[1_500_000:]

    uploading = asyncio.create_task(put(agent, slow, slowly()))
    await has_begun.wait()
    await operator.plane.faults.wait_calls("upload", 1, DEADLINE_S)
    answer = await put(agent, fast, CONTENT)
    assert (answer.status, answer.code) == (503, 30023)
    may_end.set()
    assert (await uploading).code == 0
    assert (await put(agent, fast, CONTENT)).code == 0


@pytest.mark.parametrize("change", ["signature", "expires", "file", "nothing signed"])
async def test_changed_url(agent: Agent, operator: Operator, task: dict[str, Any], change: str) -> None:
    """403: a URL is good for its file and its time only."""
    target = (await ask(agent, task)).data
    other = (await ask(agent, task, b"x", name="other")).data
    path, _, query = target["url"].partition("?")
    expires = query.partition("&")[0]
    changed = {
        "signature": target["url"][:-1] + ("0" if target["url"][-1] != "0" else "1"),
        "expires": target["url"].replace(expires, "expires=1999999999"),
        "file": other["url"].partition("?")[0] + "?" + query,
        "nothing signed": path,
    }
    answer = await put(agent, target | {"url": changed[change]}, CONTENT)
    assert (answer.status, answer.code) == (403, 403)
    assert (await download(operator, task)).status == 404


async def test_url_expires(agent: Agent, settings: Settings, task: dict[str, Any], clock: MovableClock) -> None:
    """403 from its time on; asking again gives a good one while the attempt may speak."""
    target = (await ask(agent, task)).data
    clock.time_s += settings.upload_url_ttl_s
    assert (await put(agent, target, CONTENT)).status == 403


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../model.pt", "out/model.pt", "/etc/passwd", "a\\b", "a\0b", "a\nb", "x" * 256, "\ud800"]
)
async def test_f34_name_is_no_path(agent: Agent, task: dict[str, Any], name: str) -> None:
    """30005: a name is the name of a file, and nothing else."""
    answer = await ask(agent, task, name=name)
    assert answer.code == 30005
    assert answer.message.startswith("name: ")


async def test_names_of_all_kinds(agent: Agent, operator: Operator, task: dict[str, Any]) -> None:
    """Blanks, percent signs, quotes and umlauts come back as they were."""
    name = 'Gewichte "für" 100%25 x.pt'
    await put(agent, (await ask(agent, task, name=name)).data, CONTENT)
    [found] = (await operator.call("GET", "/tasks/t/artifacts")).data["artifacts"]
    assert found["name"] == name
    path = f"/api/v1/admin/tasks/t/artifacts/{task['attempt_id']}/Gewichte%20%22f%C3%BCr%22%20100%2525%20x.pt"
    async with operator.session.get(operator.plane.url + path, headers=operator.headers) as response:
        assert await response.read() == CONTENT


@pytest.mark.parametrize(
    ("more", "named"), [({"size_bytes": -1}, "size_bytes"), ({"sha256": "abc"}, "sha256"), ({"name": None}, "name")]
)
async def test_bad_request(agent: Agent, task: dict[str, Any], more: dict[str, Any], named: str) -> None:
    """30005 with the field."""
    answer = await ask(agent, task, **more)
    assert answer.code == 30005
    assert answer.message.startswith(named)


async def test_only_the_attempt_itself(agent: Agent, operator: Operator, task: dict[str, Any]) -> None:
    """Another agent, another attempt and an unknown task are fenced."""
    other = Agent(operator.plane, operator.session, await operator.enrol("machine-2"), "agent-2", "machine-2")
    assert (await ask(other, task)).code == 30001
    assert (await ask(agent, task | {"attempt_id": "a9"})).code == 30001
    assert (await ask(agent, task | {"id": "nobody"})).code == 30004


async def test_superseded_attempt(agent: Agent, operator: Operator, task: dict[str, Any], clock: MovableClock) -> None:
    """30001 as soon as somebody else has the task; a lease that is over without that is no hindrance."""
    clock.time_s += 61
    operator.plane.clock_moved()
    newer = await agent.claim_one(wait_sec=DEADLINE_S)
    assert newer["id"] == task["id"]
    assert (await ask(agent, task)).code == 30001
    clock.time_s += 61
    assert (await ask(agent, newer)).code == 0


async def test_after_the_result(agent: Agent, task: dict[str, Any]) -> None:
    """An attempt's files may follow its result; nobody must wait for them."""
    await agent.complete(task, **FAILURE)
    assert (await put(agent, (await ask(agent, task)).data, CONTENT)).code == 0


async def test_operator_removes_a_file(
    agent: Agent, operator: Operator, settings: Settings, task: dict[str, Any]
) -> None:
    """It is gone from the disk, its URL is good for nothing, and the audit log says who did it."""
    target = (await ask(agent, task)).data
    await put(agent, target, CONTENT)
    path = f"/tasks/t/artifacts/{task['attempt_id']}/model.pt"
    assert (await operator.call("DELETE", path)).code == 0
    assert kept(settings) == []
    assert (await put(agent, target, CONTENT)).status == 404
    assert (await operator.call("DELETE", path)).code == 30004
    [entry] = (await operator.call("GET", "/audit?action=artifact.remove")).data["entries"]
    assert (entry["subject"], entry["detail"]) == ("t", f"model.pt of attempt {task['attempt_id']}")


@pytest.mark.parametrize("settings", [{"upload_max_bytes": 10}], indirect=True)
async def test_size_is_bounded(agent: Agent, task: dict[str, Any]) -> None:
    """30005 above `upload_max_bytes`: asking again would change nothing."""
    assert (await ask(agent, task, b"x" * 10)).code == 0
    assert (await ask(agent, task, b"x" * 11, name="larger")).code == 30005


@pytest.mark.parametrize("settings", [{"uploads_per_attempt_max": 2}], indirect=True)
async def test_number_is_bounded(agent: Agent, task: dict[str, Any]) -> None:
    """30005 above `uploads_per_attempt_max`; what was asked for before is still answered."""
    assert [(await ask(agent, task, name=name)).code for name in ("a", "b", "c", "a")] == [0, 0, 30005, 0]


@pytest.mark.parametrize("settings", [{"uploads_total_max_bytes": 10}], indirect=True)
async def test_total_is_bounded(agent: Agent, task: dict[str, Any]) -> None:
    """503 above `uploads_total_max_bytes`: it may work later, when an operator has removed some."""
    assert (await ask(agent, task, b"x" * 6, name="a")).code == 0
    answer = await ask(agent, task, b"x" * 6, name="b")
    assert (answer.status, answer.code) == (503, 30027)


@pytest.mark.parametrize("settings", [{"public_url": "https://plane.example/"}], indirect=True)
async def test_public_url(agent: Agent, task: dict[str, Any]) -> None:
    """Behind a proxy the plane is reached elsewhere."""
    assert (await ask(agent, task)).data["url"].startswith("https://plane.example/api/v1/uploads/")


async def test_leftovers_are_cleared(settings: Settings) -> None:
    """What a dead plane left half-written goes after a day, not what another instance writes now."""
    assert settings.uploads_dir is not None
    partial = settings.uploads_dir / ".partial"
    partial.mkdir(parents=True)
    for name, age_s in (("old", 90_000), ("young", 60)):
        (partial / name).write_bytes(b"x")
        written_s = settings.now_ms / 1000 - age_s
        os.utime(partial / name, (written_s, written_s))
    async with serve(settings):
        assert [path.name for path in partial.iterdir()] == ["young"]


async def test_directory_that_cannot_be(settings: Settings, tmp_path: Path) -> None:
    """The plane does not start, and says which directory it is."""
    (tmp_path / "file").write_bytes(b"")
    bad = dataclasses.replace(settings, uploads_dir=tmp_path / "file" / "uploads")
    with pytest.raises(CannotServe, match="file/uploads cannot be used"):
        async with serve(bad):
            pass


async def test_agents_own_client(agent: Agent, operator: Operator, task: dict[str, Any], tmp_path: Path) -> None:
    """The agent's client asks for the URL, reads the answer, and what it says works."""
    (tmp_path / "token").write_text(agent.token)
    wanted = UploadUrlRequest(agent_id=agent.agent_id, attempt_id=task["attempt_id"], **about(CONTENT))
    url = operator.plane.url
    async with ControlPlane(url, token_file=tmp_path / "token", timeout_s=DEADLINE_S, clock=SystemClock()) as client:
        reply = await client.upload_url(TaskId(task["id"]), wanted)
    target = parse_upload_target(reply.answer.data)
    answer = await request(agent.session, target.method, target.url, target.headers, data=io.BytesIO(CONTENT))
    assert answer.data["key"] == target.key
    assert agent.machine_id == MACHINE
