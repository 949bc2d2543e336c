"""Claims tasks: asks only for what can start now, by long poll where the plane holds the request, else at intervals."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from remotegpu_agent.clock import Clock
from remotegpu_agent.control_plane import ControlPlane, Reply
from remotegpu_agent.dispatch import Dispatcher
from remotegpu_agent.reports import Reports
from remotegpu_queue import backoff, leasing, outbox, units, views
from remotegpu_queue.scheduling import never_fits
from remotegpu_queue.store import Store, StoreUnavailable
from remotegpu_queue.units import ClaimResult, NewAttempt
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.task import TaskId
from remotegpu_schemas.wire import (
    Claim,
    ClaimRequest,
    RefusedClaim,
    UnusableClaim,
    Verdict,
    parse_claims,
)

log = structlog.get_logger(__name__)

_STORE_RETRY_S: Final = 1.0
_HELD_SHARE: Final = 0.5
"""An empty answer that took less than this share of `wait_sec` was not held by the plane."""


@dataclass(frozen=True)
class ClaimSettings:
    """Names and cadence; durations in seconds. `long_poll_s` 0 switches long polls off."""

    agent_id: str
    machine_id: str
    boot_id: str
    poll_interval_s: float
    long_poll_s: float
    default_ttl_s: float
    margin_s: float


class Claimer:
    """One loop that claims. `on_claimed` learns of each stored answer; wake it with `changed`.

    `blocked` are the reasons to claim nothing, `bound` is how many tasks may be taken on at most (None: as fit).
    """

    def __init__(
        self,
        store: Store,
        plane: ControlPlane,
        dispatcher: Dispatcher,
        reports: Reports,
        clock: Clock,
        settings: ClaimSettings,
        *,
        random: Callable[[], float],
        new_id: Callable[[], str],
        blocked: Callable[[], list[str]],
        bound: Callable[[], int | None],
        can_release: Callable[[], bool],
        on_claimed: Callable[[Sequence[ClaimResult]], Awaitable[None]],
    ) -> None:
        self._store = store
        self._plane = plane
        self._dispatcher = dispatcher
        self._reports = reports
        self._clock = clock
        self._settings = settings
        self._random = random
        self._new_id = new_id
        self._blocked = blocked
        self._bound = bound
        self._can_release = can_release
        self._on_claimed = on_claimed
        self._changed = asyncio.Event()
        self._failures = 0
        self._misfit_answers = 0
        self._last_ttl_s = settings.default_ttl_s

    def changed(self) -> None:
        """Capacity became free, or a reason not to claim went away."""
        self._changed.set()

    async def run(self) -> None:
        """Claim for ever."""
        while True:
            self._changed.clear()
            room = self._room()
            if room <= 0:
                await self._changed.wait()
                continue
            pause_s = await self._claim(room)
            if pause_s > 0:
                await asyncio.sleep(pause_s)

    def _room(self) -> int:
        """How many tasks could start now."""
        if self._blocked() or self._dispatcher.has_blocked:
            return 0
        bound = self._bound()
        free = min(self._dispatcher.free().slots, limits.CLAIM_MAX_TASKS)
        return free if bound is None else min(free, bound)

    async def _claim(self, room: int) -> float:
        """One claim, repeated with the same request id until it is answered. Returns how long to pause (s)."""
        request = self._request(room)
        first_sent_ns: int | None = None
        may_have_been_obeyed = False
        while True:
            asked_ns = self._clock.boottime_ns()
            reply = await self._plane.claim(request)
            first_sent_ns = reply.sent_boottime_ns if first_sent_ns is None else first_sent_ns
            if reply.verdict is Verdict.OK:
                self._failures = 0
                took_s = (self._clock.boottime_ns() - asked_ns) / 1e9
                return await self._take(reply, first_sent_ns, took_s, float(request.wait_sec or 0))
            self._failures += 1
            log.warning("a claim was not answered", error=reply.answer.message, failures=self._failures)
            await self._plane.pause(self._retry_after_s(reply), reply.answer)
            # What was given to it is to be had by the same request only, and else lapses.
            may_have_been_obeyed |= reply.verdict in {Verdict.RETRY, Verdict.AMBIGUOUS}
            if reply.verdict is Verdict.INVALID or not may_have_been_obeyed:
                return 0.0  # it was refused: the next claim is a new one

    def _request(self, room: int) -> ClaimRequest:
        free = self._dispatcher.free()
        # A lease counts from before the request was sent: what waits long for a short one gets it over.
        wait_s = round(min(self._settings.long_poll_s, self._last_ttl_s / 3))
        return ClaimRequest(
            agent_id=self._settings.agent_id,
            machine_id=self._settings.machine_id,
            limit=room,
            request_id=self._new_id(),
            wait_sec=wait_s or None,
            capacity={
                "slots": free.slots,
                "cpus": free.cpus,
                "memory_mb": free.memory_mb,
                "gpus": [],
                "blocked": self._blocked(),
            },
        )

    def _retry_after_s(self, reply: Reply) -> float:
        is_slow = reply.verdict is Verdict.UNAUTHORIZED
        pause_s = backoff.full_jitter(
            self._failures - 1,
            base_s=5.0 if is_slow else 0.5,
            cap_s=300.0 if is_slow else 30.0,
            fraction=self._random(),
        )
        return max(pause_s, reply.answer.retry_after_s or 0.0)

    async def _take(self, reply: Reply, first_sent_ns: int, took_s: float, waited_s: float) -> float:
        items = parse_claims(reply.answer.data)
        claims = [item for item in items if isinstance(item, Claim)]
        for item in items:
            if isinstance(item, UnusableClaim):
                log.error("a claimed task cannot be used", reason=item.reason)
        refused = [item for item in items if isinstance(item, RefusedClaim)]
        if claims or refused:
            claims = [claim for claim in claims if self._is_for_me(claim)]
            misfits = {claim.attempt_id: reason for claim in claims if (reason := self._misfit(claim)) is not None}
            results = await self._store_claims(claims, refused, misfits, reply, first_sent_ns)
            await self._on_claimed(results)
            if any(result.is_new and result.attempt_id not in misfits for result in results):
                self._misfit_answers = 0
                return 0.0
            return self._pause_after_nothing(bool(misfits))
        was_held = waited_s > 0 and took_s >= waited_s * _HELD_SHARE
        return 0.0 if was_held else self._settings.poll_interval_s

    def _misfit(self, claim: Claim) -> str | None:
        return never_fits(claim.task.resources, self._dispatcher.capacity)

    def _pause_after_nothing(self, has_misfits: bool) -> float:
        """A plane that hands out what this host can never run is asked less and less, or it would give all it has."""
        if not has_misfits:
            return self._settings.poll_interval_s
        self._misfit_answers += 1
        return max(
            self._settings.poll_interval_s,
            backoff.full_jitter(
                self._misfit_answers, base_s=self._settings.poll_interval_s, cap_s=300.0, fraction=self._random()
            ),
        )

    async def _store_claims(
        self,
        claims: Sequence[Claim],
        refused: Sequence[RefusedClaim],
        misfits: Mapping[AttemptId, str],
        reply: Reply,
        first_sent_ns: int,
    ) -> list[ClaimResult]:
        """Store what was claimed, and reports on what is given back or refused; one commit."""
        attempts = [self._attempt(claim, reply, first_sent_ns) for claim in claims]
        can_release = self._can_release()

        def unit(db: sqlite3.Connection) -> list[ClaimResult]:
            for item in refused:
                self._refuse(db, item)
            kept = []
            for new in attempts:
                task_id = new.task.task_id
                if views.is_local_task(db, task_id):
                    reason = f"a task of this host's own has the id {task_id}"
                    self._refuse(db, RefusedClaim(task_id, new.attempt_id, reason))
                elif new.attempt_id in misfits and can_release:
                    self._give_back(db, task_id, new.attempt_id, misfits[new.attempt_id])
                else:
                    kept.append(new)
            return units.add_claims(db, kept, self._clock.wall_ms())

        while True:
            try:
                results = await self._store.write(unit)
            except StoreUnavailable as error:
                # The plane has given them to this agent: they are stored late, or their leases end first.
                log.error("claimed tasks cannot be stored yet", tasks=len(attempts), error=str(error))
                await asyncio.sleep(_STORE_RETRY_S)
            else:
                for result in results:
                    if result.is_conflict:
                        log.error(
                            "a claimed attempt has the id of another task's and is left alone",
                            attempt_id=result.attempt_id,
                            task_ids=[new.task.id for new in attempts if new.attempt_id == result.attempt_id],
                        )
                return results

    def _refuse(self, db: sqlite3.Connection, claim: RefusedClaim) -> None:
        log.error("a claimed task is refused", task_id=claim.task_id, reason=claim.reason)
        now_ms = self._clock.wall_ms()
        body = self._reports.refused(claim, now_ms)
        outbox.add_report(db, claim.attempt_id, "complete", body, now_ms, self._settings.boot_id, claim.task_id)

    def _give_back(self, db: sqlite3.Connection, task_id: TaskId, attempt_id: AttemptId, reason: str) -> None:
        log.warning("a claimed task is given back", task_id=task_id, reason=reason)
        now_ms = self._clock.wall_ms()
        body = self._reports.release(attempt_id, reason)
        outbox.add_report(db, attempt_id, "release", body, now_ms, self._settings.boot_id, task_id)

    def _is_for_me(self, claim: Claim) -> bool:
        if claim.machine_id in {None, self._settings.machine_id}:
            return True
        log.error("a claimed task is for another machine", task_id=claim.task.id, machine_id=claim.machine_id)
        return False

    def _attempt(self, claim: Claim, reply: Reply, first_sent_ns: int) -> NewAttempt:
        terms = leasing.Terms(claim.lease_ttl_s, claim.lease_expires_at, claim.assigned_at, reply.answer.date)
        lease = leasing.claimed(
            terms,
            first_sent_ns=first_sent_ns,
            last_sent_ns=reply.sent_boottime_ns,
            default_ttl_s=self._settings.default_ttl_s,
            configured_margin_s=self._settings.margin_s,
            boot_id=self._settings.boot_id,
        )
        if lease.ttl_s > leasing.JUST_ENDED_S:
            self._last_ttl_s = lease.ttl_s
        return NewAttempt(
            task=claim.task,
            attempt_id=AttemptId(claim.attempt_id),
            origin="control_plane",
            boot_id=self._settings.boot_id,
            lease=lease,
            renew_interval_s=claim.renew_interval_s,
            retries_used=claim.retries_used,
        )
