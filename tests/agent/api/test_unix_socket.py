"""The real socket with real peers: processes of other users and groups, told apart by the kernel."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from remotegpu_agent.task_user import Submitter
from tests.agent.api.conftest import OPERATOR, Api, StartApi
from tests.agent.api.fake_operations import TASK_ID

SOCKET_GROUP = "daemon"
"""Stands for `remotegpu`, which a development machine need not have."""

CLIENT = """
import http.client, os, socket, sys
path, method, target, token, body, uid, gid, *groups = sys.argv[1:]
os.setgroups([int(group) for group in groups])
os.setgid(int(gid))
os.setuid(int(uid))
connection = http.client.HTTPConnection("localhost", timeout=20)
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.settimeout(20)
connection.sock.connect(path)
connection.request(method, target, body or None, headers={"X-Agent-Token": token} if token else {})
answer = connection.getresponse()
print(answer.status)
print(answer.read().decode())
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")


async def call_as(
    api: Api, user: str, group: str, extra_groups: list[str], method: str, target: str, token: str = "", body: str = ""
) -> tuple[int, dict[str, Any]]:
    """Make a call from a process of that user with these groups."""
    path = api.server.endpoints.socket
    assert path is not None

    ids = [str(pwd.getpwnam(user).pw_uid), *(str(grp.getgrnam(name).gr_gid) for name in (group, *extra_groups))]

    def run() -> str:
        return subprocess.run(
            [sys.executable, "-I", "-c", CLIENT, str(path), method, target, token, body, *ids],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout

    status, _, body = (await asyncio.to_thread(run)).partition("\n")
    return int(status), json.loads(body)


async def test_the_agents_own_user_may_operate(api: Api) -> None:
    """This very process is let in without a token and named by its uid."""
    status, _ = await api.call("POST", f"/api/v1/tasks/{TASK_ID}/cancel", session=api.unix, headers={})
    assert status == 200
    assert [(line["who"], line["from"]) for line in api.audit_lines()] == [(f"uid:{os.geteuid()}", "unix")]


@needs_root
@pytest.mark.parametrize(
    ("group", "extra_groups"), [(SOCKET_GROUP, []), ("nogroup", [SOCKET_GROUP]), ("nogroup", ["sys", SOCKET_GROUP])]
)
async def test_members_of_the_group_may_operate(start_api: StartApi, group: str, extra_groups: list[str]) -> None:
    """The group as primary or as supplementary one lets a user in, through the file's mode and by the credentials."""
    async with start_api(socket_group=SOCKET_GROUP) as api:
        target = f"/api/v1/tasks/{TASK_ID}/cancel"
        status, body = await call_as(api, "nobody", group, extra_groups, "POST", target)
        assert (status, body["code"]) == (200, 0)
        assert api.audit_lines()[0]["who"] == f"uid:{pwd.getpwnam('nobody').pw_uid}"


@needs_root
async def test_who_submits_is_known_by_the_kernel(start_api: StartApi) -> None:
    """The uid is the peer's, whatever token it sends; its directory is what it says."""
    body = '{"task": {"command": "id"}}'
    async with start_api(socket_group=SOCKET_GROUP) as api:
        for target in ("/api/v1/tasks", "/api/v1/tasks?directory=/data/a%20b"):
            token = OPERATOR["X-Agent-Token"]
            assert (await call_as(api, "nobody", SOCKET_GROUP, [], "POST", target, token, body))[0] == 200
        uid = pwd.getpwnam("nobody").pw_uid
        assert api.operations.submitters == [Submitter(uid), Submitter(uid, Path("/data/a b"))]


async def test_a_caller_with_a_token_is_no_user_of_this_host(api: Api) -> None:
    """Over TCP nobody is known by uid, and a directory says nothing."""
    assert (await api.call("POST", "/api/v1/tasks?directory=/data", data='{"task": {"command": "id"}}'))[0] == 200
    assert api.operations.submitters == [None]


@pytest.mark.parametrize("directory", ["data", "", "/a%00b", f"/{'x' * 4096}"])
async def test_a_directory_is_an_absolute_path(api: Api, directory: str) -> None:
    """Anything else is refused by name."""
    target = URL(f"http://localhost/api/v1/tasks?directory={directory}", encoded=True)
    async with api.unix.post(target, data='{"task": {"command": "id"}}') as answer:
        body = await answer.json()
    assert (answer.status, body["code"]) == (400, 30005)
    assert body["message"].startswith("directory: must be an absolute path")


@needs_root
@pytest.mark.parametrize("token", ["", OPERATOR["X-Agent-Token"]])
async def test_another_user_is_forbidden(start_api: StartApi, token: str) -> None:
    """Who gets through the file's mode after all is refused by the credentials; /ping is for everybody."""
    async with start_api(socket_group=SOCKET_GROUP) as api:
        path = api.server.endpoints.socket
        assert path is not None
        path.chmod(0o666)
        for method, target in (("GET", "/api/v1/tasks"), ("POST", f"/api/v1/tasks/{TASK_ID}/cancel")):
            status, body = await call_as(api, "nobody", "nogroup", [], method, target, token)
            assert (status, body["code"]) == (403, 30017)
        assert api.operations.calls == []
        assert (await call_as(api, "nobody", "nogroup", [], "GET", "/api/v1/ping"))[0] == 200


@needs_root
async def test_another_user_cannot_even_connect(api: Api) -> None:
    """The file's mode keeps strangers out before any request."""
    with pytest.raises(subprocess.CalledProcessError) as caught:
        await call_as(api, "nobody", "nogroup", [], "GET", "/api/v1/ping")
    assert "PermissionError" in caught.value.stderr


async def test_any_host_name_does_on_the_socket(api: Api) -> None:
    """No browser reaches the socket, so Host and Origin are not looked at."""
    headers = {"Host": "whatever.example", "Origin": "http://evil.example"}
    status, _ = await api.call("POST", f"/api/v1/tasks/{TASK_ID}/cancel", session=api.unix, headers=headers)
    assert status == 200
