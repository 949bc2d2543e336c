"""A real agent in a process of its own: started, asked over its socket, killed, started again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

import aiohttp
import psutil

from tests.waiting import DEADLINE_S, until

REPOSITORY: Final = Path(__file__).resolve().parents[2]


class AgentFailed(AssertionError):
    """The agent did not do what the test needs it to; the message has its log."""


class AgentProcess:
    """`remotegpu-agent run` on a directory; every `start` is a new process on the same state."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        self.directory = directory
        self.state_dir = directory / "state"
        self.socket = directory / "agent.sock"
        self.log = directory / "agent.log"
        self.config = directory / "agent.yaml"
        self.environ: dict[str, str] = {}
        """What the next process has in its environment beside the usual."""
        self._sections: dict[str, Any] = {
            "agent": {"state_dir": str(self.state_dir)},
            "api": {"listen": None, "socket": str(self.socket)},
        }
        self.configure(settings)
        self.launched_by: list[str] = []
        """What the program is started through: a command that becomes the one that follows it."""
        self._process: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Start it."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop it as systemd does, then make sure; runs go on, so a test cancels what it leaves."""
        await self.stop()
        if self._session is not None:
            await self._session.close()

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Lay these sections over the config; the next process reads it."""
        for section, values in settings.items():
            self._sections[section] = {**self._sections.get(section, {}), **values}
        self.config.write_text(json.dumps(self._sections))

    @property
    def pid(self) -> int:
        """The agent's own process."""
        assert self._process is not None
        return self._process.pid

    @property
    def has_started(self) -> bool:
        """Whether there has been a process at all."""
        return self._process is not None

    @property
    def is_running(self) -> bool:
        """Whether the present process has not ended."""
        return self._process is not None and self._process.returncode is None

    async def spawner(self) -> psutil.Process:
        """Its spawner, once that has come so far as to have its name."""
        children = psutil.Process(self.pid).children

        async def look() -> list[psutil.Process]:
            return [child for child in children() if child.name() == "remotegpu-spawn"]

        [found] = await until(look)
        return found

    def command(self, *arguments: str) -> list[str]:
        """A command line of the program with this agent's config."""
        return [sys.executable, "-m", "remotegpu_agent.cli", "--config", str(self.config), *arguments]

    async def start(self, *, until_ready: bool = True) -> None:
        """Start a process; return once it is ready."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.launched_by,
                *self.command("run"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment() | self.environ,
            )
        if until_ready:
            await self.wait_ready()

    async def wait_ready(self) -> None:
        """Until the API answers as this process. Raises AgentFailed."""
        await until(self._answers)

    async def _answers(self) -> bool:
        if not self.is_running:
            raise AgentFailed(f"the agent ended:\n{self.log.read_text()[-4000:]}")
        with contextlib.suppress(OSError, ValueError, aiohttp.ClientError):
            if json.loads((self.state_dir / "endpoints.json").read_bytes())["pid"] == self.pid:
                return bool((await self.get("/ping"))["version"])
        return False

    async def kill(self) -> None:
        """SIGKILL, as the kernel's OOM killer would."""
        await self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: it does nothing more until `thaw`; a frozen one can be killed."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        return await self._end(signal.SIGTERM)

    async def wait_exit(self) -> int:
        """The exit code of a process that ends by itself."""
        assert self._process is not None
        async with asyncio.timeout(DEADLINE_S):
            return await self._process.wait()

    async def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(number)
        async with asyncio.timeout(DEADLINE_S):
            return await self._process.wait()

    # --- its API, over the Unix socket ---

    def session(self) -> aiohttp.ClientSession:
        """A session over the socket, for calls that give no envelope."""
        if self._session is None:
            connector = aiohttp.UnixConnector(str(self.socket), force_close=True)
            self._session = aiohttp.ClientSession(connector=connector)
        return self._session

    async def call(self, method: str, path: str, **arguments: Any) -> tuple[int, dict[str, Any]]:
        """HTTP status and body."""
        async with self.session().request(method, f"http://localhost/api/v1{path}", **arguments) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str) -> Any:
        """The data of a successful GET."""
        return _data(await self.call("GET", path))

    async def post(self, path: str, body: object = None) -> Any:
        """The data of a successful POST; `body` is sent as JSON, text as it is."""
        data = body if isinstance(body, str) else json.dumps(body)
        return _data(await self.call("POST", path, data=data))

    async def submit(self, **task: Any) -> str:
        """Submit one task; its id."""
        task_ids = (await self.post("/tasks", {"task": task}))["task_ids"]
        return str(task_ids[0])

    async def wait_for(self, task_id: str, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """The task once it has ended. Raises AgentFailed."""
        detail = await self.until_shown(f"/tasks/{task_id}?wait={deadline_s}", bool)
        if detail["state"] not in {"completed", "failed", "cancelled"}:
            raise AgentFailed(f"task {task_id} has not ended: {detail}\n{self.log.read_text()[-4000:]}")
        return detail

    async def wait_running(self, task_id: str) -> dict[str, Any]:
        """The task once its process exists."""
        return await self.until_shown(f"/tasks/{task_id}", lambda task: task["process_id"] is not None)

    async def until_shown(self, path: str, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The data of a GET as soon as it is so; a task that is not there yet may come."""

        async def look() -> dict[str, Any]:
            status, body = await self.call("GET", path)
            data: dict[str, Any] = body["data"] if status == 200 else {}
            return data if data and is_so(data) else {}

        return await until(look)

    async def output(self, task_id: str, stream: str = "stdout") -> str:
        """What a task has written, as far as one piece goes."""
        return str((await self.get(f"/tasks/{task_id}/logs?stream={stream}"))["text"])

    def events(self) -> list[dict[str, Any]]:
        """The log's lines, of every process so far."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


@contextlib.asynccontextmanager
async def agent(directory: Path, **settings: Any) -> AsyncGenerator[AgentProcess]:
    """A running agent with these sections of the config."""
    directory.mkdir(parents=True, exist_ok=True)
    async with AgentProcess(directory, settings) as running:
        yield running


def _data(answer: tuple[int, dict[str, Any]]) -> Any:
    status, body = answer
    if status != 200 or body["code"] != 0:
        raise AgentFailed(f"HTTP {status}: {body}")
    return body["data"]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REMOTEGPU_")}
    return {**kept, "PYTHONUNBUFFERED": "1"}
