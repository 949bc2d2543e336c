"""Six bugs, planted into the agent one at a time, to prove that the simulator finds such ones: see test_plants.py.

A bug sits in what is nobody else's business.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Final
from unittest import mock

from remotegpu_agent.bookkeeping import Books, Ended, Judge
from remotegpu_agent.control_plane import ControlPlane, Reply
from remotegpu_agent.executor import Executor
from remotegpu_agent.leases import LeaseKeeper
from remotegpu_queue import leasing, rows
from remotegpu_queue.queries import SQL
from remotegpu_queue.rows import Attempt
from remotegpu_queue.store import LostRace
from remotegpu_schemas.attempt import AttemptId, RunNo, RunRecord
from remotegpu_schemas.states import CAUSE_RULES
from remotegpu_schemas.wire import ClaimRequest, RenewRequest


def no_fencing() -> AbstractContextManager[object]:
    """The shim gets no deadline."""
    return mock.patch.object(Executor, "_fence_ns", return_value=None)


def late_deadline_base() -> AbstractContextManager[object]:
    """A lease counts from when the answer has come."""
    original = ControlPlane._call

    async def call(self: ControlPlane, *args: Any, **options: Any) -> Reply:
        reply = await original(self, *args, **options)
        return replace(reply, sent_boottime_ns=self._clock.boottime_ns())

    return mock.patch.object(ControlPlane, "_call", call)


@contextlib.contextmanager
def update_without_attempt_id() -> Generator[None]:
    """Ends are stored for whatever attempt is in the expected state."""
    loose = dict(SQL)
    for name in ("end_attempt", "run_ended"):
        loose[name] = loose[name].replace("attempt_id = :attempt_id AND ", "")

    def change(db: Any, query: str, values: Mapping[str, Any]) -> None:
        if db.execute(loose[query], values).rowcount < 1:
            raise LostRace(query)

    with (
        mock.patch.object(rows, "SQL", MappingProxyType(loose)),
        mock.patch("remotegpu_queue.units.change", change),
    ):
        yield


def report_before_store() -> AbstractContextManager[object]:
    """The result is told, then written down."""
    original = Books.ended

    async def ended(
        self: Books, attempt: Attempt, run_no: RunNo, record: RunRecord | None, judge: Judge, **options: Any
    ) -> Ended | None:
        outcome, plane = judge(options["asked"]()), self.leases.plane
        outputs = self._reports.read_outputs(attempt, run_no, record)
        body = self._reports.complete(attempt, run_no, outcome, outputs, self._clock.wall_ms())
        if body is not None and plane is not None and CAUSE_RULES[outcome.cause].is_reported:
            await plane.report("complete", attempt.task_id, body)
        return await original(self, attempt, run_no, record, judge, **options)

    return mock.patch.object(Books, "ended", ended)


def claim_without_request_id() -> AbstractContextManager[object]:
    """A repeated claim is a new one to the plane."""
    original, numbers = ControlPlane.claim, itertools.count()

    async def claim(self: ControlPlane, request: ClaimRequest) -> Reply:
        return await original(self, request.model_copy(update={"request_id": f"{request.request_id}-{next(numbers)}"}))

    return mock.patch.object(ControlPlane, "claim", claim)


def renew_failure_ignored() -> AbstractContextManager[object]:
    """A renewal that was not accepted counts as one that was."""

    async def renew(self: LeaseKeeper, attempt_id: AttemptId, held: Any) -> Reply | None:
        if self.plane is None:
            return None
        extend_s = math.ceil(held.term_s)
        request = RenewRequest(agent_id=self._settings.agent_id, attempt_id=attempt_id, extend_sec=extend_s)
        reply = await self.plane.renew(held.task_id, request, timeout_s=max(1.0, held.lease.ttl_s / 4))
        margin_s, boot_id = self._settings.margin_s, self._settings.boot_id
        held.lease = leasing.lease(extend_s, reply.sent_boottime_ns, margin_s, boot_id)
        with contextlib.suppress(OSError):
            self._extend(attempt_id, held.lease)
        return None

    return mock.patch.object(LeaseKeeper, "_renew", renew)


PLANTS: Final[dict[str, Callable[[], AbstractContextManager[object]]]] = {
    "no-fencing": no_fencing,
    "late-deadline-base": late_deadline_base,
    "update-without-attempt-id": update_without_attempt_id,
    "report-before-store": report_before_store,
    "claim-without-request-id": claim_without_request_id,
    "renew-failure-ignored": renew_failure_ignored,
}
