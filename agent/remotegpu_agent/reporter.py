"""Drains the outbox: in order per attempt, several attempts at once, until the control plane has every report.

What an answer means for a report is the pure `decide`; what it means for the task's process is told to `on_refused`.
"""

from __future__ import annotations

import asyncio
import enum
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final, assert_never

import structlog

from remotegpu_agent.clock import Clock
from remotegpu_agent.control_plane import ControlPlane
from remotegpu_agent.supervise import Loops
from remotegpu_queue import backoff, outbox
from remotegpu_queue.outbox import Report
from remotegpu_queue.store import Store, StoreUnavailable
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.states import Cause
from remotegpu_schemas.wire import Answer, Verdict

log = structlog.get_logger(__name__)


class Fate(enum.StrEnum):
    """What becomes of a report after an answer."""

    DELIVERED = "delivered"
    AGAIN = "again"
    DEAD = "dead"
    DROPPED = "dropped"
    """Of no interest to anybody any more: the attempt was superseded, or the plane has no such call."""


@dataclass(frozen=True)
class Decision:
    """The report's fate, how fast to try again, and whether the attempt's process must stop."""

    fate: Fate
    base_s: float = 0.5
    cap_s: float = 60.0
    stop: Cause | None = None


_SLOW: Final = Decision(Fate.AGAIN, base_s=5.0, cap_s=300.0)
_GROWING: Final = Decision(Fate.AGAIN, base_s=1.0, cap_s=300.0)
"""A hiccup is over soon as a rule, and deployed planes renew only what has an accepted start."""
_GIVE_UP_TRIES_MIN: Final = 100
_OPTIONAL_KINDS: Final = frozenset({"progress", "release"})
_STORE_RETRY_S: Final = 1.0
_ABOUT_THE_PLANE: Final = frozenset({Verdict.RETRY, Verdict.UNAUTHORIZED})
"""What would have met every other report as well."""


def decide(kind: str, verdict: Verdict, age_s: float) -> Decision:
    """What to do with a report of this kind after this answer; `age_s` counts from its first try."""
    match verdict:
        case Verdict.OK:
            return Decision(Fate.DELIVERED)
        case Verdict.FINISHED if kind == "complete":
            return Decision(Fate.DELIVERED)
        case Verdict.SUPERSEDED | Verdict.FINISHED:
            return Decision(Fate.DROPPED, stop=Cause.SUPERSEDED)
        case Verdict.LEASE_EXPIRED:
            return Decision(Fate.DEAD if kind == "complete" else Fate.DROPPED, stop=Cause.LEASE_LOST)
        case Verdict.INVALID:
            return Decision(Fate.DEAD)
        case Verdict.RETRY:
            return Decision(Fate.AGAIN)
        case Verdict.UNAUTHORIZED:
            return _SLOW
        case Verdict.ROUTE_MISSING if kind in _OPTIONAL_KINDS:
            return Decision(Fate.DROPPED)
        case Verdict.AMBIGUOUS | Verdict.ROUTE_MISSING:
            return Decision(Fate.DEAD) if age_s > limits.REPORT_GIVE_UP_S else _GROWING
        case _:
            assert_never(verdict)


class Reporter:
    """One loop over the outbox. Wake it with `changed` after a commit that added a report."""

    def __init__(
        self,
        store: Store,
        plane: ControlPlane,
        clock: Clock,
        loops: Loops,
        random: Callable[[], float],
        *,
        on_settled: Callable[[Report, Fate], None],
        on_refused: Callable[[AttemptId, Cause], Awaitable[object]],
    ) -> None:
        self._store = store
        self._plane = plane
        self._clock = clock
        self._loops = loops
        self._random = random
        self._on_settled = on_settled
        self._on_refused = on_refused
        self._changed = asyncio.Event()
        self._in_flight: set[AttemptId] = set()
        self._settled: set[AttemptId] = set()
        """Those whose delivery has ended since the outbox was last asked: what it says of them may be older."""
        self._missing_routes: set[str] = set()
        self._asked_until_ns = 0
        """Retry-After of any report counts for all: a plane that is short of time is not asked by the next one."""
        self._hastened: set[AttemptId] = set()
        self._apart: dict[AttemptId, int] = {}
        """Those that wait for a reason of their own, and until when (CLOCK_BOOTTIME ns): never brought forward."""
        self._failures = 0

    def changed(self) -> None:
        """A report was added."""
        self._changed.set()

    def registered(self) -> None:
        """After a register every call is tried again."""
        self._missing_routes.clear()

    async def contact_is_back(self) -> None:
        """Bring forward what the outage has put off: all starts, and a few others, each of which brings forward more.

        Starts are in a hurry, since some planes renew no lease before them. A failing store costs delay only.
        """
        now_ns = self._clock.boottime_ns()
        try:
            await self._store.write(lambda db: outbox.hasten_starts(db, now_ns))
            self._hastened.update(await self._store.write(self._hasten()))
        except StoreUnavailable as error:
            log.error("reports cannot be brought forward; they go in their own time", error=str(error))
        self._changed.set()

    async def run(self) -> None:
        """Deliver for ever."""
        while True:
            self._changed.clear()
            next_due_ns = await self._send_due()
            timeout_s = None if next_due_ns is None else max(0.0, (next_due_ns - self._clock.boottime_ns()) / 1e9)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def _send_due(self) -> int | None:
        free = limits.REPORTS_IN_FLIGHT_MAX - len(self._in_flight)
        if free <= 0:
            return None
        now_ns, look = self._clock.boottime_ns(), limits.REPORTS_IN_FLIGHT_MAX
        if now_ns < self._asked_until_ns:
            return self._asked_until_ns
        self._settled.clear()
        due, next_due_ns = await self._store.read(lambda db: outbox.due_reports(db, now_ns, look))
        for report in due:
            if len(self._in_flight) >= limits.REPORTS_IN_FLIGHT_MAX:
                break
            if report.attempt_id not in self._in_flight | self._settled:
                self._in_flight.add(report.attempt_id)
                self._loops.spawn(f"report-{report.id}", partial(self._deliver, report))
        return next_due_ns

    async def _deliver(self, report: Report) -> None:
        try:
            if report.kind in self._missing_routes:
                await self._store.write(lambda db: outbox.drop_report(db, report.id))
                return
            reply = await self._plane.report(report.kind, report.task_id, report.body)
            await self._settle(report, reply.answer)
        except StoreUnavailable as error:
            # It is sent again, since nothing says that it was answered; not as fast as the plane answers.
            log.error("what became of a report cannot be stored yet", attempt_id=report.attempt_id, error=str(error))
            await self._pause_after_failure()
        except Exception:
            await self._pause_after_failure()
            raise
        else:
            self._failures = 0
        finally:
            self._in_flight.discard(report.attempt_id)
            self._settled.add(report.attempt_id)
            self._changed.set()

    async def _pause_after_failure(self) -> None:
        self._failures += 1
        pause_s = backoff.full_jitter(self._failures, base_s=_STORE_RETRY_S, cap_s=60.0, fraction=self._random())
        await asyncio.sleep(pause_s)

    async def _settle(self, report: Report, answer: Answer) -> None:
        now_ms = self._clock.wall_ms()
        age_s = max(0.0, (now_ms - (report.first_try_at_ms or now_ms)) / 1000)
        # Not by the clock on the wall alone, which may jump by a day.
        decision = decide(report.kind, answer.verdict, age_s if report.tries >= _GIVE_UP_TRIES_MIN else 0.0)
        if decision.fate is not Fate.DELIVERED:
            log.warning(
                "a report was not accepted",
                kind=report.kind,
                task_id=report.task_id,
                attempt_id=report.attempt_id,
                answer=answer.message,
                verdict=answer.verdict,
                fate=decision.fate,
                tries=report.tries + 1,
            )
        if answer.verdict is Verdict.RETRY and answer.retry_after_s is not None:
            asked_until_ns = self._clock.boottime_ns() + round(answer.retry_after_s * 1e9)
            self._asked_until_ns = max(self._asked_until_ns, asked_until_ns)
        if answer.verdict is Verdict.ROUTE_MISSING and report.kind in _OPTIONAL_KINDS:
            self._missing_routes.add(report.kind)
        if decision.stop is not None:
            await self._on_refused(report.attempt_id, decision.stop)
        await self._store_fate(report, answer, decision, now_ms)
        self._on_settled(report, decision.fate)

    async def _store_delivered(self, report: Report) -> None:
        """Where one gets through, those can that were put off: at once, but not all at once."""
        hasten = self._hasten()

        def unit(db: sqlite3.Connection) -> list[AttemptId]:
            outbox.report_delivered(db, report)
            return hasten(db)

        self._hastened.update(await self._store.write(unit))

    def _hasten(self) -> Callable[[sqlite3.Connection], list[AttemptId]]:
        """A unit that brings forward a few; it gives their attempts."""
        now_ns = self._clock.boottime_ns()
        if len(self._apart) > limits.REPORTS_APART_MAX:
            self._apart = {attempt_id: due_ns for attempt_id, due_ns in self._apart.items() if due_ns > now_ns}
        count = limits.REPORTS_HASTENED_PER_DELIVERY if len(self._apart) <= limits.REPORTS_APART_MAX else 0
        apart = list(self._apart) if count else []
        return lambda db: outbox.hasten(db, now_ns, count, apart)

    def _waits_apart(self, answer: Answer, *, was_hastened: bool) -> bool:
        """Whether the plane has put off this report, not all of them; in vain is none brought forward twice."""
        if answer.verdict not in _ABOUT_THE_PLANE or answer.retry_after_s is not None:
            return True
        return was_hastened and answer.http_status != 0

    async def _store_fate(self, report: Report, answer: Answer, decision: Decision, now_ms: int) -> None:
        was_hastened = report.attempt_id in self._hastened
        self._hastened.discard(report.attempt_id)
        self._apart.pop(report.attempt_id, None)
        match decision.fate:
            case Fate.DELIVERED:
                await self._store_delivered(report)
            case Fate.AGAIN:
                pause_s = backoff.full_jitter(
                    report.tries, base_s=decision.base_s, cap_s=decision.cap_s, fraction=self._random()
                )
                pause_s = max(pause_s, answer.retry_after_s or 0.0)
                due_ns = self._clock.boottime_ns() + round(pause_s * 1e9)
                if self._waits_apart(answer, was_hastened=was_hastened):
                    self._apart[report.attempt_id] = due_ns
                await self._store.write(lambda db: outbox.report_retry(db, report.id, due_ns, answer.message, now_ms))
            case Fate.DEAD:
                await self._store.write(lambda db: outbox.report_dead(db, report.id, answer.message))
            case Fate.DROPPED if decision.stop is Cause.SUPERSEDED:
                await self._store.write(lambda db: outbox.drop_reports(db, report.attempt_id))
            case Fate.DROPPED:
                await self._store.write(lambda db: outbox.drop_report(db, report.id))
            case _:
                assert_never(decision.fate)
