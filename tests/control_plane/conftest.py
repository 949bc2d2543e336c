"""A real plane on loopback with an empty database; its clock stands still until a test moves it.

Every test that uses `database`, if only through `plane`, runs twice: on SQLite and on PostgreSQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from pathlib import Path

import aiohttp
import pytest

from control_plane import Plane, Settings, serve
from control_plane.bell import wait
from tests.control_plane.postgres import Postgres, running_postgres
from tests.control_plane.support import ADMIN_TOKEN, Agent, MovableClock, Operator


@pytest.fixture
def clock() -> MovableClock:
    """The plane's clock."""
    return MovableClock()


@pytest.fixture(scope="session")
def postgres() -> Generator[Postgres]:
    """A PostgreSQL for all tests. Those that stop it have their own."""
    with running_postgres() as server:
        server.execute("CREATE DATABASE plane")
        yield server


@pytest.fixture
def own_postgres() -> Generator[Postgres]:
    """A PostgreSQL that a test may stop."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    """An empty database."""
    postgres.execute("DROP SCHEMA public CASCADE", "CREATE SCHEMA public", name="plane")
    return postgres.url("plane")


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """An empty database of either kind."""
    if request.param == "sqlite":
        return tmp_path / "plane.db"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture
def other_database(database: Path | str, tmp_path: Path, request: pytest.FixtureRequest) -> Path | str:
    """Another empty one of the same kind."""
    if isinstance(database, Path):
        return tmp_path / "other.db"
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.new_database()


@pytest.fixture
def run_sql(database: Path | str, request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Runs a statement in the database, behind the plane's back."""

    def run(statement: str) -> None:
        if isinstance(database, Path):
            with contextlib.closing(sqlite3.connect(database)) as db:
                db.execute(statement)
        else:
            postgres: Postgres = request.getfixturevalue("postgres")
            postgres.execute(statement, name="plane")

    return run


@pytest.fixture
def settings(database: Path | str, clock: MovableClock) -> Settings:
    """A strict plane with leases of a minute."""
    return Settings(database=database, admin_token=ADMIN_TOKEN, now=clock)


@pytest.fixture
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    """Connections to planes."""
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
async def plane(settings: Settings) -> AsyncGenerator[Plane]:
    """The plane of `settings`."""
    async with serve(settings) as plane:
        yield plane


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set as soon as a long poll has found nothing and waits."""
    held = asyncio.Event()

    async def note_and_wait(event: asyncio.Event, timeout_s: float | None) -> bool:
        held.set()
        return await wait(event, timeout_s)

    monkeypatch.setattr("control_plane.service.wait", note_and_wait)
    return held


@pytest.fixture
def operator(plane: Plane, session: aiohttp.ClientSession) -> Operator:
    """Somebody with the admin token."""
    return Operator(plane, session)


@pytest.fixture
async def agent(operator: Operator) -> Agent:
    """A registered agent of an enrolled machine."""
    agent = Agent(operator.plane, operator.session, await operator.enrol())
    assert (await agent.register()).code == 0
    return agent


@pytest.fixture
def make_agent(operator: Operator) -> Callable[[str, str], Awaitable[Agent]]:
    """Makes a registered agent, by agent and machine id."""

    async def make(agent_id: str, machine_id: str) -> Agent:
        other = Agent(operator.plane, operator.session, await operator.enrol(machine_id), agent_id, machine_id)
        await other.register()
        return other

    return make
