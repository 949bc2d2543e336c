"""Wakes whoever waits for news, without losing any: take `listen` first, then look, then wait for what was taken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Bell:
    """Any number may listen; each ring wakes all who listened before it. `on_ring` tells it elsewhere."""

    def __init__(self, on_ring: Callable[[], None] | None = None) -> None:
        self._on_ring = on_ring
        self._next = asyncio.Event()

    def listen(self) -> asyncio.Event:
        """The event that the next ring sets."""
        return self._next

    def ring(self) -> None:
        """Wake everybody, here and elsewhere."""
        self.wake()
        if self._on_ring is not None:
            self._on_ring()

    def wake(self) -> None:
        """Wake everybody here."""
        rung, self._next = self._next, asyncio.Event()
        rung.set()


async def wait(event: asyncio.Event, timeout_s: float | None) -> bool:
    """Whether the event was set within the time (None: however long it takes)."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
