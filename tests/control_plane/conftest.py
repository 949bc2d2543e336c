"""A real plane on loopback with a database of its own; its clock stands still until a test moves it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

from control_plane import Plane, Settings, serve
from tests.control_plane.support import ADMIN_TOKEN, Agent, MovableClock, Operator


@pytest.fixture
def clock() -> MovableClock:
    """The plane's clock."""
    return MovableClock()


@pytest.fixture
def settings(tmp_path: Path, clock: MovableClock) -> Settings:
    """A strict plane with leases of a minute."""
    return Settings(database=tmp_path / "plane.db", admin_token=ADMIN_TOKEN, now=clock)


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
