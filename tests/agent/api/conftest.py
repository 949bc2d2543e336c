"""A real server on loopback TCP and a real Unix socket, with the fake daemon behind it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from remotegpu_agent.api import ApiServer, ApiSettings
from remotegpu_agent.audit import AuditLog
from remotegpu_agent.operations import Operations
from tests.agent.api.fake_operations import MACHINE_ID, FakeOperations

OPERATOR = {"X-Agent-Token": "operator-secret"}
READER = {"X-Agent-Token": "reader-secret"}


@dataclasses.dataclass
class Api:
    """A running server and a client for each way to reach it."""

    server: ApiServer
    operations: FakeOperations
    audit_dir: Path
    tcp: aiohttp.ClientSession
    unix: aiohttp.ClientSession

    @property
    def url(self) -> str:
        """Where TCP listens."""
        url = self.server.endpoints.url
        assert url is not None
        return url

    @property
    def port(self) -> int:
        """Its port."""
        return int(self.url.rpartition(":")[2])

    async def call(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        session: aiohttp.ClientSession | None = None,
        **arguments: Any,
    ) -> tuple[int, dict[str, Any]]:
        """Status and decoded body; the operator's token unless headers are given."""
        base = "http://localhost" if session is self.unix else self.url
        sent = OPERATOR if headers is None else headers
        async with (session or self.tcp).request(method, base + path, headers=sent, **arguments) as answer:
            assert answer.content_type == "application/json"
            return answer.status, json.loads(await answer.read())

    def audit_lines(self) -> list[dict[str, Any]]:
        """All that the audit log holds."""
        return [
            json.loads(line)
            for file in sorted(self.audit_dir.glob("*.jsonl"))
            for line in file.read_text().splitlines()
        ]


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name (107 bytes in all); others may enter it."""
    with tempfile.TemporaryDirectory(prefix="rg-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture
def settings(short_dir: Path) -> ApiSettings:
    """TCP on a free port, a Unix socket, an operator's and a reader's token."""
    tokens = short_dir / "tokens"
    tokens.write_text("ci:operate:operator-secret\nboard:read:reader-secret\n")
    tokens.chmod(0o600)
    return ApiSettings(
        state_dir=short_dir,
        machine_id=MACHINE_ID,
        listen="127.0.0.1:0",
        socket=short_dir / "agent.sock",
        tokens_file=tokens,
    )


@contextlib.asynccontextmanager
async def running(settings: ApiSettings, operations: FakeOperations) -> AsyncGenerator[Api, None]:
    """A server with these settings, stopped at the end."""
    behind: Operations = operations
    audit_dir = settings.state_dir / "audit"
    server = ApiServer(behind, settings, AuditLog(audit_dir))
    await server.start()
    try:
        connector = aiohttp.UnixConnector(str(settings.socket))
        async with aiohttp.ClientSession() as tcp, aiohttp.ClientSession(connector=connector) as unix:
            yield Api(server, operations, audit_dir, tcp, unix)
    finally:
        await server.stop()


@pytest.fixture
async def operations() -> FakeOperations:
    """The fake daemon."""
    return FakeOperations()


@pytest.fixture
async def api(settings: ApiSettings, operations: FakeOperations) -> AsyncGenerator[Api, None]:
    """A server with the ordinary settings."""
    async with running(settings, operations) as api:
        yield api


StartApi = Callable[..., contextlib.AbstractAsyncContextManager[Api]]


@pytest.fixture
async def start_api(settings: ApiSettings, operations: FakeOperations) -> StartApi:
    """A server with some settings changed."""

    def start(**changes: Any) -> contextlib.AbstractAsyncContextManager[Api]:
        return running(dataclasses.replace(settings, **changes), operations)

    return start
