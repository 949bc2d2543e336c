"""The agent's parts put together as `daemon.py` does it, in a directory of a test, with a clock that it can move."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from control_plane import Plane, Settings, serve
from remotegpu_agent.announcer import Announcer
from remotegpu_agent.bookkeeping import Books
from remotegpu_agent.control_plane import ControlPlane
from remotegpu_agent.dispatch import Dispatcher
from remotegpu_agent.executor import Executor
from remotegpu_agent.leases import LeaseKeeper, LeaseSettings
from remotegpu_agent.reports import Reports
from remotegpu_agent.runspec import RunSettings
from remotegpu_agent.supervise import Loops
from remotegpu_queue import leasing, outbox, units, views
from remotegpu_queue.rows import Attempt, Origin
from remotegpu_queue.scheduling import Capacity
from remotegpu_queue.store import Store, ThreadExecutor, migrate, thread_executor
from remotegpu_queue.units import NewAttempt
from remotegpu_schemas.attempt import AttemptId, Lease
from remotegpu_schemas.states import Cause
from remotegpu_schemas.task import Task, TaskId
from remotegpu_schemas.wire import Claim, ClaimRequest, RegisterRequest, Verdict, parse_claims
from remotegpu_sidecar import identity
from remotegpu_sidecar.launcher import Launcher
from tests.control_plane.support import ADMIN_TOKEN, MACHINE, Operator
from tests.waiting import DEADLINE_S

AGENT: Final = "agent-1"
BOOT: Final = identity.boot_id()
S: Final = 1_000_000_000


@dataclass
class MovableClock:
    """The host's clocks, `ahead_ns` later."""

    ahead_ns: int = 0

    def boottime_ns(self) -> int:
        """Nanoseconds since boot."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) + self.ahead_ns

    def wall_ms(self) -> int:
        """Milliseconds since 1970."""
        return (time.time_ns() + self.ahead_ns) // 1_000_000

    def move(self, seconds: float) -> None:
        """Let time pass."""
        self.ahead_ns += round(seconds * S)


@dataclass
class OpenStore:
    """A store whose database can be made read-only under it, as a full disk does."""

    store: Store
    writer: ThreadExecutor

    async def refuse_writes(self) -> None:
        """From now on every write is StoreUnavailable; reads go on."""
        await self.writer.run(lambda db: db.execute("PRAGMA query_only = ON"))

    async def take_writes(self) -> None:
        """There is room again."""
        await self.writer.run(lambda db: db.execute("PRAGMA query_only = OFF"))


@contextlib.asynccontextmanager
async def open_store(directory: Path) -> AsyncGenerator[OpenStore]:
    """A real database in a directory; without waiting for the disk."""
    directory.mkdir(exist_ok=True)
    path = directory / "queue.db"
    writer = await thread_executor(path)
    await writer.run(lambda db: db.execute("PRAGMA synchronous = OFF"))
    await writer.run(lambda db: migrate(db, path))
    store = Store(writer, await thread_executor(path, is_reader=True))
    store.start()
    try:
        yield OpenStore(store, writer)
    finally:
        await store.close()


@dataclass
class Told:
    """Who was told what, in order; `wait` returns once it is so many. An awaited call raises what `refusals` holds."""

    calls: list[Any] = field(default_factory=list)
    refusals: list[Exception] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, *arguments: Any) -> None:
        """Be told."""
        self.calls.append(arguments[0] if len(arguments) == 1 else arguments)
        self._changed.set()

    async def told(self, *arguments: Any) -> bool:
        """Be told, by an awaited call."""
        if self.refusals:
            raise self.refusals.pop(0)
        self(*arguments)
        return True

    async def wait(self, count: int = 1) -> list[Any]:
        """The calls, once there are so many. Raises TimeoutError."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.calls) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.calls


@dataclass
class Host:
    """An agent without its loops and its API."""

    directory: Path
    opened: OpenStore
    clock: MovableClock
    loops: Loops
    launcher: Launcher
    executor: Executor
    leases: LeaseKeeper
    dispatcher: Dispatcher
    reports: Reports
    announcer: Announcer
    reported: Told
    ended: Told
    held: dict[bool, str]
    """Why no local task (True), no claimed one (False) may start."""

    @property
    def store(self) -> Store:
        """The database."""
        return self.opened.store

    async def attempt(self, attempt_id: str) -> Attempt:
        """One attempt as it is stored."""
        found = await self.store.read(lambda db: views.attempt(db, AttemptId(attempt_id)))
        assert found is not None
        return found

    async def add(self, task_id: str, *, origin: Origin = "local", ttl_s: float | None = None, **task: Any) -> Attempt:
        """A waiting attempt."""
        return await self.attempt(
            await add_attempt(self.store, self.clock, task_id, origin=origin, ttl_s=ttl_s, **task)
        )

    async def run_to_end(self, attempt: Attempt) -> Attempt:
        """Start an attempt and wait for the end of its run."""
        self.executor.start(attempt.attempt_id, attempt.task_id, attempt.task.resources)
        await self.has_ended(attempt.attempt_id)
        return await self.attempt(attempt.attempt_id)

    async def has_settled(self) -> None:
        """Wait until nothing is started, runs, or waits for its end to be stored."""
        for attempt_id in list(self.executor.active):
            await self.has_ended(attempt_id)

    async def has_ended(self, attempt_id: AttemptId) -> None:
        """Wait until no process of the attempt is left."""
        active = self.executor.active.get(attempt_id)
        if active is not None:
            async with asyncio.timeout(DEADLINE_S):
                await active.ended.wait()


@contextlib.asynccontextmanager
async def host(directory: Path, *, slots: int = 2, continues: bool = False, **lease: float) -> AsyncGenerator[Host]:
    """The parts, wired; what still runs at the end is killed."""
    clock, loops, announcer, reported, ended = MovableClock(), Loops(), Announcer(), Told(), Told()
    attempts_dir = directory / "attempts"
    launcher, reports = Launcher(attempts_dir), Reports(AGENT, attempts_dir, 4096)
    async with open_store(directory) as opened:
        books = Books(opened.store, reports, clock, BOOT)
        dispatcher: Dispatcher | None = None
        held: dict[bool, str] = {}

        def on_free() -> None:
            if dispatcher is not None:
                dispatcher.changed()

        executor = Executor(
            books,
            launcher,
            clock,
            run_settings(directory),
            loops,
            announcer,
            continues_when_unreachable=continues,
            on_free=on_free,
            on_report=lambda: reported("report"),
        )
        executor.watch(started=lambda _: None, ended=ended)
        executor.leases = books.leases = LeaseKeeper(
            opened.store,
            clock,
            lease_settings(continues=continues, **lease),
            loops,
            lambda: 0.0,
            extend=executor.extend,
            stop=executor.stop,
            has_process=lambda attempt_id: attempt_id in executor.active,
        )
        dispatcher = Dispatcher(
            opened.store,
            executor,
            clock,
            Capacity(slots, 4.0, 4096),
            holds_start=lambda *, is_local: held.get(is_local),
            on_decided=lambda: reported("decided"),
        )
        await launcher.start()
        parts = Host(
            directory,
            opened,
            clock,
            loops,
            launcher,
            executor,
            executor.leases,
            dispatcher,
            reports,
            announcer,
            reported,
            ended,
            held,
        )
        try:
            yield parts
        finally:
            await opened.take_writes()
            for active in list(executor.active.values()):
                await executor.stop(active.attempt_id, Cause.CANCELLED, is_kill=True)
                await parts.has_ended(active.attempt_id)
            await loops.close()
            await launcher.stop()


def run_settings(state_dir: Path, **changes: Any) -> RunSettings:
    """What the host adds to a task; runs as the tests' own user."""
    values: dict[str, Any] = {
        "agent_id": AGENT,
        "machine_id": MACHINE,
        "state_dir": state_dir,
        "default_timeout_s": 0.0,
        "grace_period_s": 10.0,
        "output_limit_bytes": 1024 * 1024,
        "output_segments": 16,
        "user": None,
        "env": {},
    }
    return RunSettings(**{**values, **changes})


def lease_settings(*, continues: bool = False, **changes: float) -> LeaseSettings:
    """Leases of 300 s with a margin of 1 s."""
    values: dict[str, float] = {"ttl_s": 300.0, "renew_interval_s": 60.0, "margin_s": 1.0, **changes}
    return LeaseSettings(agent_id=AGENT, boot_id=BOOT, continues_when_unreachable=continues, **values)


async def add_attempt(
    store: Store,
    clock: MovableClock,
    task_id: str,
    *,
    attempt_id: str | None = None,
    origin: Origin = "local",
    ttl_s: float | None = None,
    renew_interval_s: float | None = None,
    **task: Any,
) -> AttemptId:
    """A waiting attempt; with `ttl_s` a claimed one under a lease that begins now."""
    named = AttemptId(attempt_id or f"{task_id}-{os.getpid()}")
    lease: Lease | None = None
    if ttl_s is not None:
        origin, lease = "control_plane", leasing.lease(ttl_s, clock.boottime_ns(), 1.0, BOOT)
    values: dict[str, Any] = {"command": "true", **task}
    new = NewAttempt(Task(id=task_id, **values), named, origin, BOOT, lease, renew_interval_s=renew_interval_s)

    def unit(db: sqlite3.Connection) -> None:
        if origin == "local":
            units.submit(db, [new], clock.wall_ms())
        else:
            units.add_claims(db, [new], clock.wall_ms())

    await store.write(unit)
    return named


async def add_report(store: Store, attempt_id: str, kind: outbox.ReportKind, **body: Any) -> None:
    """A report of an attempt that need not be stored; its task has the same id."""
    names = {"agent_id": AGENT, "attempt_id": attempt_id}
    await store.write(
        lambda db: outbox.add_report(db, AttemptId(attempt_id), kind, names | body, 1000, BOOT, TaskId(attempt_id))
    )


@dataclass
class Contact:
    """A real plane, an operator of it, and the agent's client, enrolled there."""

    plane: Plane
    operator: Operator
    client: ControlPlane

    async def register(self) -> None:
        """Make the agent known."""
        request = RegisterRequest(
            agent_id=AGENT,
            machine_id=MACHINE,
            version="0",
            hostname="gpu-7",
            ip_address="192.0.2.7",
            agent_port=0,
            max_workers=2,
        )
        assert (await self.client.register(request)).verdict is Verdict.OK

    async def claim_one(self) -> Claim:
        """The one task that the plane has."""
        request = ClaimRequest(agent_id=AGENT, machine_id=MACHINE, limit=1, request_id="by-hand")
        [claim] = parse_claims((await self.client.claim(request)).answer.data)
        assert isinstance(claim, Claim)
        return claim


@contextlib.asynccontextmanager
async def contact(
    directory: Path,
    clock: MovableClock,
    *,
    timeout_s: float = DEADLINE_S,
    on_reconnect: Callable[[], None] = lambda: None,
    **settings: Any,
) -> AsyncGenerator[Contact]:
    """A plane over loopback."""
    values = Settings(database=directory / "plane.db", admin_token=ADMIN_TOKEN, **settings)
    async with serve(values) as plane, aiohttp.ClientSession() as session:
        operator = Operator(plane, session)
        token_file = directory / "token"
        token_file.write_text(await operator.enrol())
        async with ControlPlane(
            plane.url, token_file=token_file, timeout_s=timeout_s, clock=clock, on_reconnect=on_reconnect
        ) as client:
            yield Contact(plane, operator, client)


async def gather(*work: Awaitable[Any]) -> Sequence[Any]:
    """All of it, within the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        return await asyncio.gather(*work)
