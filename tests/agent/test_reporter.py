"""The outbox is drained to a real plane: in order per attempt, side by side across attempts, and never in a hurry."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from control_plane.faults import DropAfter, DropBefore, Hold, Respond, hiccup
from remotegpu_agent.reporter import Fate, Reporter
from remotegpu_agent.supervise import Loops
from remotegpu_queue import outbox, views
from remotegpu_queue.outbox import Report
from remotegpu_queue.store import Store
from remotegpu_schemas.errors import CODES, Code
from remotegpu_schemas.limits import REPORTS_IN_FLIGHT_MAX
from remotegpu_schemas.states import Cause
from remotegpu_schemas.task import TaskId
from tests.agent.support import Contact, MovableClock, OpenStore, S, Told, add_report, contact, gather, open_store
from tests.control_plane.support import RESULT
from tests.waiting import DEADLINE_S, until

OK = Respond(200, b'{"code": 0, "message": "ok", "data": {}}', {"Content-Type": "application/json"})


def refusal(code: Code) -> Respond:
    """A business refusal as the plane sends it."""
    body = {"code": code, "message": CODES[code].meaning, "data": None}
    return Respond(CODES[code].http_status, json.dumps(body).encode(), {"Content-Type": "application/json"})


@dataclass
class Delivery:
    """A running reporter and everything around it."""

    opened: OpenStore
    contact: Contact
    clock: MovableClock
    reporter: Reporter
    delivered: Told
    refused: Told

    @property
    def store(self) -> Store:
        """The database."""
        return self.opened.store

    async def add(self, attempt_id: str, kind: outbox.ReportKind, **body: Any) -> None:
        """A report that is due now."""
        await add_report(self.store, attempt_id, kind, **body)
        self.reporter.changed()

    async def calls(self, call: str, count: int) -> None:
        """Wait for so many calls in all."""
        await self.contact.plane.faults.wait_calls(call, count, DEADLINE_S)

    async def row(self, attempt_id: str) -> dict[str, Any] | None:
        """The oldest report of an attempt as it is stored."""

        def query(db: sqlite3.Connection) -> dict[str, Any] | None:
            found = db.execute("SELECT * FROM outbox WHERE attempt_id = ? ORDER BY id", [attempt_id]).fetchone()
            return dict(found) if found is not None else None

        return await self.store.read(query)

    async def tried(self, attempt_id: str, tries: int = 1) -> dict[str, Any]:
        """The oldest report once it has been put off so often."""

        async def look() -> dict[str, Any] | None:
            row = await self.row(attempt_id)
            return row if row is not None and row["tries"] >= tries else None

        return await until(look) or {}

    async def is_empty(self) -> None:
        """Wait until nothing is left to deliver."""

        async def look() -> bool:
            return (await self.store.read(views.counts)).reports_waiting == 0

        await until(look)


@pytest.fixture
async def delivery(tmp_path: Path) -> AsyncGenerator[Delivery]:
    """A reporter that is running; chance always gives the longest pause."""
    async with running(tmp_path) as made:
        yield made


@contextlib.asynccontextmanager
async def running(directory: Path) -> AsyncGenerator[Delivery]:
    """A store, a plane, and a reporter between them."""
    clock, loops, delivered, refused = MovableClock(), Loops(), Told(), Told()
    async with open_store(directory) as opened, contact(directory, clock) as reached:
        reporter = Reporter(
            opened.store,
            reached.client,
            clock,
            loops,
            lambda: 1.0,
            on_settled=lambda report, fate: delivered(report) if fate is Fate.DELIVERED else None,
            on_refused=refused.told,
        )
        loops.run_forever("reports", reporter.run)
        try:
            yield Delivery(opened, reached, clock, reporter, delivered, refused)
        finally:
            await loops.close()
            assert not loops.failures


async def test_reports_of_an_attempt_arrive_in_order(delivery: Delivery, tmp_path: Path) -> None:
    """Start before progress before completion, although all three are due at once; the plane stores them so."""
    [task_id] = await delivery.contact.operator.submit()
    await delivery.contact.register()
    attempt_id = (await delivery.contact.claim_one()).attempt_id
    names = {"agent_id": "agent-1", "attempt_id": attempt_id}
    bodies: list[tuple[outbox.ReportKind, dict[str, Any]]] = [
        ("start", {"process_id": 42, "run_no": 1}),
        ("progress", {"percent": 50.0, "message": "half"}),
        ("complete", RESULT),
    ]

    def unit(db: sqlite3.Connection) -> None:
        for kind, body in bodies:
            outbox.add_report(db, attempt_id, kind, names | body, 1000, "boot", TaskId(task_id))

    await delivery.store.write(unit)
    delivery.reporter.changed()
    reports: list[Report] = await delivery.delivered.wait(3)
    assert [report.kind for report in reports] == ["start", "progress", "complete"]
    task = await delivery.contact.operator.task(task_id)
    assert (task["status"], task["progress"]["percent"]) == ("completed", 50.0)
    assert [event["kind"] for event in task["events"]] == ["created", "claimed", "started", "completed"]
    await delivery.is_empty()


async def test_a_held_report_holds_its_own_attempt_only(delivery: Delivery) -> None:
    """While one start is not answered, another attempt's reports go through, and those behind the held one wait."""
    hold = Hold()
    delivery.contact.plane.faults.order("start", hold)
    delivery.contact.plane.faults.order_always("complete", OK)
    delivery.contact.plane.faults.order_always("start", OK)
    await delivery.add("slow", "start")
    await gather(hold.reached.wait())
    await delivery.add("slow", "complete")
    await delivery.add("fast", "start")
    await delivery.add("fast", "complete")
    reports = await delivery.delivered.wait(2)
    assert [(report.attempt_id, report.kind) for report in reports] == [("fast", "start"), ("fast", "complete")]
    assert delivery.contact.plane.faults.calls["complete"] == 1
    assert delivery.contact.plane.faults.calls["start"] == 2


async def test_f16_so_many_at_once_and_no_more(delivery: Delivery) -> None:
    """F16: of many attempts' reports a bounded number is on its way; each answer makes room for the next."""
    holds = [Hold() for _ in range(REPORTS_IN_FLIGHT_MAX)]
    delivery.contact.plane.faults.order("complete", *holds)
    delivery.contact.plane.faults.order_always("complete", OK)
    for number in range(REPORTS_IN_FLIGHT_MAX + 8):
        await add_report(delivery.store, f"a-{number}", "complete")
    delivery.reporter.changed()
    await gather(*(hold.reached.wait() for hold in holds))
    assert delivery.contact.plane.faults.calls["complete"] == REPORTS_IN_FLIGHT_MAX
    delivery.contact.plane.faults.release_held()
    await delivery.calls("complete", REPORTS_IN_FLIGHT_MAX + 8)


async def test_f13_a_lost_answer_costs_a_repeat(delivery: Delivery) -> None:
    """F13: what the plane has done without our knowing is sent again, and delivered once for us."""
    delivery.contact.plane.faults.order("complete", DropAfter(), OK)
    await delivery.add("a", "complete")
    assert (await delivery.tried("a"))["last_error"]
    await delivery.delivered.wait()
    await delivery.calls("complete", 2)
    await delivery.is_empty()


async def test_f18_retry_after_is_honoured(delivery: Delivery) -> None:
    """F18: a 503 that asks for 40 s puts the report off for so long, whatever the backoff says; then it is sent."""
    delivery.contact.plane.faults.order("start", Respond(503, b"busy", {"Retry-After": "40"}), OK)
    before_ns = delivery.clock.boottime_ns()
    await delivery.add("a", "start")
    row = await delivery.tried("a")
    assert 40 * S <= row["due_boottime_ns"] - before_ns < 45 * S
    delivery.reporter.changed()
    delivery.clock.move(41)
    delivery.reporter.changed()
    await delivery.delivered.wait()
    assert delivery.contact.plane.faults.calls["start"] == 2


async def test_f18_one_retry_after_holds_for_every_report(delivery: Delivery) -> None:
    """F18: of many reports that wait no more are sent than were on their way; after the time all arrive."""
    faults, in_flight = delivery.contact.plane.faults, REPORTS_IN_FLIGHT_MAX
    faults.order_always("complete", Respond(429, b"", {"Retry-After": "40"}))
    for number in range(3 * in_flight):
        await add_report(delivery.store, f"a-{number}", "complete")
    delivery.reporter.changed()
    await delivery.tried("a-0")
    with contextlib.suppress(TimeoutError):
        await faults.wait_calls("complete", in_flight + 1, 0.3)
    assert 1 <= faults.calls["complete"] <= in_flight
    faults.order_always("complete", OK)
    delivery.clock.move(41)
    delivery.reporter.changed()
    await delivery.delivered.wait(3 * in_flight)


async def test_the_backoff_is_on_disk(tmp_path: Path) -> None:
    """A new reporter on the same database does not begin again from the shortest pause."""
    async with running(tmp_path) as first:
        first.contact.plane.faults.order_always("start", Respond(500))
        await first.add("a", "start")
        row = await first.tried("a")
        for tries in range(2, 4):
            first.clock.move(60)
            first.reporter.changed()
            row = await first.tried("a", tries)
        assert row["due_boottime_ns"] - first.clock.boottime_ns() > 1 * S
    async with running(tmp_path) as second:
        second.clock.move(600)
        second.contact.plane.faults.order_always("start", Respond(500))
        before_ns = second.clock.boottime_ns()
        second.reporter.changed()
        row = await second.tried("a", 4)
        assert row["due_boottime_ns"] - before_ns >= 4 * S
        assert row["first_try_at_ms"] is not None


async def test_f17_a_refused_token_is_tried_slowly_and_nothing_is_lost(delivery: Delivery) -> None:
    """F17: 401 keeps the report and waits seconds, not fractions; afterwards it arrives."""
    delivery.contact.plane.faults.order("complete", Respond(401))
    delivery.contact.plane.faults.order_always("complete", OK)
    before_ns = delivery.clock.boottime_ns()
    await delivery.add("a", "complete")
    row = await delivery.tried("a")
    assert 5 * S <= row["due_boottime_ns"] - before_ns < 8 * S
    assert not delivery.refused.calls
    delivery.clock.move(10)
    delivery.reporter.changed()
    await delivery.delivered.wait()


async def test_a_refused_body_becomes_a_dead_letter_and_the_rest_goes_on(delivery: Delivery) -> None:
    """30005: kept, shown, not repeated; the report behind it is delivered."""
    delivery.contact.plane.faults.order("start", refusal(Code.INVALID_PARAMETERS))
    delivery.contact.plane.faults.order_always("complete", OK)
    await delivery.add("a", "start")
    await delivery.add("a", "complete")
    [report] = await delivery.delivered.wait()
    assert report.kind == "complete"
    row = await delivery.row("a")
    assert row is not None
    assert (row["kind"], row["is_dead"], row["last_error"]) == ("start", 1, "invalid parameters")
    assert delivery.contact.plane.faults.calls["start"] == 1
    assert not delivery.refused.calls


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (Code.ATTEMPT_MISMATCH, Cause.SUPERSEDED),
        (Code.TASK_NOT_FOUND, Cause.SUPERSEDED),
        (Code.TASK_FINISHED, Cause.SUPERSEDED),
    ],
)
async def test_f14_a_superseded_attempt_says_nothing_more(delivery: Delivery, code: Code, cause: Cause) -> None:
    """F14: its process is stopped, and all that it still had to say is dropped."""
    delivery.contact.plane.faults.order("start", refusal(code))
    await add_report(delivery.store, "a", "start")
    await add_report(delivery.store, "a", "complete")
    await delivery.add("other", "release")
    await delivery.is_empty()
    assert ("a", cause) in delivery.refused.calls
    assert delivery.contact.plane.faults.calls["complete"] == 0
    assert await delivery.row("a") is None


async def test_f15_a_late_completion_is_kept_as_a_dead_letter(delivery: Delivery) -> None:
    """F15: 30003 on a completion: nobody's result is thrown away."""
    delivery.contact.plane.faults.order("complete", refusal(Code.LEASE_EXPIRED))
    await delivery.add("a", "complete")
    await delivery.is_empty()
    row = await delivery.row("a")
    assert row is not None
    assert row["is_dead"] == 1


async def test_f51_a_hiccup_is_repeated_until_a_day_is_over(delivery: Delivery) -> None:
    """F51: a bare 404 never kills and never drops; after 24 h and 100 tries of it the report is a dead letter."""
    delivery.contact.plane.faults.order_always("complete", hiccup(404, in_body=True))
    await delivery.add("a", "complete")
    await delivery.tried("a")
    delivery.clock.move(87_000)
    delivery.reporter.changed()
    assert (await delivery.tried("a", 2))["is_dead"] == 0  # the clock on the wall may have jumped
    await delivery.store.write(lambda db: db.execute("UPDATE outbox SET tries = 100"))
    delivery.clock.move(1_000)
    delivery.reporter.changed()
    await delivery.is_empty()
    assert (await delivery.tried("a", 101))["is_dead"] == 1
    assert not delivery.refused.calls


async def test_a_missing_optional_call_is_switched_off_until_the_next_register(delivery: Delivery) -> None:
    """A plane without `progress`: asked once, then not again; a register lets it be tried anew."""
    delivery.contact.plane.faults.order("progress", Respond(404, b"404 page not found"))
    delivery.contact.plane.faults.order_always("progress", OK)
    await delivery.add("a", "progress", percent=1.0, message="")
    await delivery.is_empty()
    await delivery.add("b", "progress", percent=1.0, message="")
    await delivery.is_empty()
    assert delivery.contact.plane.faults.calls["progress"] == 1
    assert not delivery.delivered.calls
    delivery.reporter.registered()
    await delivery.add("c", "progress", percent=1.0, message="")
    await delivery.delivered.wait()
    assert delivery.contact.plane.faults.calls["progress"] == 2


async def test_f24_a_full_disk_does_not_make_the_agent_hammer_the_plane(delivery: Delivery) -> None:
    """F24: an answer that cannot be stored is asked for again after a pause, not as fast as the network carries it."""
    hold = Hold()
    delivery.contact.plane.faults.order("complete", hold)
    delivery.contact.plane.faults.order_always("complete", OK)
    await delivery.add("a", "complete")
    await gather(hold.reached.wait())
    await delivery.opened.refuse_writes()
    hold.release.set()
    delivery.contact.plane.faults.order_always("start", OK)
    with contextlib.suppress(TimeoutError):
        await delivery.contact.plane.faults.wait_calls("complete", 4, 0.5)
    assert delivery.contact.plane.faults.calls["complete"] <= 2
    await delivery.opened.take_writes()
    await delivery.is_empty()


async def test_contact_that_is_back_is_used_at_once(delivery: Delivery) -> None:
    """`changed` looks at what is due now; what is put off stays put off."""
    delivery.contact.plane.faults.order("start", Respond(503))
    await delivery.add("late", "start")
    await delivery.tried("late")
    delivery.contact.plane.faults.order_always("start", OK)
    await delivery.add("now", "start")
    [report] = await delivery.delivered.wait()
    assert report.attempt_id == "now"
    await asyncio.sleep(0)
    assert await delivery.row("late") is not None


async def test_what_was_settled_while_the_outbox_was_read_is_not_sent_again(
    delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at the outbox from before an answer still shows the report as due: it is not taken at its word."""
    [task_id] = await delivery.contact.operator.submit()
    await delivery.contact.register()
    attempt_id = (await delivery.contact.claim_one()).attempt_id
    hold, has_read, may_go_on, read = Hold(), asyncio.Event(), asyncio.Event(), delivery.store.read
    delivery.contact.plane.faults.order("complete", hold)
    names = {"agent_id": "agent-1", "attempt_id": attempt_id}

    def unit(db: sqlite3.Connection) -> None:
        start: dict[str, Any] = {"process_id": 42, "run_no": 1}
        outbox.add_report(db, attempt_id, "start", names | start, 1000, "boot", TaskId(task_id))
        outbox.add_report(db, attempt_id, "complete", names | RESULT, 1000, "boot", TaskId(task_id))

    await delivery.store.write(unit)
    delivery.reporter.changed()
    async with asyncio.timeout(DEADLINE_S):
        await hold.reached.wait()

    async def read_slowly(query: Callable[[sqlite3.Connection], Any]) -> Any:
        found = await read(query)
        has_read.set()
        await may_go_on.wait()
        return found

    monkeypatch.setattr(delivery.store, "read", read_slowly)
    delivery.reporter.changed()
    async with asyncio.timeout(DEADLINE_S):
        await has_read.wait()
    hold.release.set()
    assert [report.kind for report in await delivery.delivered.wait(2)] == ["start", "complete"]
    may_go_on.set()
    await delivery.add("other", "start")
    await delivery.calls("start", 2)
    assert delivery.contact.plane.faults.calls["complete"] == 1


async def test_f16_each_delivery_brings_others_forward(delivery: Delivery) -> None:
    """F16: what an outage has put off for up to a minute is delivered as soon as the plane takes a report again."""
    faults = delivery.contact.plane.faults
    faults.order("complete", DropBefore(), times=40)
    for number in range(40):
        await delivery.add(f"a{number}", "complete")
    for number in range(40):
        await delivery.tried(f"a{number}")
    faults.order_always("complete", OK)
    await delivery.reporter.contact_is_back()
    await delivery.delivered.wait(40)
    await delivery.is_empty()
    assert faults.calls["complete"] == 80


async def test_f51_what_waits_for_its_own_reason_is_not_brought_forward(delivery: Delivery) -> None:
    """F51: the plane takes others' reports; the one that it has refused alone waits for its own time."""
    faults = delivery.contact.plane.faults
    faults.order("complete", hiccup(404))
    faults.order_always("complete", OK)
    await delivery.add("odd", "complete")
    before = await delivery.tried("odd")
    await delivery.reporter.contact_is_back()
    for number in range(3):
        await delivery.add(f"a{number}", "complete")
    await delivery.delivered.wait(3)
    assert await delivery.row("odd") == before


async def test_f16_what_fails_again_is_brought_forward_no_more(delivery: Delivery) -> None:
    """F16: a report that makes the plane stumble each time costs one try more, not one at each delivery."""
    faults = delivery.contact.plane.faults
    faults.order("complete", Respond(500), Respond(500))
    faults.order_always("complete", OK)
    await delivery.add("poison", "complete")
    await delivery.tried("poison")
    await delivery.reporter.contact_is_back()
    before = await delivery.tried("poison", 2)
    for number in range(3):
        await delivery.add(f"a{number}", "complete")
    await delivery.delivered.wait(3)
    assert await delivery.row("poison") == before
