"""Keeps the leases of open attempts: renews them in time, and ends what must not go on.

The shim fences by itself; this module only moves its deadline. Decisions about time are in `remotegpu_queue.leasing`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from remotegpu_agent.clock import Clock
from remotegpu_agent.control_plane import ControlPlane, Reply
from remotegpu_agent.supervise import Loops
from remotegpu_queue import leasing, units
from remotegpu_queue.rows import Attempt
from remotegpu_queue.store import Store, StoreUnavailable
from remotegpu_schemas.attempt import AttemptId, Lease
from remotegpu_schemas.states import Cause
from remotegpu_schemas.task import TaskId
from remotegpu_schemas.wire import RenewRequest, Verdict, parse_renewal

log = structlog.get_logger(__name__)

_STORE_RETRY_S: Final = 1.0


@dataclass(frozen=True)
class LeaseSettings:
    """Defaults of the host, in seconds."""

    agent_id: str
    boot_id: str
    ttl_s: float
    renew_interval_s: float
    margin_s: float
    continues_when_unreachable: bool = False
    """A run whose lease could not be renewed goes on until the control plane itself ends it (gives up promise 2)."""


@dataclass
class _Held:
    task_id: TaskId
    lease: Lease
    term_s: float
    """What each renewal asks for: the first term, however much less a plane gives."""
    renew_interval_s: float
    is_start_accepted: bool
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_released: bool = False


class LeaseKeeper:
    """Holds the lease of every open attempt. `extend` moves the shim's deadline, `stop` ends an attempt."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        settings: LeaseSettings,
        loops: Loops,
        random: Callable[[], float],
        *,
        extend: Callable[[AttemptId, Lease], None],
        stop: Callable[[AttemptId, Cause], Awaitable[object]],
        has_process: Callable[[AttemptId], bool],
    ) -> None:
        self._store = store
        self._clock = clock
        self._settings = settings
        self._loops = loops
        self._random = random
        self._extend = extend
        self._stop = stop
        self._has_process = has_process
        self._held: dict[AttemptId, _Held] = {}
        self.plane: ControlPlane | None = None

    def hold(self, attempt: Attempt) -> None:
        """Keep this attempt's lease until `release`. Holding twice changes nothing; without a lease likewise."""
        if attempt.lease is None or attempt.attempt_id in self._held or attempt.state.is_final:
            return
        held = _Held(
            attempt.task_id,
            attempt.lease,
            attempt.lease.ttl_s,
            attempt.renew_interval_s or self._settings.renew_interval_s,
            attempt.is_start_accepted,
        )
        self._held[attempt.attempt_id] = held
        self._loops.spawn(f"lease-{attempt.attempt_id}", lambda: self._keep_surely(attempt.attempt_id, held))

    def release(self, attempt_id: AttemptId) -> None:
        """Stop renewing: the attempt has ended."""
        held = self._held.pop(attempt_id, None)
        if held is not None:
            held.is_released = True
            held.changed.set()

    def start_accepted(self, attempt_id: AttemptId) -> None:
        """The control plane knows that the attempt runs; deployed planes renew only from now on."""
        held = self._held.get(attempt_id)
        if held is not None and not held.is_start_accepted:
            held.is_start_accepted = True
            held.changed.set()

    def renew_all_now(self) -> None:
        """After a loss of contact every lease is renewed at once."""
        for held in self._held.values():
            held.changed.set()

    def current(self, attempt_id: AttemptId) -> Lease | None:
        """The lease as last renewed."""
        held = self._held.get(attempt_id)
        return held.lease if held is not None else None

    async def _keep_surely(self, attempt_id: AttemptId, held: _Held) -> None:
        """A mistake of this program must not end a lease that could have been kept."""
        while not held.is_released:
            try:
                await self._keep(attempt_id, held)
                return
            except Exception:
                self._loops.count_failure("lease")
                log.exception("a lease could not be kept; trying again", attempt_id=attempt_id)
            await asyncio.sleep(_STORE_RETRY_S)

    async def _keep(self, attempt_id: AttemptId, held: _Held) -> None:
        failures = 0
        next_renewal_ns = self._renewal_due_ns(held)
        asked_until_ns = 0  # the plane's Retry-After: nothing that happens meanwhile makes a renewal due earlier
        while not held.is_released:
            now_ns = self._clock.boottime_ns()
            is_over = now_ns >= held.lease.deadline_boottime_ns
            if is_over and not (self._settings.continues_when_unreachable and self._has_process(attempt_id)):
                self._held.pop(attempt_id, None)
                log.warning("a lease has ended", task_id=held.task_id, attempt_id=attempt_id)
                await self._stop_surely(attempt_id, Cause.LEASE_LOST)
                return
            may_renew = held.is_start_accepted and self.plane is not None
            if not may_renew or now_ns < next_renewal_ns:
                due_ns = [] if is_over else [held.lease.deadline_boottime_ns]
                due_ns += [next_renewal_ns] if may_renew else []
                has_changed = await self._wait(held, (min(due_ns) - now_ns) / 1e9 if due_ns else None)
                if has_changed and may_renew:
                    next_renewal_ns = asked_until_ns
                continue
            reply = await self._renew(attempt_id, held)
            if reply is None:
                failures = 0
                next_renewal_ns = self._renewal_due_ns(held)
            else:
                failures += 1
                pause_s = leasing.renew_again_after_s(held.lease.ttl_s, failures, self._random())
                asked_until_ns = self._clock.boottime_ns() + round((reply.answer.retry_after_s or 0.0) * 1e9)
                next_renewal_ns = max(self._clock.boottime_ns() + round(pause_s * 1e9), asked_until_ns)

    def _renewal_due_ns(self, held: _Held) -> int:
        """By what is left of the lease: of one that was taken over from an earlier agent little may be."""
        now_ns = self._clock.boottime_ns()
        left_s = max(0.0, (held.lease.deadline_boottime_ns - now_ns) / 1e9)
        return now_ns + round(leasing.renew_after_s(left_s, held.renew_interval_s, self._random()) * 1e9)

    async def _wait(self, held: _Held, seconds: float | None) -> bool:
        """Whether something changed before the time was over."""
        try:
            async with asyncio.timeout(None if seconds is None else max(seconds, 0.0)):
                await held.changed.wait()
        except TimeoutError:
            return False
        held.changed.clear()
        return True

    async def _renew(self, attempt_id: AttemptId, held: _Held) -> Reply | None:
        """None when the lease was moved, or need not be any more; else the answer, after what it asks for was done."""
        if self.plane is None:
            return None
        extend_s = math.ceil(held.term_s)
        request = RenewRequest(agent_id=self._settings.agent_id, attempt_id=attempt_id, extend_sec=extend_s)
        timeout_s = max(1.0, held.lease.ttl_s / 4)
        reply = await self.plane.renew(held.task_id, request, timeout_s=timeout_s)
        if held.is_released:
            return None
        match reply.verdict:
            case Verdict.OK:
                return None if await self._renewed(attempt_id, held, reply, float(extend_s)) else reply
            case Verdict.SUPERSEDED | Verdict.FINISHED:
                await self._lost(attempt_id, held, Cause.SUPERSEDED, reply)
            case Verdict.LEASE_EXPIRED:
                await self._lost(attempt_id, held, Cause.LEASE_LOST, reply)
            case _:
                log.warning("a lease could not be renewed", attempt_id=attempt_id, error=reply.answer.message)
        return reply

    async def _renewed(self, attempt_id: AttemptId, held: _Held, reply: Reply, extend_s: float) -> bool:
        renewal = parse_renewal(reply.answer.data)
        ttl_s = leasing.ttl_until(renewal.lease_expires_at, reply.answer.date)
        if ttl_s is None:
            ttl_s = extend_s
        if ttl_s <= 0:
            log.warning("the control plane renewed a lease into the past", attempt_id=attempt_id)
            return False
        lease = leasing.lease(ttl_s, reply.sent_boottime_ns, self._settings.margin_s, self._settings.boot_id)
        try:
            self._extend(attempt_id, lease)
        except OSError as error:
            log.error("the deadline of a run could not be moved", attempt_id=attempt_id, error=str(error))
            return False
        held.lease = lease
        await self._store_extension(attempt_id, lease)
        if renewal.is_cancel_requested:
            try:
                await self._stop(attempt_id, Cause.CANCELLED)
            except StoreUnavailable as error:
                log.error("a cancellation cannot be stored; it comes again", attempt_id=attempt_id, error=str(error))
        return True

    async def _store_extension(self, attempt_id: AttemptId, lease: Lease) -> None:
        """Not waited for: the run's own deadline has moved, and counts after a restart too."""

        def note(done: asyncio.Future[bool]) -> None:
            if not done.cancelled() and done.exception() is not None:
                log.error("a renewed lease cannot be stored", attempt_id=attempt_id, error=str(done.exception()))

        stored = await self._store.enqueue(
            lambda db: units.extend_lease(db, attempt_id, lease.ttl_s, lease.deadline_boottime_ns)
        )
        stored.add_done_callback(note)

    async def _lost(self, attempt_id: AttemptId, held: _Held, cause: Cause, reply: Reply) -> None:
        log.warning("an attempt is no longer ours", attempt_id=attempt_id, cause=cause, answer=reply.answer.message)
        held.is_released = True
        self._held.pop(attempt_id, None)
        await self._stop_surely(attempt_id, cause)

    async def _stop_surely(self, attempt_id: AttemptId, cause: Cause) -> None:
        """Nobody asks again: what waits is ended once the store can be written."""
        while True:
            try:
                await self._stop(attempt_id, cause)
                return
            except StoreUnavailable as error:
                log.error("an attempt cannot be ended yet", attempt_id=attempt_id, cause=cause, error=str(error))
                await asyncio.sleep(_STORE_RETRY_S)
