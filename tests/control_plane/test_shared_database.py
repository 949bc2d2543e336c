"""Two planes on one PostgreSQL: they wake each other, and nothing is done twice or lost between them."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable

import aiohttp
import pytest

from control_plane import Plane, Settings, serve
from control_plane.store import listener, postgres
from tests.control_plane.postgres import Postgres
from tests.control_plane.support import ADMIN_TOKEN, DEADLINE_S, Agent, MovableClock, Operator
from tests.waiting import until

NEVER_S = 3600.0
RACES = 10


@pytest.fixture
def database(postgres_url: str) -> str:
    """Only this kind can be shared."""
    return postgres_url


@pytest.fixture
async def other(plane: Plane) -> AsyncGenerator[Plane]:
    """Another plane on the same database, with the same clock."""
    async with serve(dataclasses.replace(plane.settings, port=0)) as other:
        yield other


@pytest.fixture
def other_operator(other: Plane, session: aiohttp.ClientSession) -> Operator:
    """An operator at the other plane."""
    return Operator(other, session)


@pytest.fixture
def elsewhere(agent: Agent, other: Plane) -> Agent:
    """The same agent, at the other plane."""
    return dataclasses.replace(agent, plane=other)


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks again unless told to."""
    monkeypatch.setattr(listener, "FALLBACK_POLL_S", NEVER_S)


# --- notices --------------------------------------------------------------------------------------------------------


async def test_task_wakes_a_poll_at_the_other_plane(
    no_fallback: None, held: asyncio.Event, elsewhere: Agent, operator: Operator
) -> None:
    """A long poll at one plane gets what is submitted at the other, by its notice."""
    polling = asyncio.create_task(elsewhere.claim_one(wait_sec=DEADLINE_S))
    await asyncio.wait_for(held.wait(), DEADLINE_S)
    [task_id] = await operator.submit()
    assert (await asyncio.wait_for(polling, DEADLINE_S / 2))["id"] == task_id


async def test_end_is_heard_at_the_other_plane(
    no_fallback: None, agent: Agent, operator: Operator, other: Plane
) -> None:
    """Who waits for the end of tasks may wait at any plane."""
    [task_id] = await operator.submit()
    task = await agent.claim_one()
    waiting = asyncio.create_task(other.service.wait_ended([task_id], DEADLINE_S))
    await agent.complete(task)
    await waiting


async def test_lost_notice_is_made_up_for(
    monkeypatch: pytest.MonkeyPatch, held: asyncio.Event, elsewhere: Agent, operator: Operator
) -> None:
    """Without any notice the poll looks again by itself."""
    monkeypatch.setattr(listener, "FALLBACK_POLL_S", 0.1)
    monkeypatch.setattr(postgres.PostgresDatabase, "announce", lambda *_: None)
    async with serve(dataclasses.replace(operator.plane.settings, port=0)) as deaf:
        agent = dataclasses.replace(elsewhere, plane=deaf)
        polling = asyncio.create_task(agent.claim_one(wait_sec=DEADLINE_S))
        await asyncio.wait_for(held.wait(), DEADLINE_S)
        [task_id] = await operator.submit()
        assert (await asyncio.wait_for(polling, DEADLINE_S / 2))["id"] == task_id


async def test_replaced_token_is_refused_everywhere(no_fallback: None, elsewhere: Agent, operator: Operator) -> None:
    """A token that one plane replaces is not remembered by the other."""
    assert (await elsewhere.heartbeat()).status == 200
    await operator.enrol()

    async def is_refused() -> bool:
        return (await elsewhere.heartbeat()).status == 401

    await until(is_refused)


async def test_lost_connections_are_replaced(
    no_fallback: None, held: asyncio.Event, elsewhere: Agent, operator: Operator, postgres: Postgres
) -> None:
    """When the server ends all idle connections no call fails, and notices are heard again."""
    postgres.execute(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE datname = 'plane' AND pid <> pg_backend_pid()"
    )
    polling = asyncio.create_task(elsewhere.claim_one(wait_sec=DEADLINE_S))
    await asyncio.wait_for(held.wait(), DEADLINE_S)
    [task_id] = await operator.submit()
    assert (await asyncio.wait_for(polling, DEADLINE_S / 2))["id"] == task_id


# --- races ----------------------------------------------------------------------------------------------------------


async def test_claim_that_is_repeated_at_the_other_plane_meanwhile(
    agent: Agent, elsewhere: Agent, operator: Operator
) -> None:
    """The same request at both planes at once gets the same attempts from both."""
    for number in range(RACES):
        await operator.submit(*[{"command": "true"}] * 4)
        both = await asyncio.gather(*(at.claim(limit=2, request_id=f"r{number}") for at in (agent, elsewhere) * 2))
        first, *others = [sorted(task["attempt_id"] for task in answer.data["tasks"]) for answer in both]
        assert len(first) == 2
        assert others == [first] * 3


async def test_tasks_are_given_out_once(agent: Agent, elsewhere: Agent, operator: Operator) -> None:
    """Claims at both planes at once share the tasks, and none stays behind."""
    hosts = [agent]
    for number in range(2, 5):
        machine_id = f"machine-{number}"
        at = elsewhere.plane if number % 2 == 0 else agent.plane
        token = await operator.enrol(machine_id)
        hosts.append(Agent(at, agent.session, token, f"agent-{number}", machine_id))
    for _ in range(RACES):
        task_ids = await operator.submit(*[{"command": "true"}] * 8)
        answers = await asyncio.gather(*(host.claim(limit=2) for host in hosts))
        claimed = [task["id"] for answer in answers for task in answer.data["tasks"]]
        assert sorted(claimed) == sorted(task_ids)


async def test_completion_that_is_repeated_at_the_other_plane_meanwhile(
    agent: Agent, elsewhere: Agent, operator: Operator
) -> None:
    """The same completion at both planes at once is counted once, and both are answered as a success."""
    for _ in range(RACES):
        [task_id] = await operator.submit()
        task = await agent.claim_one()
        answers = await asyncio.gather(*(at.complete(task) for at in (agent, elsewhere) * 2))
        assert [answer.code for answer in answers] == [0] * 4
        assert (await operator.task(task_id))["completions"] == {"accepted": 1, "repeated": 3, "rejected": 0}


async def test_different_completions_at_once(agent: Agent, elsewhere: Agent, operator: Operator) -> None:
    """Of a completion and a release that come together one counts, and the other hears so."""
    for _ in range(RACES):
        [task_id] = await operator.submit()
        task = await agent.claim_one()
        completed, released = await asyncio.gather(
            agent.complete(task), elsewhere.about("release", task, reason="too late")
        )
        assert sorted([completed.code == 0, released.code == 0]) == [False, True]
        kinds = await operator.events(task_id)
        assert ("completed" in kinds, "released" in kinds) == (completed.code == 0, released.code == 0)
        if released.code == 0:
            await agent.complete(await agent.claim_one())


async def test_same_ids_submitted_at_both_planes(operator: Operator, other_operator: Operator) -> None:
    """Of two submissions with the same ids, in another order even, one is taken and the other refused."""
    for number in range(RACES):
        new = [{"id": f"{number}-{n}", "command": "true"} for n in range(20)]
        answers = await asyncio.gather(
            operator.call("POST", "/tasks", json=new), other_operator.call("POST", "/tasks", json=new[::-1])
        )
        assert sorted(answer.status for answer in answers) == [200, 409], [answer.text for answer in answers]
    assert (await operator.call("GET", "/stats")).data["tasks"]["pending"] == RACES * 20


async def test_registrations_at_once(agent: Agent, elsewhere: Agent, operator: Operator) -> None:
    """An agent that registers at both planes at once is registered."""
    for number in range(RACES):
        pair = [dataclasses.replace(at, agent_id=f"agent-{number}") for at in (agent, elsewhere)]
        answers = await asyncio.gather(*(at.register() for at in pair * 2))
        assert [answer.code for answer in answers] == [0] * 4
    [machine] = (await operator.call("GET", "/machines")).data["machines"]
    assert len(machine["agents"]) == RACES


# --- leases ---------------------------------------------------------------------------------------------------------


async def test_all_planes_end_leases_at_once(
    agent: Agent, operator: Operator, plane: Plane, other: Plane, clock: MovableClock
) -> None:
    """Each lease lapses once, however many planes look after it."""
    task_ids = await operator.submit(*[{"command": "true"}] * 50)
    assert len((await agent.claim(limit=50)).data["tasks"]) == 50
    clock.time_s += 60
    plane.clock_moved()
    other.clock_moved()

    async def have_lapsed() -> bool:
        return int((await operator.call("GET", "/stats")).data["tasks"]["pending"]) == 50

    await until(have_lapsed)
    for task_id in task_ids:
        assert await operator.events(task_id) == ["created", "claimed", "lapsed"]


async def test_lease_of_a_plane_that_is_gone(settings: Settings, session: aiohttp.ClientSession) -> None:
    """A plane ends the leases that another one gave, by the server's clock."""
    real = dataclasses.replace(settings, now=None, lease_ttl_s=0.5)
    async with serve(real) as survivor:
        async with serve(real) as gone:
            operator = Operator(gone, session)
            agent = Agent(gone, session, await operator.enrol())
            [task_id] = await operator.submit()
            await agent.claim_one()
        again = await dataclasses.replace(agent, plane=survivor).claim_one(wait_sec=DEADLINE_S)
        assert again["id"] == task_id


async def test_plane_that_joins_holds_no_lease_longer(
    agent: Agent, plane: Plane, session: aiohttp.ClientSession, clock: MovableClock, operator: Operator
) -> None:
    """The grace after a downtime is not given where another plane was there all the time."""
    await operator.submit()
    task = await agent.claim_one()
    clock.time_s += 59
    async with serve(dataclasses.replace(plane.settings, port=0)) as joining:
        clock.time_s += 2
        assert (await dataclasses.replace(agent, plane=joining).renew(task)).code == 30003


async def test_leases_hold_after_all_planes_were_killed(
    agent: Agent, plane: Plane, clock: MovableClock, operator: Operator, run_sql: Callable[[str], None]
) -> None:
    """Planes that left no word were there until they were last seen."""
    await operator.submit()
    task = await agent.claim_one()
    await plane.service.reaper.stop()  # which says that the plane is there
    run_sql("UPDATE planes SET seen_at_ms = seen_at_ms - 20000")
    clock.time_s += 3600
    async with serve(dataclasses.replace(plane.settings, port=0)) as later:
        assert (await dataclasses.replace(agent, plane=later).renew(task)).code == 0


async def test_host_with_a_wrong_clock(
    settings: Settings, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plane counts by the server's clock, not by its host's."""
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + 3600)
    async with serve(dataclasses.replace(settings, now=None)) as plane:
        assert abs(plane.service.now_ms / 1000 - right()) < 5


# --- outages --------------------------------------------------------------------------------------------------------


async def test_postgres_goes_and_comes_back(
    own_postgres: Postgres, session: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    """While it is away calls get 500 and 30099; afterwards everything is as before, without anybody doing anything."""
    settings = Settings(database=own_postgres.new_database(), admin_token=ADMIN_TOKEN)
    async with serve(settings) as plane:
        operator = Operator(plane, session)
        agent = Agent(plane, session, await operator.enrol())
        await operator.submit()
        task = await agent.claim_one()
        await asyncio.to_thread(own_postgres.stop, "immediate")
        for _ in range(20):
            answer = await agent.renew(task)
            assert (answer.status, answer.code) == (500, 30099)
        assert caplog.text.count("the database cannot be reached") == 1
        await asyncio.to_thread(own_postgres.start)

        async def is_renewed() -> bool:
            return (await agent.renew(task)).code == 0

        await until(is_renewed)
        assert (await agent.complete(task)).code == 0
        [task_id] = await operator.submit()
        assert (await agent.claim_one(wait_sec=DEADLINE_S))["id"] == task_id


async def test_postgres_hangs(
    own_postgres: Postgres, session: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that answers nothing holds up no call for ever, and is used again when it goes on."""
    monkeypatch.setattr(postgres, "POSTGRES_TIMEOUT_S", 1.0)
    async with serve(Settings(database=own_postgres.new_database(), admin_token=ADMIN_TOKEN)) as plane:
        agent = Agent(plane, session, await Operator(plane, session).enrol())
        assert (await agent.register()).code == 0
        with own_postgres.frozen():
            answers = await asyncio.gather(*(agent.heartbeat() for _ in range(20)))
            assert {(answer.status, answer.code) for answer in answers} == {(500, 30099)}

        async def is_back() -> bool:
            return (await agent.heartbeat()).code == 0

        await until(is_back)
