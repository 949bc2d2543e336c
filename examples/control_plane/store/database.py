"""A database that is open: runs units of work, and tells other planes on the same database what has changed.

`sqlite.py` and `postgres.py` are the two kinds; nothing else knows which one it is.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Protocol, TypeVar

from sqlalchemy import Connection

T = TypeVar("T")


class Notice(enum.StrEnum):
    """What may have changed."""

    CLAIMABLE = "claimable"
    """Tasks can be claimed that could not before."""
    ENDED = "ended"
    """Tasks have ended."""
    TOKENS = "tokens"
    """Tokens were replaced."""


class Database(Protocol):
    """An open database. May be used from one event loop only."""

    @property
    def is_shared(self) -> bool:
        """Other planes may work on it at the same time."""
        ...

    def clock(self) -> float:
        """The time that all planes on this database agree on, in seconds since 1970."""
        ...

    async def run(self, unit: Callable[[Connection], T]) -> T:
        """What the unit returns, once it is committed; raises what it raises, with its changes rolled back.

        Raises Refused (30099) if the database cannot be reached; then the unit may have been committed all the same,
        as when the caller is cancelled.
        """
        ...

    def listen(self, hear: Callable[[Notice], None]) -> None:
        """Call `hear` for what other planes announce, and at times for what they may have announced unheard."""
        ...

    def announce(self, notice: Notice) -> None:
        """Tell the other planes, soon; what is announced again meanwhile is told once. Never waits, never fails."""
        ...

    async def close(self) -> None:
        """Finish what waits, then close. Nothing may be run afterwards."""
        ...
