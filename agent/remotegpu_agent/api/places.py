"""Who gets a place when there are more connections than places: bounds in all and for each peer. Pure.

A newcomer takes the place of a connection on which nothing is being answered: first of those that never had an answer,
then of those that wait the longest. Only where every place is busy is a newcomer turned away.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable
from typing import Final, Generic, Protocol, TypeVar


class Holder(Protocol):
    """What `Places` looks at in a connection."""

    @property
    def awaits_request(self) -> bool:
        """Whether nothing is being answered on it."""
        ...

    @property
    def has_served(self) -> bool:
        """Whether a request of it was answered."""
        ...

    @property
    def quiet_since(self) -> float:
        """Since when it waits."""
        ...


HolderT = TypeVar("HolderT", bound=Holder)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """How many connections there may be."""

    in_all: int
    per_peer: int


class Places(Generic[HolderT]):
    """The connections of one listening socket, by peer."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds: Final = bounds
        self._peers: dict[HolderT, Hashable] = {}
        self._counts: collections.Counter[Hashable] = collections.Counter()

    @property
    def holders(self) -> tuple[HolderT, ...]:
        """All of them."""
        return tuple(self._peers)

    def take(self, peer: Hashable) -> tuple[bool, HolderT | None]:
        """Whether there is a place for another connection of `peer`, and which one must be closed for it.

        The one that must be closed has lost its place already.
        """
        is_peer_full = self._counts[peer] >= self._bounds.per_peer
        if not is_peer_full and len(self._peers) < self._bounds.in_all:
            return True, None
        waiting = (
            holder
            for holder, of_peer in self._peers.items()
            if holder.awaits_request and (of_peer == peer or not is_peer_full)
        )
        loser = min(waiting, key=lambda holder: (holder.has_served, holder.quiet_since), default=None)
        if loser is None:
            return False, None
        self.discard(loser)
        return True, loser

    def add(self, holder: HolderT, peer: Hashable) -> None:
        """Give it the place."""
        self._peers[holder] = peer
        self._counts[peer] += 1

    def discard(self, holder: HolderT) -> None:
        """Its place is free. Safe to repeat."""
        if holder not in self._peers:
            return
        peer = self._peers.pop(holder)
        self._counts[peer] -= 1
        if self._counts[peer] <= 0:
            del self._counts[peer]
