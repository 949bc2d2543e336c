"""Claims against a real plane: when they are made, for how many, and what becomes of each item of an answer."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from control_plane.faults import DropAfter, DropBefore, Hold, Respond
from remotegpu_agent.claims import Claimer, ClaimSettings
from remotegpu_queue import views
from remotegpu_queue.rows import Attempt
from remotegpu_queue.units import ClaimResult
from remotegpu_schemas.states import Cause
from tests.agent.support import AGENT, BOOT, Contact, Host, S, Told, contact, host
from tests.control_plane.support import MACHINE
from tests.waiting import DEADLINE_S, until


@dataclass
class Claiming:
    """A claimer that runs; nothing starts what it claims."""

    host: Host
    contact: Contact
    claimer: Claimer
    claimed: Told
    reasons: list[str]
    bounds: list[int | None]
    request_ids: list[str]

    @property
    def claims(self) -> int:
        """So many claims the plane has seen."""
        return self.contact.plane.faults.calls["claim"]

    async def calls(self, count: int) -> None:
        """Wait for so many claims."""
        await self.contact.plane.faults.wait_calls("claim", count, DEADLINE_S)

    async def stays_at(self, count: int, seconds: float = 0.15) -> None:
        """No claim is made while so much time passes."""
        with contextlib.suppress(TimeoutError):
            await self.contact.plane.faults.wait_calls("claim", count + 1, seconds)
        assert self.claims == count

    async def attempt_of(self, task_id: str) -> Attempt:
        """The stored attempt of a task."""
        return (await self.host.store.read(lambda db: views.find_task(db, task_id)))[0]


@contextlib.asynccontextmanager
async def claiming(
    directory: Path,
    *faults: Any,
    poll_interval_s: float = 0.03,
    long_poll_s: float = 0.0,
    slots: int = 2,
    reasons: Sequence[str] = (),
    bound: int | None = None,
    **plane: Any,
) -> AsyncGenerator[Claiming]:
    """The parts, a plane on which the agent is registered, and a claimer."""
    async with host(directory, slots=slots) as parts, contact(directory, parts.clock, **plane) as reached:
        claimed, ids, blocked, bounds = Told(), list[str](), list(reasons), [bound]

        def new_id() -> str:
            ids.append(f"request-{len(ids) + 1}")
            return ids[-1]

        async def on_claimed(results: Sequence[ClaimResult]) -> None:
            claimed(list(results))

        claimer = Claimer(
            parts.store,
            reached.client,
            parts.dispatcher,
            parts.reports,
            parts.clock,
            ClaimSettings(AGENT, MACHINE, BOOT, poll_interval_s, long_poll_s, default_ttl_s=300.0, margin_s=1.0),
            random=lambda: 0.0,
            new_id=new_id,
            blocked=lambda: blocked,
            bound=lambda: bounds[0],
            can_release=lambda: True,
            on_claimed=on_claimed,
        )
        await reached.register()
        for fault in faults:
            reached.plane.faults.order("claim", fault)
        parts.loops.run_forever("claims", claimer.run)
        yield Claiming(parts, reached, claimer, claimed, blocked, bounds, ids)
        assert "claims" not in parts.loops.failures


def answered(*tasks: object) -> Respond:
    """A claim's answer with these items."""
    body = {"code": 0, "message": "ok", "data": {"tasks": list(tasks)}}
    return Respond(200, json.dumps(body).encode(), {"Content-Type": "application/json"})


async def test_a_plane_that_holds_the_request_is_asked_again_at_once(tmp_path: Path) -> None:
    """Long poll: no pause between claims, and a new task is there as soon as it is submitted."""
    async with claiming(tmp_path, long_poll_s=1.0, poll_interval_s=600.0) as claiming_:
        await claiming_.calls(2)
        hold = Hold()
        claiming_.contact.plane.faults.order("claim", hold)
        [task_id] = await claiming_.contact.operator.submit()
        hold.release.set()
        [result] = (await claiming_.claimed.wait())[0]
        assert result.is_new
        assert (await claiming_.attempt_of(task_id)).origin == "control_plane"


async def test_a_plane_that_answers_at_once_is_asked_at_the_interval(tmp_path: Path) -> None:
    """Without long polls, or where the plane does not know them, `poll_interval` is the pace."""
    async with claiming(tmp_path, answered(), answered(), long_poll_s=25.0, poll_interval_s=0.25) as claiming_:
        started = time.monotonic()
        await claiming_.calls(3)
        assert time.monotonic() - started >= 0.4


async def test_no_claim_while_something_forbids_it(tmp_path: Path) -> None:
    """Draining, not registered: nothing is asked for; when the reason is gone, `changed` wakes the claims."""
    async with claiming(tmp_path, reasons=["this agent is draining"]) as claiming_:
        claiming_.claimer.changed()
        await claiming_.stays_at(0)
        claiming_.reasons.clear()
        claiming_.claimer.changed()
        await claiming_.calls(1)


async def test_no_claim_while_every_slot_is_taken(tmp_path: Path) -> None:
    """What could not start is not asked for; a slot that becomes free is."""
    async with claiming(tmp_path, slots=1, reasons=["not yet"]) as claiming_:
        attempt = await claiming_.host.add("t", command="sleep 60")
        claiming_.host.executor.start(attempt.attempt_id, attempt.task_id, attempt.task.resources)
        claiming_.reasons.clear()
        claiming_.claimer.changed()
        await claiming_.stays_at(0)
        assert await claiming_.host.executor.stop(attempt.attempt_id, Cause.CANCELLED, is_kill=True)
        await claiming_.host.has_ended(attempt.attempt_id)
        claiming_.claimer.changed()
        await claiming_.calls(1)


async def test_no_claim_while_a_waiting_task_is_blocked(tmp_path: Path) -> None:
    """A task that waits here for capacity is not starved by what the plane has; one that never fits blocks nothing."""
    async with claiming(tmp_path, reasons=["not yet"]) as claiming_:
        host_ = claiming_.host
        small = await host_.add("small", command="sleep 60", resources={"cpus": 3})
        await host_.add("big", resources={"cpus": 4})
        await host_.add("impossible", resources={"cpus": 400}, priority=1)
        await host_.dispatcher.decide()
        assert host_.dispatcher.has_blocked
        claiming_.reasons.clear()
        claiming_.claimer.changed()
        await claiming_.stays_at(0)
        assert await host_.executor.stop(small.attempt_id, Cause.CANCELLED)
        await host_.has_ended(small.attempt_id)
        await host_.dispatcher.decide()
        assert not host_.dispatcher.has_blocked
        claiming_.claimer.changed()
        await claiming_.calls(1)


async def test_it_asks_for_what_can_start(tmp_path: Path) -> None:
    """The limit is the free slots; of four tasks at the plane a host with two slots gets two."""
    async with claiming(tmp_path, slots=2, reasons=["not yet"]) as claiming_:
        await claiming_.contact.operator.submit(*[{"command": "true"}] * 4)
        claiming_.reasons.clear()
        claiming_.claimer.changed()
        assert len((await claiming_.claimed.wait())[0]) == 2


async def test_f13_a_claim_is_repeated_under_its_id_until_it_is_answered(tmp_path: Path) -> None:
    """F13: the tasks of a lost answer come with the repeat; the next claim has another id."""
    faults = [DropBefore(), DropAfter(), Respond(500), Respond(200, b"{")]
    async with claiming(tmp_path, *faults, slots=1, reasons=["not yet"]) as claiming_:
        [task_id] = await claiming_.contact.operator.submit()
        claiming_.reasons.clear()
        claiming_.claimer.changed()
        [result] = (await claiming_.claimed.wait())[0]
        assert result.is_new
        assert claiming_.claims >= 5
        events = await claiming_.contact.operator.events(task_id)
        assert events == ["created", "claimed"]
        await claiming_.calls(7)
        assert claiming_.request_ids[0] == "request-1"
        # The four lost ones and the answered one were one request.
        assert len(claiming_.request_ids) <= claiming_.claims - 4


async def test_an_answer_that_refuses_ends_the_request(tmp_path: Path) -> None:
    """After 401 or 400 the next claim is a new one."""
    async with claiming(tmp_path, Respond(400, b'{"code": 30005, "message": "no"}')) as claiming_:
        await claiming_.calls(2)
        assert len(claiming_.request_ids) == 2


async def test_a_claim_that_may_have_been_obeyed_keeps_its_id(tmp_path: Path) -> None:
    """F13, F51: a lost answer, then a hiccup: what was given to the first try comes with the third."""
    hiccup = Respond(409, b'{"code": 409, "message": "hiccup"}')
    async with claiming(tmp_path, DropAfter(), hiccup, slots=1, reasons=["not yet"]) as claiming_:
        [task_id] = await claiming_.contact.operator.submit()
        claiming_.reasons.clear()
        claiming_.claimer.changed()
        [result] = (await claiming_.claimed.wait())[0]
        assert result.is_new
        assert await claiming_.contact.operator.events(task_id) == ["created", "claimed"]


async def test_a_lease_counts_from_the_first_sending(tmp_path: Path) -> None:
    """A stated lease of 60 s, told by the answer to a repeat 20 s later, counts from the first request."""
    task = {"id": "t1", "command": "true", "attempt_id": "a1", "lease_ttl_sec": 60}
    answer = json.dumps({"code": 0, "message": "ok", "data": {"tasks": [task]}}).encode()
    async with claiming(tmp_path, DropBefore(), Respond(200, answer), slots=1, reasons=["not yet"]) as claiming_:
        claiming_.reasons.clear()
        before_ns = claiming_.host.clock.boottime_ns()
        claiming_.claimer.changed()
        await claiming_.calls(1)
        claiming_.host.clock.move(20)
        await claiming_.claimed.wait()
        lease = (await claiming_.attempt_of("t1")).lease
        assert lease is not None
        assert lease.deadline_boottime_ns - before_ns == pytest.approx(59 * S, abs=3 * S)


async def test_f50_every_item_is_used_refused_or_ignored_by_rule(tmp_path: Path) -> None:
    """F50: a good task, one that cannot be run, one without ids, another machine's: only the first is stored."""
    items = [
        {"id": "good", "attempt_id": "a-good", "command": "true"},
        {"id": "bad", "attempt_id": "a-bad", "command": "true", "timeout": "soon"},
        {"id": "../../etc", "attempt_id": "a-evil", "command": "true"},
        {"command": "true"},
        "not even an object",
        {"id": "other", "attempt_id": "a-other", "command": "true", "machine_id": "machine-2"},
    ]
    async with claiming(tmp_path, answered(*items)) as claiming_:
        results = (await claiming_.claimed.wait())[0]
        assert [(result.attempt_id, result.is_new) for result in results] == [("a-good", True)]
        counts = await claiming_.host.store.read(views.counts)
        assert sum(counts.by_state.values()) == 1

        def query(db: sqlite3.Connection) -> list[tuple[str, str, str]]:
            return [tuple(row) for row in db.execute("SELECT attempt_id, task_id, kind FROM outbox")]

        assert await claiming_.host.store.read(query) == [("a-bad", "bad", "complete")]
        body = await claiming_.host.store.read(lambda db: db.execute("SELECT body FROM outbox").fetchone()[0])
        said = json.loads(body)
        assert (said["status"], said["cause"], said["exit_code"], said["runs"]) == ("failed", "policy_refused", 126, 0)
        assert said["error"].startswith("the agent cannot run this task: ")
        lease = (await claiming_.attempt_of("good")).lease
        assert lease is not None
        assert lease.ttl_s == 300.0


async def test_f50_a_repeated_task_is_ignored_and_a_new_attempt_supersedes(tmp_path: Path) -> None:
    """F50: deployed planes repeat what the agent holds; a second attempt of a task ends the first."""
    first = {"id": "t", "attempt_id": "a-1", "command": "true"}
    second = {**first, "attempt_id": "a-2"}
    async with claiming(tmp_path, answered(first), answered(first), answered(first, second)) as claiming_:
        calls = await claiming_.claimed.wait(3)
        assert [[(result.attempt_id, result.is_new) for result in results] for results in calls[:3]] == [
            [("a-1", True)],
            [("a-1", False)],
            [("a-1", False), ("a-2", True)],
        ]
        assert (await claiming_.host.attempt("a-1")).cause == "superseded"
        assert (await claiming_.attempt_of("t")).attempt_id == "a-2"


async def test_f24_claimed_tasks_are_stored_when_there_is_room(tmp_path: Path) -> None:
    """F24: what the plane has given is not thrown away because the disk is full for a moment."""
    async with claiming(tmp_path, slots=1, reasons=["not yet"]) as claiming_:
        [task_id] = await claiming_.contact.operator.submit()
        await claiming_.host.opened.refuse_writes()
        claiming_.reasons.clear()
        claiming_.claimer.changed()
        await claiming_.calls(1)
        await claiming_.stays_at(1, 0.3)
        await claiming_.host.opened.take_writes()
        await claiming_.claimed.wait()
        assert (await claiming_.attempt_of(task_id)).state == "assigned"


async def test_f17_a_bad_token_is_tried_slowly(tmp_path: Path) -> None:
    """F17: seconds, not fractions, between claims that nobody may answer."""
    async with claiming(tmp_path, *[Respond(401)] * 20) as claiming_:
        await claiming_.calls(1)
        await claiming_.stays_at(1, 0.3)


async def test_f18_a_claim_waits_for_its_retry_after(tmp_path: Path) -> None:
    """F18: also when capacity becomes free meanwhile; then the same claim is made again."""
    async with claiming(tmp_path, Respond(429, b"", {"Retry-After": "1"})) as claiming_:
        await claiming_.calls(1)
        claiming_.claimer.changed()
        await claiming_.stays_at(1, 0.8)
        await claiming_.calls(2)


@pytest.mark.parametrize("data", ['{"tasks": {"id": "t"}}', '{"tasks": "t"}', '[{"id": "t"}]', '"t"'])
async def test_f19_a_claim_of_a_wrong_type_is_logged_and_the_next_one_works(tmp_path: Path, data: str) -> None:
    """F19: it holds no task that could be run, nothing fails, and the log says so."""
    odd = Respond(200, b'{"code": 0, "data": ' + data.encode() + b"}", {"Content-Type": "application/json"})
    with capture_logs() as logs:
        async with claiming(tmp_path, odd) as claiming_:
            await claiming_.calls(2)
            [task_id] = await claiming_.contact.operator.submit()
            await claiming_.claimed.wait()
            assert (await claiming_.attempt_of(task_id)).state == "assigned"
            events = [line["event"] for line in logs if line["log_level"] in {"warning", "error"}]
    no_tasks, no_object = "a claimed task cannot be used", "the data of an answer is no object and counts as not given"
    assert events == [no_tasks if "tasks" in data else no_object]


async def test_what_was_claimed_is_found_again(tmp_path: Path) -> None:
    """The attempt is on disk before anybody acts on it."""
    async with claiming(tmp_path, slots=1) as claiming_:
        [task_id] = await claiming_.contact.operator.submit({"command": "exit 3", "priority": 2})
        await claiming_.claimed.wait()

        async def look() -> list[Attempt]:
            return await claiming_.host.store.read(views.open_attempts)

        [attempt] = await until(look)
        assert (attempt.task.id, attempt.task.priority, attempt.state) == (task_id, 2, "assigned")


async def test_f53_no_more_is_claimed_than_may_be_risked(tmp_path: Path) -> None:
    """F53: an unproven host with many free slots asks for as many tasks as its breaker lets it, and no more."""
    async with claiming(tmp_path, slots=8, bound=0) as claiming_:
        await claiming_.contact.operator.submit(*[{"command": "true"}] * 5)
        claiming_.bounds[0] = 2
        claiming_.claimer.changed()
        [results] = await claiming_.claimed.wait(1)
        assert len(results) == 2
