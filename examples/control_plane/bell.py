"""Wakes whoever waits for news, without losing any: take `listen` first, then look, then wait for what was taken."""

from __future__ import annotations

import asyncio


class Bell:
    """Any number may listen; each ring wakes all who listened before it."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def listen(self) -> asyncio.Event:
        """The event that the next ring sets."""
        return self._next

    def ring(self) -> None:
        """Wake everybody."""
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
