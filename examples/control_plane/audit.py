"""The audit log behind the API: pages of it, its bounds, and calls of agents that were refused, at a bounded rate."""

from __future__ import annotations

from typing import Any, Final

from control_plane.settings import AUDIT_PRUNE_EVERY, AUDIT_REFUSALS_PER_MINUTE
from control_plane.store import audit
from control_plane.store.audit import Actor, Filter
from control_plane.work import Work

_MINUTE_MS: Final = 60_000


class Audit:
    """The log of one open plane."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._minute_began_ms = 0
        self._noted = 0
        self._left_out = 0
        self._until_prune = 0

    async def page(self, wanted: Filter, before_seq: int | None, limit: int) -> list[dict[str, Any]]:
        """Entries, newest first."""
        return await self._work.run(lambda db: audit.page(db, wanted, before_seq, limit))

    async def refused(self, by: Actor, action: str, subject: str, reason: str) -> None:
        """Note a refused call of an agent. Above the rate they are counted, and the next entry tells how many.

        Anybody who reaches the port can be refused: what that writes must stay small.
        """
        now_ms = self._work.now_ms
        if not 0 <= now_ms - self._minute_began_ms < _MINUTE_MS:
            self._minute_began_ms, self._noted = now_ms, 0
        if self._noted >= AUDIT_REFUSALS_PER_MINUTE:
            self._left_out += 1
            return
        self._noted += 1
        left_out, self._left_out = self._left_out, 0
        detail = f"{reason}; {left_out} refusals before it were left out" if left_out else reason
        await self._work.run(lambda db: audit.record(db, now_ms, by, action, subject, detail))
        await self.keep_bounds()

    async def keep_bounds(self) -> None:
        """Remove what is too old or too much: at the first of AUDIT_PRUNE_EVERY calls."""
        self._until_prune -= 1
        if self._until_prune > 0:
            return
        self._until_prune = AUDIT_PRUNE_EVERY
        settings = self._work.settings
        older_than_ms = self._work.now_ms - int(settings.audit_retention_s * 1000)
        await self._work.run(lambda db: audit.prune(db, older_than_ms, settings.audit_rows_max))
