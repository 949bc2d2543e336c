"""Leases are kept in time against a real plane, and what is not ours any more ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from control_plane.faults import DropBefore, Hold, Respond, hiccup
from remotegpu_agent.leases import LeaseKeeper
from remotegpu_agent.supervise import Loops
from remotegpu_queue import views
from remotegpu_queue.rows import Attempt
from remotegpu_queue.store import Store, StoreUnavailable
from remotegpu_schemas.attempt import AttemptId, Lease
from remotegpu_schemas.errors import Code
from remotegpu_schemas.states import Cause
from remotegpu_schemas.task import TaskId
from remotegpu_schemas.wire import StartReport, Verdict, format_time
from tests.agent.support import (
    AGENT,
    Contact,
    MovableClock,
    OpenStore,
    S,
    Told,
    add_attempt,
    contact,
    gather,
    lease_settings,
    open_store,
)
from tests.agent.test_reporter import refusal
from tests.waiting import DEADLINE_S, until_so

JSON = {"Content-Type": "application/json"}


def renewed(**data: object) -> Respond:
    """An accepted renewal."""
    return Respond(200, json.dumps({"code": 0, "message": "ok", "data": {"renewed": True, **data}}).encode(), JSON)


@dataclass
class Keeping:
    """A keeper with a plane whose renewals a test orders."""

    opened: OpenStore
    contact: Contact
    clock: MovableClock
    keeper: LeaseKeeper
    loops: Loops
    extended: Told
    stopped: Told
    with_process: set[AttemptId]

    @property
    def store(self) -> Store:
        """The database."""
        return self.opened.store

    @property
    def renewals(self) -> int:
        """So many renewals the plane has seen."""
        return self.contact.plane.faults.calls["renew"]

    async def hold(self, ttl_s: float = 300.0, *, accepted: bool = True, **more: Any) -> Attempt:
        """A claimed attempt whose lease begins now; with `accepted` the plane knows of its start."""
        attempt_id = await add_attempt(self.store, self.clock, "t", attempt_id="a", ttl_s=ttl_s, **more)
        attempt = await self.attempt(attempt_id)
        self.keeper.hold(attempt)
        await asyncio.sleep(0)  # it waits now for the start to be accepted
        if accepted:
            self.keeper.start_accepted(attempt_id)
            await asyncio.sleep(0)  # and now for its time
        return attempt

    async def attempt(self, attempt_id: AttemptId) -> Attempt:
        """As it is stored."""
        found = await self.store.read(lambda db: views.attempt(db, attempt_id))
        assert found is not None
        return found

    async def renewed(self, count: int) -> None:
        """Wait for so many renewals."""
        await self.contact.plane.faults.wait_calls("renew", count, DEADLINE_S)

    async def stays_at(self, count: int, seconds: float = 0.2) -> None:
        """No renewal comes while so much time passes."""
        with contextlib.suppress(TimeoutError):
            await self.contact.plane.faults.wait_calls("renew", count + 1, seconds)
        assert self.renewals == count


@contextlib.asynccontextmanager
async def keeping(
    directory: Path, *, continues: bool = False, compat: bool = False, **settings: float
) -> AsyncGenerator[Keeping]:
    """The keeper; at the end nothing may have failed."""
    clock, loops, extended, stopped = MovableClock(), Loops(), Told(), Told()
    with_process: set[AttemptId] = set()
    async with open_store(directory) as opened, contact(directory, clock, compat=compat) as reached:
        keeper = LeaseKeeper(
            opened.store,
            clock,
            lease_settings(continues=continues, **settings),
            loops,
            lambda: 0.0,
            extend=extended,
            stop=stopped.told,
            has_process=with_process.__contains__,
        )
        keeper.plane = reached.client
        try:
            yield Keeping(opened, reached, clock, keeper, loops, extended, stopped, with_process)
        finally:
            await loops.close()
            assert not loops.failures


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncGenerator[Keeping]:
    """A keeper whose plane renews everything."""
    async with keeping(tmp_path) as made:
        made.contact.plane.faults.order_always("renew", renewed())
        yield made


async def test_a_lease_is_renewed_at_a_third_of_it(kept: Keeping) -> None:
    """Three renewals of a lease of 0.9 s come 0.3 s apart; the deadline moves in shim and database each time."""
    begun_ns = kept.clock.boottime_ns()
    attempt = await kept.hold(ttl_s=0.9)
    await kept.extended.wait(3)
    assert kept.clock.boottime_ns() - begun_ns >= 3 * 0.15 * S
    deadlines = [lease.deadline_boottime_ns for _, lease in kept.extended.calls]
    assert deadlines == sorted(deadlines)
    assert attempt.lease is not None
    assert deadlines[0] > attempt.lease.deadline_boottime_ns
    assert not kept.stopped.calls
    stored = (await kept.attempt(attempt.attempt_id)).lease
    assert stored is not None
    assert stored.deadline_boottime_ns >= deadlines[-2]


async def test_a_lease_that_says_more_often_is_renewed_more_often(kept: Keeping) -> None:
    """The plane's `renew_interval_sec` counts where it is shorter than a third of the lease."""
    await kept.hold(ttl_s=300.0, renew_interval_s=0.05)
    await kept.renewed(3)


async def test_f55_after_a_reconnect_every_lease_is_renewed_at_once(kept: Keeping) -> None:
    """F55: nobody waits for a third of 300 s when contact is back."""
    await kept.hold()
    await kept.stays_at(0, 0.05)
    kept.keeper.renew_all_now()
    await kept.extended.wait(1)
    assert kept.renewals == 1


async def test_nothing_is_renewed_before_the_start_is_accepted(kept: Keeping) -> None:
    """Deployed planes renew only what has an accepted start; once it is, what is due is renewed at once."""
    attempt = await kept.hold(ttl_s=30.0, accepted=False, renew_interval_s=0.01)
    kept.keeper.renew_all_now()
    await kept.stays_at(0, 0.1)
    kept.keeper.start_accepted(attempt.attempt_id)
    await kept.renewed(1)


async def test_f11_the_attempt_ends_with_its_lease(kept: Keeping) -> None:
    """F11: nothing answers until the deadline; then it is stopped, once, as `lease_lost`, and held no more."""
    kept.contact.plane.faults.order_always("renew", DropBefore())
    attempt = await kept.hold(ttl_s=0.6)
    [stopped] = await kept.stopped.wait(1)
    assert stopped == ("a", Cause.LEASE_LOST)
    assert attempt.lease is not None
    assert kept.clock.boottime_ns() >= attempt.lease.deadline_boottime_ns
    assert kept.renewals >= 2
    assert kept.keeper.current(attempt.attempt_id) is None


async def test_a_lease_ends_without_an_accepted_start_too(kept: Keeping) -> None:
    """What waits too long for its start does not outlive its lease."""
    await kept.hold(ttl_s=0.2, accepted=False)
    assert await kept.stopped.wait(1) == [("a", Cause.LEASE_LOST)]
    assert kept.renewals == 0


@pytest.mark.parametrize(
    "fault",
    [DropBefore(), Respond(500), Respond(401), hiccup(404), hiccup(409), hiccup(410, in_body=True), Respond(404)],
)
async def test_f51_a_failed_renewal_is_repeated_soon(kept: Keeping, fault: Any) -> None:
    """F51: an outage, a hiccup, a bad token: tried again long before the lease ends, and nothing is stopped."""
    kept.contact.plane.faults.order("renew", fault)
    await kept.hold(ttl_s=3.0, renew_interval_s=0.05)
    await kept.extended.wait(2)
    assert not kept.stopped.calls
    assert kept.renewals >= 3


async def test_f18_retry_after_puts_a_renewal_off(kept: Keeping) -> None:
    """F18: a plane that asks for time gets it; the deadline decides meanwhile."""
    kept.contact.plane.faults.order("renew", Respond(429, b"", {"Retry-After": "60"}))
    await kept.hold(renew_interval_s=0.02)
    await kept.renewed(1)
    await kept.stays_at(1)


async def test_f18_contact_that_is_back_does_not_break_a_retry_after(kept: Keeping) -> None:
    """F18: what makes a renewal due at once waits for the time that the plane has asked for, and then it comes."""
    kept.contact.plane.faults.order("renew", Respond(503, b"", {"Retry-After": "60"}))
    await kept.hold(renew_interval_s=0.02)
    await kept.renewed(1)
    await asyncio.sleep(0)
    kept.keeper.renew_all_now()
    await kept.stays_at(1)
    kept.clock.move(61)
    kept.keeper.renew_all_now()
    await kept.extended.wait()


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (Code.ATTEMPT_MISMATCH, Cause.SUPERSEDED),
        (Code.TASK_FINISHED, Cause.SUPERSEDED),
        (Code.TASK_NOT_FOUND, Cause.SUPERSEDED),
        (Code.LEASE_EXPIRED, Cause.LEASE_LOST),
    ],
)
@pytest.mark.parametrize("continues", [False, True])
async def test_f14_f15_a_business_refusal_acts_at_once(
    tmp_path: Path, code: Code, cause: Cause, *, continues: bool
) -> None:
    """F12, F14, F15: 30001-30004 stop the attempt, whatever is said about outages; it is not asked for again."""
    async with keeping(tmp_path, continues=continues) as kept:
        kept.contact.plane.faults.order_always("renew", refusal(code))
        kept.with_process.add(AttemptId("a"))
        attempt = await kept.hold(renew_interval_s=0.02)
        assert await kept.stopped.wait(1) == [("a", cause)]
        await kept.stays_at(1, 0.1)
        assert kept.keeper.current(attempt.attempt_id) is None


async def test_f12_continue_outlives_the_lease_with_a_process_only(tmp_path: Path) -> None:
    """F12: a run goes on and is renewed when contact is back; what only waits ends with its lease."""
    async with keeping(tmp_path, continues=True) as kept:
        kept.contact.plane.faults.order_always("renew", Respond(500))
        kept.with_process.add(AttemptId("a"))
        attempt = await kept.hold(ttl_s=0.3)
        lease = kept.keeper.current(attempt.attempt_id)
        assert lease is not None
        await until_so(lambda: kept.clock.boottime_ns() > lease.deadline_boottime_ns + S // 10)
        await kept.renewed(kept.renewals + 1)
        assert not kept.stopped.calls
        kept.contact.plane.faults.order_always("renew", renewed())
        await kept.extended.wait(1)
        kept.with_process.clear()
        kept.contact.plane.faults.order_always("renew", Respond(500))
        assert await kept.stopped.wait(1) == [("a", Cause.LEASE_LOST)]


async def test_a_renewal_counts_from_its_sending(tmp_path: Path) -> None:
    """A deployed plane names no expiry: `extend_sec` from before the request, however long the answer took."""
    async with keeping(tmp_path, compat=True) as kept:
        client = kept.contact.client
        [task_id] = await kept.contact.operator.submit()
        await kept.contact.register()
        named = (await kept.contact.claim_one()).attempt_id
        start = StartReport(agent_id=AGENT, attempt_id=named, process_id=42, run_no=1)
        assert (await client.report("start", TaskId(task_id), start.body())).verdict is Verdict.OK
        await add_attempt(kept.store, kept.clock, task_id, attempt_id=named, ttl_s=300.0)
        hold = Hold()
        kept.contact.plane.faults.order("renew", hold)
        kept.keeper.hold(await kept.attempt(named))
        await asyncio.sleep(0)
        kept.keeper.start_accepted(named)
        await asyncio.sleep(0)
        sent_ns = kept.clock.boottime_ns()
        kept.keeper.renew_all_now()
        await gather(hold.reached.wait())
        kept.clock.move(50)
        hold.release.set()
        [(_, lease)] = (await kept.extended.wait(1))[:1]
        assert lease.deadline_boottime_ns - sent_ns == pytest.approx(299 * S, abs=2 * S)


async def test_the_expiry_of_an_answer_is_read_against_its_own_date(kept: Keeping) -> None:
    """Wall clocks are never compared across machines: both times are the plane's, whose clock is years off here."""
    date = "Fri, 05 Feb 2038 12:00:00 GMT"
    fault = renewed(lease_expires_at="2038-02-05T12:01:40Z")
    kept.contact.plane.faults.order_always("renew", Respond(200, fault.body, {**JSON, "Date": date}))
    await kept.hold(ttl_s=300.0)
    before_ns = kept.clock.boottime_ns()
    kept.keeper.renew_all_now()
    [(_, lease)] = (await kept.extended.wait(1))[:1]
    assert lease.deadline_boottime_ns - before_ns == pytest.approx(98 * S, abs=2 * S)
    assert lease.ttl_s == pytest.approx(99, abs=2)


async def test_a_renewal_into_the_past_is_none(kept: Keeping) -> None:
    """An expiry before the answer's own date moves nothing, and the renewal is tried again."""
    date = "Fri, 05 Feb 2038 12:00:00 GMT"
    fault = renewed(lease_expires_at=format_time(0.0))
    kept.contact.plane.faults.order("renew", Respond(200, fault.body, {**JSON, "Date": date}))
    await kept.hold(ttl_s=30.0, renew_interval_s=0.05)
    await kept.extended.wait(1)
    assert kept.renewals >= 2
    assert not kept.stopped.calls


async def test_a_cancellation_comes_with_a_renewal(kept: Keeping) -> None:
    """The lease is moved all the same, so that the task has its grace period."""
    kept.contact.plane.faults.order_always("renew", renewed(cancel_requested=True))
    await kept.hold(renew_interval_s=0.02)
    assert (await kept.stopped.wait(1))[0] == ("a", Cause.CANCELLED)
    assert kept.extended.calls


async def test_an_adopted_lease_with_little_left_is_renewed_in_time(kept: Keeping) -> None:
    """Of a lease of 300 s that an earlier agent held, 0.6 s are left: a third of that, not of the whole."""
    attempt_id = await add_attempt(kept.store, kept.clock, "t", attempt_id="a", ttl_s=300.0)
    attempt = await kept.attempt(attempt_id)
    assert attempt.lease is not None
    left = Lease(
        ttl_s=300.0, deadline_boottime_ns=kept.clock.boottime_ns() + round(0.6 * S), boot_id=attempt.lease.boot_id
    )
    kept.keeper.hold(dataclasses.replace(attempt, lease=left))
    kept.keeper.start_accepted(attempt_id)
    await kept.extended.wait(1)
    assert not kept.stopped.calls
    await kept.stays_at(1, 0.1)


async def test_holding_twice_and_releasing(kept: Keeping) -> None:
    """One renewal at a time however often it is held; after the release none, and no end either."""
    attempt = await kept.hold(ttl_s=1.0)
    kept.keeper.hold(attempt)
    assert kept.keeper.current(attempt.attempt_id) == attempt.lease
    kept.keeper.release(attempt.attempt_id)
    kept.keeper.release(attempt.attempt_id)
    kept.keeper.start_accepted(attempt.attempt_id)
    assert kept.keeper.current(attempt.attempt_id) is None
    await kept.stays_at(0, 0.5)
    assert not kept.stopped.calls


async def test_a_local_task_has_no_lease(kept: Keeping) -> None:
    """Nothing is held, nothing is renewed."""
    attempt_id = await add_attempt(kept.store, kept.clock, "t", attempt_id="a")
    kept.keeper.hold(await kept.attempt(attempt_id))
    assert kept.keeper.current(attempt_id) is None


async def test_a_release_during_a_renewal_is_not_undone_by_its_answer(kept: Keeping) -> None:
    """The attempt ended while the plane took its time: its answer, whatever it is, acts on nothing."""
    hold = Hold()
    kept.contact.plane.faults.order("renew", hold)
    attempt = await kept.hold(renew_interval_s=0.02)
    await gather(hold.reached.wait())
    kept.keeper.release(attempt.attempt_id)
    hold.release.set()
    await asyncio.sleep(0.05)
    assert not kept.extended.calls
    assert not kept.stopped.calls


async def test_f24_a_full_disk_does_not_end_the_renewals(kept: Keeping) -> None:
    """F24: the deadline of the run moves on, renewal after renewal; it is stored again once there is room."""
    attempt = await kept.hold(ttl_s=30.0, renew_interval_s=0.05)
    await kept.extended.wait(1)
    await kept.opened.refuse_writes()
    await kept.extended.wait(len(kept.extended.calls) + 3)
    await kept.opened.take_writes()
    count = len(kept.extended.calls)
    await kept.extended.wait(count + 2)
    stored = (await kept.attempt(attempt.attempt_id)).lease
    assert stored is not None
    assert stored.deadline_boottime_ns >= kept.extended.calls[count][1].deadline_boottime_ns


async def test_f24_the_end_of_a_lease_is_not_forgotten_on_a_full_disk(tmp_path: Path) -> None:
    """F24: a stop that cannot be stored is asked for again."""
    async with keeping(tmp_path) as kept:
        kept.stopped.refusals.append(StoreUnavailable("the disk is full"))
        await kept.hold(ttl_s=0.1, accepted=False)
        assert await kept.stopped.wait(1) == [("a", Cause.LEASE_LOST)]
