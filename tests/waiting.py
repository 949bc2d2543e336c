"""Waiting for facts about other processes, which tell nobody: the one place in the tests that looks again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

T = TypeVar("T")

DEADLINE_S: Final = 60.0
_LOOK_AGAIN_S: Final = 0.02


async def until(look: Callable[[], T | Awaitable[T]]) -> T:
    """What `look` gives as soon as that is true. Raises TimeoutError after DEADLINE_S."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            found = look()
            value = await found if isinstance(found, Awaitable) else found
            if value:
                return value
            await asyncio.sleep(_LOOK_AGAIN_S)
