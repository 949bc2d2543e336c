"""What the plane does, behind both APIs: runs the store's units and wakes who waits for what they changed.

Raises `Refused` with the code; knows no HTTP and no dialect.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self, TypeVar, assert_never

from sqlalchemy import Connection

from control_plane.audit import Audit
from control_plane.auth import Gate, digest_of, new_token
from control_plane.bell import Bell, wait
from control_plane.groups import Groups
from control_plane.leases import Leases
from control_plane.reaper import Reaper
from control_plane.requests import usable_labels
from control_plane.settings import LEASE_MAX_S, REAP_LOOK_AGAIN_S, CannotServe, Settings
from control_plane.store import attempts, audit, claims, distribution, labels, machines, tasks
from control_plane.store.attempts import Ended, Renewed, Started
from control_plane.store.audit import IN_PROCESS, Actor
from control_plane.store.claims import ClaimedTask, ClaimOrder, Granted, Reaped
from control_plane.store.database import Database, Notice
from control_plane.store.distribution import ANYWHERE, Destination
from control_plane.store.fencing import Call
from control_plane.store.opening import open_database
from control_plane.store.outcomes import Refusal
from control_plane.store.tables import Status
from control_plane.submissions import check_all
from control_plane.templates import Templates
from control_plane.tokens import Tokens
from control_plane.upload_files import UploadDirectory, open_directory
from control_plane.uploads import Uploads
from control_plane.work import Work
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.wire import JsonObject

T = TypeVar("T")


class Service:
    """An open plane. Made by `open`; every method may be called concurrently."""

    def __init__(
        self, settings: Settings, database: Database, new_id: Callable[[], str], files: UploadDirectory | None = None
    ) -> None:
        self._settings = settings
        self._database = database
        self._new_id = new_id
        self._claimable = Bell(lambda: database.announce(Notice.CLAIMABLE))
        self._ended = Bell(lambda: database.announce(Notice.ENDED))
        self._is_stopping = False
        self._leases = Leases(settings, database, new_id())
        self.reaper = Reaper(self._reap, self._leases.reapable_ms, REAP_LOOK_AGAIN_S if database.is_shared else None)
        self.work = Work(database, settings, new_id)
        self.audit = Audit(self.work)
        self.tokens = Tokens(self.work, self._forget_tokens)
        self.gate = Gate(settings.admin_token, self.tokens.caller_of, lambda: settings.now_ms)
        self.groups = Groups(self.work, self._claimable.ring, self._ended.ring)
        self.templates = Templates(self.work)
        self.uploads = None if files is None else Uploads(self.work, files)

    @classmethod
    async def open(cls, settings: Settings, new_id: Callable[[], str]) -> Self:
        """Open the database, give every lease its grace, and start the reaper. Raises CannotServe."""
        database = await open_database(settings.database)
        try:
            settings = replace(settings, now=settings.now or database.clock)
            now_s = settings.now_ms / 1000
            files = None if settings.uploads_dir is None else open_directory(settings.uploads_dir, now_s)
            service = cls(settings, database, new_id, files)
            await service._leases.begin()
        except Refused as error:
            await database.close()
            raise CannotServe(str(error)) from error
        except BaseException:
            await database.close()
            raise
        database.listen(service._hear)
        service.reaper.start()
        return service

    def stop_waiting(self) -> None:
        """End the long polls: nobody is held from now on."""
        self._is_stopping = True
        self._claimable.wake()
        self._ended.wake()

    async def close(self) -> None:
        """Stop the reaper and close the database."""
        await self.reaper.stop()
        await self._leases.end()
        await self._database.close()

    @property
    def now_ms(self) -> int:
        """The time on the plane's clock, in milliseconds."""
        return self._settings.now_ms

    # --- for operators ---------------------------------------------------------------------------------------------

    async def enrol(self, machine_id: str, name: str = "", by: Actor = IN_PROCESS) -> str:
        """Give a machine its token; a second time replaces it. Tokens that were issued besides stay good."""
        now_ms, token = self._settings.now_ms, new_token()

        def unit(db: Connection) -> None:
            machines.enrol(db, machine_id, name, digest_of(token), now_ms)
            audit.record(db, now_ms, by, "machine.enrol", machine_id)

        await self._database.run(unit)
        self._forget_tokens()
        return token

    async def machines(self) -> list[dict[str, Any]]:
        """Every machine, with its agents and labels."""

        def unit(db: Connection) -> list[dict[str, Any]]:
            known = labels.of_machines(db)
            return [
                machine | {"labels": known.get(machine["machine_id"], {})} for machine in machines.list_machines(db)
            ]

        return await self._database.run(unit)

    async def submit(
        self, items: Sequence[object], by: Actor = IN_PROCESS, to: Destination = ANYWHERE, origin: str = ""
    ) -> list[str]:
        """Add tasks in the claimed-task form, all or none, and wake who waits for some. Gives their ids.

        `origin` is for the audit log: what the tasks were made of.
        """
        new = check_all(items, self._new_id)
        now_ms = self._settings.now_ms

        def unit(db: Connection) -> list[str] | Refusal:
            placed = distribution.place(db, new, to, now_ms)
            if isinstance(placed, Refusal):
                return placed
            refusal = tasks.add(db, placed, now_ms)
            if refusal is not None:
                return refusal
            audit.record(
                db, now_ms, by, "task.submit", placed[0].id, f"{len(placed)} tasks, {to.mode} {origin}".strip()
            )
            return [task.id for task in placed]

        task_ids = await self._ask(unit)
        self._claimable.ring()
        return task_ids

    async def cancel(self, task_id: str, by: Actor = IN_PROCESS) -> Status:
        """Cancel a task, or ask its agent to; the status is what it has now."""
        now_ms = self._settings.now_ms

        def unit(db: Connection) -> Status | Refusal:
            status = tasks.cancel(db, task_id, now_ms)
            if not isinstance(status, Refusal):
                audit.record(db, now_ms, by, "task.cancel", task_id)
            return status

        status = await self._ask(unit)
        if status.is_final:
            self._ended.ring()
            await self.groups.task_changed(task_id)
        return status

    async def task(self, task_id: str) -> dict[str, Any]:
        """One task with its attempts and events, as stored."""
        task = await self._database.run(lambda db: tasks.get(db, task_id))
        if task is None:
            raise Refused(Code.TASK_NOT_FOUND, f"there is no task {task_id}")
        return task

    async def tasks(self, status: Status | None, limit: int, offset: int) -> tuple[int, list[dict[str, Any]]]:
        """How many tasks there are, and a page of them."""
        return await self._database.run(lambda db: tasks.list_tasks(db, status, limit, offset))

    async def stats(self) -> dict[str, int]:
        """How many tasks there are in each status."""
        return await self._database.run(tasks.count)

    async def wait_ended(self, task_ids: Sequence[str], timeout_s: float) -> None:
        """Return when all of these tasks have ended. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while True:
                rung = self._ended.listen()
                left = await self._database.run(lambda db: tasks.count_open(db, task_ids))
                if not left:
                    return
                await rung.wait()

    # --- for agents ------------------------------------------------------------------------------------------------

    async def register(self, agent_id: str, machine_id: str, registration: JsonObject) -> None:
        """Keep what an agent says about its host."""
        now_ms = self._settings.now_ms
        own_labels = {} if self._settings.compat else usable_labels(registration.get("labels"))

        def unit(db: Connection) -> None:
            machines.register(db, agent_id, machine_id, registration, now_ms)
            labels.keep(db, machine_id, own_labels)

        await self._database.run(unit)
        if own_labels:
            self._claimable.ring()  # tasks may have waited for a machine like this

    async def heartbeat(self, agent_id: str, machine_id: str, body: JsonObject) -> list[tuple[str, str]] | None:
        """Keep a heartbeat; gives the (task, attempt) pairs to be cancelled, None for an agent that must register."""
        now_ms = self._settings.now_ms
        return await self._database.run(lambda db: machines.heartbeat(db, agent_id, machine_id, body, now_ms))

    async def claim(self, order: ClaimOrder, wait_s: float, is_gone: Callable[[], bool]) -> list[ClaimedTask]:
        """Tasks under new leases; if there are none, wait for some, unless the caller is gone by then."""
        deadline_s = asyncio.get_running_loop().time() + wait_s
        while True:
            rung = self._claimable.listen()
            granted = await self._database.run(self._claim_unit(order))
            found = granted.tasks
            if granted.let_go:
                self._claimable.ring()
            left_s = deadline_s - asyncio.get_running_loop().time()
            if found or left_s <= 0 or self._is_stopping:
                break
            await wait(rung, left_s)
            if is_gone():
                break
        for task in found:
            self.reaper.expect(task.lease_expires_ms)
        return found

    async def start(self, call: Call, *, process_id: int | None, gpu_uuids: list[str], run_no: int) -> Started:
        """Note that the attempt's process exists."""
        now_ms = self._settings.now_ms
        return await self._ask(
            lambda db: attempts.start(db, call, now_ms, process_id=process_id, gpu_uuids=gpu_uuids, run_no=run_no)
        )

    async def renew(self, call: Call, extend_s: int) -> Renewed | None:
        """Move the end of the lease; None where a deployed plane would renew nothing."""
        now_ms = self._settings.now_ms
        extend_ms = min(extend_s, LEASE_MAX_S) * 1000
        needs_start = self._settings.compat
        return await self._ask(
            lambda db: attempts.renew(db, call, now_ms, extend_ms=extend_ms, needs_start=needs_start)
        )

    async def progress(self, call: Call, percent: float, message: str) -> None:
        """Keep the latest progress."""
        now_ms = self._settings.now_ms
        await self._ask(lambda db: attempts.progress(db, call, now_ms, percent=percent, message=message))

    async def complete(self, call: Call, status: Status, result: JsonObject) -> Ended:
        """End the task with this result, once."""
        now_ms = self._settings.now_ms
        ended = await self._ask(
            lambda db: attempts.complete(
                db,
                call,
                now_ms,
                status=status,
                result=result,
                accepts_late=self._settings.accepts_late_results,
                attempts_max=self._settings.attempts_max,
            )
        )
        await self._tell(call.task_id, ended)
        return ended

    async def release(self, call: Call, reason: str) -> Ended:
        """Take back a task that was not started."""
        now_ms = self._settings.now_ms
        ended = await self._ask(lambda db: attempts.release(db, call, now_ms, reason=reason))
        await self._tell(call.task_id, ended)
        return ended

    def _claim_unit(self, order: ClaimOrder) -> Callable[[Connection], Granted]:
        settings = self._settings
        return lambda db: claims.claim(db, order, settings.now_ms, settings.lease_ttl_ms, self._new_id)

    # --- inside ----------------------------------------------------------------------------------------------------

    async def _ask(self, unit: Callable[[Connection], T | Refusal]) -> T:
        return await self.work.ask(unit)

    async def _tell(self, task_id: str, ended: Ended) -> None:
        if ended.is_new:
            (self._ended if ended.status.is_final else self._claimable).ring()
        await self.groups.task_changed(task_id)

    def _forget_tokens(self) -> None:
        self.gate.forget()
        self._database.announce(Notice.TOKENS)

    def _hear(self, notice: Notice) -> None:
        """Another plane has done something, or may have."""
        match notice:
            case Notice.CLAIMABLE:
                self._claimable.wake()
            case Notice.ENDED:
                self._ended.wake()
            case Notice.TOKENS:
                self.gate.forget()
            case _:
                assert_never(notice)

    async def _reap(self) -> Reaped:
        reaped = await self._leases.reap()
        if reaped.requeued:
            self._claimable.ring()
        if reaped.ended:
            self._ended.ring()
        await self.groups.settle_all()
        return reaped
