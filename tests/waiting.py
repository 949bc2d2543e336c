"""Waiting for facts about other processes, which tell nobody: the one place in the tests that looks again and again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

T = TypeVar("T")

DEADLINE_S: Final = 60.0
_LOOK_AGAIN_S: Final = 0.02


async def until(look: Callable[[], Awaitable[T]]) -> T:
    """What `look` gives as soon as that is true. Raises TimeoutError after DEADLINE_S."""
    async with asyncio.timeout(DEADLINE_S):
        while not (value := await look()):  # noqa: ASYNC110 - other processes set no event of ours
            await asyncio.sleep(_LOOK_AGAIN_S)
        return value


async def until_so(condition: Callable[[], bool]) -> None:
    """Return as soon as the condition holds. Raises TimeoutError after DEADLINE_S."""

    async def look() -> bool:
        return condition()

    await until(look)
