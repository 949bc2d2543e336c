"""What an agent reports about an attempt: start, renewal, progress, completion, release. All of it is fenced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, bindparam, update

from control_plane.store import claims
from control_plane.store.fencing import Call, Held, fence, look_up
from control_plane.store.outcomes import Refusal, add_event, reject
from control_plane.store.tables import AttemptState, EventKind, Status, attempts, tasks
from remotegpu_schemas.errors import Code
from remotegpu_schemas.states import Cause


@dataclass(frozen=True)
class Started:
    """An accepted start; the time is the first one's."""

    status: Status
    started_at_ms: int


@dataclass(frozen=True)
class Renewed:
    """An accepted renewal."""

    lease_expires_ms: int
    cancel_requested: bool


@dataclass(frozen=True)
class Ended:
    """An accepted completion or release; after a repeat the task as it is by now."""

    status: Status
    ended_at_ms: int | None
    is_new: bool


_START_ATTEMPT: Final = (
    update(attempts)
    .where(attempts.c.attempt_id == bindparam("b_attempt"))
    .values(
        state=AttemptState.STARTED,
        started_at_ms=bindparam("b_started"),
        process_id=bindparam("b_process"),
        gpu_uuids=bindparam("b_gpus", type_=attempts.c.gpu_uuids.type),
        run_no=bindparam("b_run"),
    )
)
_START_TASK: Final = (
    update(tasks)
    .where(
        tasks.c.id == bindparam("b_id"),
        tasks.c.attempt_id == bindparam("b_attempt"),
        tasks.c.status == Status.ASSIGNED,
    )
    .values(status=Status.RUNNING)
)
_RENEW_TASK: Final = (
    update(tasks)
    .where(tasks.c.id == bindparam("b_id"), tasks.c.attempt_id == bindparam("b_attempt"))
    .values(lease_expires_ms=bindparam("b_expires"))
)
_COUNT_RENEWAL: Final = (
    update(attempts).where(attempts.c.attempt_id == bindparam("b_attempt")).values(renewals=attempts.c.renewals + 1)
)
_PROGRESS: Final = (
    update(tasks)
    .where(tasks.c.id == bindparam("b_id"), tasks.c.attempt_id == bindparam("b_attempt"))
    .values(progress_percent=bindparam("b_percent"), progress_message=bindparam("b_message"))
)
_COMPLETE_TASK: Final = (
    update(tasks)
    .where(tasks.c.id == bindparam("b_id"), tasks.c.attempt_id == bindparam("b_attempt"))
    .values(
        status=bindparam("b_status"),
        ended_at_ms=bindparam("b_now"),
        lease_expires_ms=None,
        completions_accepted=tasks.c.completions_accepted + 1,
        error=bindparam("b_error"),
    )
)
_COMPLETE_ATTEMPT: Final = (
    update(attempts)
    .where(attempts.c.attempt_id == bindparam("b_attempt"))
    .values(
        state=AttemptState.COMPLETED,
        ended_at_ms=bindparam("b_now"),
        result=bindparam("b_result", type_=attempts.c.result.type),
    )
)
_COUNT_REPEAT: Final = (
    update(tasks).where(tasks.c.id == bindparam("b_id")).values(completions_repeated=tasks.c.completions_repeated + 1)
)
_GIVE_UP: Final = (
    update(attempts)
    .where(attempts.c.attempt_id == bindparam("b_attempt"), attempts.c.state == AttemptState.LAPSED)
    .values(state=AttemptState.GIVEN_UP)
)


def start(
    db: Connection, call: Call, now_ms: int, *, process_id: int | None, gpu_uuids: list[str], run_no: int
) -> Started | Refusal:
    """The attempt's process exists. A repeat changes nothing; a later run of the attempt replaces process and GPUs."""
    held = _present(db, call, now_ms)
    if isinstance(held, Refusal):
        return held
    started_ms = now_ms if held.started_at_ms is None else held.started_at_ms
    if held.run_no is None or run_no > held.run_no:
        names = {"b_id": call.task_id, "b_attempt": call.attempt_id}
        details = {"b_started": started_ms, "b_process": process_id, "b_gpus": gpu_uuids, "b_run": run_no}
        db.execute(_START_ATTEMPT, {"b_attempt": call.attempt_id} | details)
        db.execute(_START_TASK, names)
        add_event(db, call.task_id, now_ms, EventKind.STARTED, call.attempt_id, f"run {run_no}")
    return Started(Status.RUNNING, started_ms)


def renew(db: Connection, call: Call, now_ms: int, *, extend_ms: int, needs_start: bool) -> Renewed | Refusal | None:
    """Move the end of the lease to now + `extend_ms`, never to an earlier time.

    None where deployed planes renew nothing: with `needs_start`, before an accepted start.
    """
    held = _present(db, call, now_ms)
    if isinstance(held, Refusal):
        return held
    if needs_start and held.state is not AttemptState.STARTED:
        return None
    expires_ms = max(now_ms + extend_ms, held.lease_expires_ms or 0)
    db.execute(_RENEW_TASK, {"b_id": call.task_id, "b_attempt": call.attempt_id, "b_expires": expires_ms})
    db.execute(_COUNT_RENEWAL, {"b_attempt": call.attempt_id})
    return Renewed(expires_ms, held.cancel_requested)


def progress(db: Connection, call: Call, now_ms: int, *, percent: float, message: str) -> Refusal | None:
    """Keep the latest progress."""
    held = _present(db, call, now_ms)
    if isinstance(held, Refusal):
        return held
    names = {"b_id": call.task_id, "b_attempt": call.attempt_id}
    db.execute(_PROGRESS, names | {"b_percent": percent, "b_message": message})
    return None


def complete(
    db: Connection,
    call: Call,
    now_ms: int,
    *,
    status: Status,
    result: dict[str, Any],
    accepts_late: bool,
    attempts_max: int,
) -> Ended | Refusal:
    """End the task with this result, once. The attempt's own repeat is answered with what was stored, and counted.

    A result that came after its lease counts while the attempt is the latest one (`accepts_late`). One that says
    `lease_lost` is none: it ends the attempt, and the task can be claimed again.
    """
    held = look_up(db, call)
    if isinstance(held, Refusal):
        return _reject(db, call, held, now_ms)
    if held.state is AttemptState.COMPLETED:
        db.execute(_COUNT_REPEAT, {"b_id": call.task_id})
        add_event(db, call.task_id, now_ms, EventKind.REPEATED, call.attempt_id)
        return Ended(held.status, held.task_ended_at_ms, is_new=False)
    refusal = fence(call, held, now_ms)
    if result.get("cause") == Cause.LEASE_LOST and (refusal is None or refusal.code is Code.LEASE_EXPIRED):
        return _give_up(db, call, held, now_ms, attempts_max)
    is_late = accepts_late and refusal is not None and refusal.code is Code.LEASE_EXPIRED
    if refusal is not None and not is_late:
        return _reject(db, call, refusal, now_ms)
    names = {"b_attempt": call.attempt_id, "b_now": now_ms}
    error = result.get("error") or None
    db.execute(_COMPLETE_TASK, names | {"b_id": call.task_id, "b_status": status, "b_error": error})
    db.execute(_COMPLETE_ATTEMPT, names | {"b_result": result})
    detail = f"{status}, exit code {result['exit_code']}{', after its lease' if is_late else ''}"
    add_event(db, call.task_id, now_ms, EventKind.COMPLETED, call.attempt_id, detail)
    return Ended(status, now_ms, is_new=True)


def release(db: Connection, call: Call, now_ms: int, *, reason: str) -> Ended | Refusal:
    """Take back a claimed task that was not started. A repeat is answered with the task's present status."""
    held = look_up(db, call)
    if isinstance(held, Refusal):
        return _reject(db, call, held, now_ms)
    if held.state is AttemptState.RELEASED:
        return Ended(held.status, held.task_ended_at_ms, is_new=False)
    refusal = fence(call, held, now_ms)
    if refusal is None and held.state is AttemptState.STARTED:
        refusal = Refusal(
            Code.INVALID_PARAMETERS, f"attempt_id: attempt {call.attempt_id} has started; it can only be completed"
        )
    if refusal is not None:
        return _reject(db, call, refusal, now_ms)
    status = claims.give_back(db, call.task_id, call.attempt_id, AttemptState.RELEASED, now_ms, 0, reason)
    return Ended(status, now_ms if status.is_final else None, is_new=True)


def _present(db: Connection, call: Call, now_ms: int) -> Held | Refusal:
    """The attempt if it may speak for its task; a refusal is counted."""
    held = look_up(db, call)
    refusal = held if isinstance(held, Refusal) else fence(call, held, now_ms)
    return held if refusal is None else _reject(db, call, refusal, now_ms)


def _reject(db: Connection, call: Call, refusal: Refusal, now_ms: int) -> Refusal:
    return reject(db, call.task_id, call.name, call.attempt_id, refusal, now_ms)


def _give_up(db: Connection, call: Call, held: Held, now_ms: int, attempts_max: int) -> Ended:
    status, is_new = held.status, False
    if held.state.is_open:
        status = claims.give_back(db, call.task_id, call.attempt_id, AttemptState.GIVEN_UP, now_ms, attempts_max)
        is_new = True
    elif held.state is AttemptState.LAPSED:
        db.execute(_GIVE_UP, {"b_attempt": call.attempt_id})
        add_event(db, call.task_id, now_ms, EventKind.GIVEN_UP, call.attempt_id)
    return Ended(status, held.task_ended_at_ms, is_new)
