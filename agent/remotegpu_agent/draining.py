"""Whether this host is being emptied: asked for by an operator (kept over restarts) or by the control plane.

While it is, no task is claimed and no local one is started or taken; what was claimed runs to its end, and its lease
is renewed and heartbeats go on as ever.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import structlog

from remotegpu_agent.clock import Clock
from remotegpu_queue import units
from remotegpu_queue.store import Store
from remotegpu_schemas.limits import STORE_PATIENCE_S

log = structlog.get_logger(__name__)

_KEY: Final = "drain"


@dataclass(frozen=True)
class DrainOrder:
    """Who asked for it here, why, and when (wall clock, ms)."""

    by: str
    reason: str
    at_ms: int


class Drain:
    """The two orders and their store; `on_changed` is called when the host begins or ends to be emptied."""

    def __init__(self, store: Store, clock: Clock, *, on_changed: Callable[[], None]) -> None:
        self._store = store
        self._clock = clock
        self._on_changed = on_changed
        self._looks_again: set[asyncio.Event] = set()
        self.order: DrainOrder | None = None
        self.is_asked_by_plane = False

    @property
    def is_on(self) -> bool:
        """Whether anybody wants it."""
        return self.order is not None or self.is_asked_by_plane

    @property
    def sentence(self) -> str | None:
        """Why, for people; None while nobody wants it."""
        if self.order is not None:
            why = f": {self.order.reason}" if self.order.reason else ""
            return f"draining on the order of {self.order.by}{why} (`remotegpu-agent undrain` ends it)"
        if self.is_asked_by_plane:
            return "draining: the control plane asked for no more tasks on this host"
        return None

    async def load(self) -> None:
        """Take up the order of an earlier agent process."""
        text = await self._store.read(lambda db: units.find_meta(db, _KEY))
        if text is not None:
            found = json.loads(text)
            self.order = DrainOrder(str(found["by"]), str(found["reason"]), int(found["at_ms"]))

    async def begin(self, by: str, reason: str) -> None:
        """Empty this host from now on. Safe to repeat: the first order stays. Raises StoreUnavailable."""
        if self.order is None:
            order = DrainOrder(by, reason, self._clock.wall_ms())
            text = json.dumps({"by": order.by, "reason": order.reason, "at_ms": order.at_ms})
            await self._store.write(lambda db: units.set_meta(db, _KEY, text), patience_s=STORE_PATIENCE_S)
            self.order = order
            log.info("draining", asked_by=by, reason=reason)
            self._changed()

    async def end(self) -> None:
        """Take back the local order. Safe to repeat. Raises StoreUnavailable."""
        if self.order is not None:
            await self._store.write(lambda db: units.set_meta(db, _KEY, None), patience_s=STORE_PATIENCE_S)
            self.order = None
            log.info("no longer draining", asked_by="operator", is_still_asked_by_plane=self.is_asked_by_plane)
            self._changed()

    def _changed(self) -> None:
        self.look_again()
        self._on_changed()

    def look_again(self) -> None:
        """Something has ended, or the order has changed: whoever waits for an empty host looks again."""
        for event in self._looks_again:
            event.set()

    async def wait_until(self, is_reached: Callable[[], Awaitable[bool]], wait_s: float) -> None:
        """Wait until it is so, or the time (s) is over; asked whenever something has changed."""
        changed = asyncio.Event()
        self._looks_again.add(changed)
        try:
            async with asyncio.timeout(wait_s):
                while not await is_reached():
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            return
        finally:
            self._looks_again.discard(changed)

    def plane_wants(self, wants: bool) -> None:
        """What the control plane's last heartbeat answer said."""
        if wants != self.is_asked_by_plane:
            self.is_asked_by_plane = wants
            log.info("draining" if wants else "no longer draining", asked_by="control plane")
            self._changed()
