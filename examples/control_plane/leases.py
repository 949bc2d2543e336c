"""When leases end, and when they are held longer because nobody could renew them."""

from __future__ import annotations

import contextlib

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from control_plane.settings import REAP_LATE_MS, Settings
from control_plane.store import claims, presence
from control_plane.store.claims import Reaped
from control_plane.store.database import Database
from remotegpu_schemas.errors import Refused


class Leases:
    """The leases of one database, looked after by one plane between `begin` and `end`, or by several."""

    def __init__(self, settings: Settings, database: Database, plane_id: str) -> None:
        self._settings = settings
        self._database = database
        self._plane_id = plane_id
        # A clock that is given is one for all planes; that of a shared database is known to each of them on its own.
        self._late_ms = REAP_LATE_MS if database.is_shared and settings.now == database.clock else 0
        grace_s = settings.lease_ttl_s if settings.restart_grace_s is None else settings.restart_grace_s
        self._grace_ms = int(grace_s * 1000)

    def reapable_ms(self) -> int:
        """What ends until then has ended for every plane."""
        return self._settings.now_ms - self._late_ms

    async def begin(self) -> None:
        """Give every lease its grace if no plane was there to renew it."""
        if self._database.is_shared:
            await self._database.run(self._attend)
        else:
            await self._database.run(self._hold_longer)

    async def reap(self) -> Reaped:
        """One round: end the leases that are over. Several planes may do it at the same time."""
        return await self._database.run(self._round)

    async def end(self) -> None:
        """This plane is not there any more."""
        if self._database.is_shared:
            with contextlib.suppress(Refused, SQLAlchemyError):  # else the others notice by themselves
                await self._database.run(lambda db: presence.leave(db, self._plane_id))

    def _round(self, db: Connection) -> Reaped:
        if self._database.is_shared:
            self._attend(db)
        return claims.reap(db, self.reapable_ms(), self._settings.attempts_max)

    def _attend(self, db: Connection) -> None:
        """Be there; by the database's own time, which passes also where a test's clock stands still."""
        if not presence.attend(db, self._plane_id, int(self._database.clock() * 1000)):
            self._hold_longer(db)

    def _hold_longer(self, db: Connection) -> None:
        if self._grace_ms > 0:
            claims.hold_longer(db, self._settings.now_ms + self._grace_ms)
