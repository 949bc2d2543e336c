"""What every subject behind the APIs works with: the database, the plane's clock, new ids. Knows no subject."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Connection

from control_plane.settings import Settings
from control_plane.store.database import Database
from control_plane.store.outcomes import Refusal
from remotegpu_schemas.errors import Refused

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """Runs units of an open database."""

    database: Database
    settings: Settings
    new_id: Callable[[], str]

    @property
    def now_ms(self) -> int:
        """The time on the plane's clock, in milliseconds."""
        return self.settings.now_ms

    async def run(self, unit: Callable[[Connection], T]) -> T:
        """What the unit returns, once it is committed."""
        return await self.database.run(unit)

    async def ask(self, unit: Callable[[Connection], T | Refusal]) -> T:
        """As `run`, but a refusal is raised, as Refused with its code; the trace that it left is committed."""
        outcome = await self.database.run(unit)
        if isinstance(outcome, Refusal):
            raise Refused(outcome.code, outcome.message)
        return outcome
