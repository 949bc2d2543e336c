"""Who gets a place when there are more connections than places: bounds in all and for each peer. Pure.

A newcomer takes the place of a connection on which nothing is being answered: first of those that never had an answer,
then of those that wait the longest. Only where every place is busy is a newcomer turned away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable
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
        # Dictionaries for their order, that of arrival: a flood of newcomers must not cost a search each.
        self._peers: dict[HolderT, Hashable] = {}
        self._of_peer: dict[Hashable, dict[HolderT, None]] = {}

    @property
    def holders(self) -> tuple[HolderT, ...]:
        """All of them."""
        return tuple(self._peers)

    def take(self, peer: Hashable) -> tuple[bool, HolderT | None]:
        """Whether there is a place for another connection of `peer`, and which one must be closed for it.

        The one that must be closed has lost its place already.
        """
        own = self._of_peer.get(peer, {})
        if len(own) >= self._bounds.per_peer:
            loser = _first_to_go(own)
        elif len(self._peers) >= self._bounds.in_all:
            loser = _first_to_go(self._peers)
        else:
            return True, None
        if loser is None:
            return False, None
        self.discard(loser)
        return True, loser

    def add(self, holder: HolderT, peer: Hashable) -> None:
        """Give it the place."""
        self._peers[holder] = peer
        self._of_peer.setdefault(peer, {})[holder] = None

    def discard(self, holder: HolderT) -> None:
        """Its place is free. Safe to repeat."""
        if holder not in self._peers:
            return
        peer = self._peers.pop(holder)
        del self._of_peer[peer][holder]
        if not self._of_peer[peer]:
            del self._of_peer[peer]


def _first_to_go(holders: Iterable[HolderT]) -> HolderT | None:
    """Of connections in the order of their arrival: the first without any request, else the one idle for longest."""
    longest: HolderT | None = None
    for holder in holders:
        if not holder.awaits_request:
            continue
        if not holder.has_served:
            return holder
        if longest is None or holder.quiet_since < longest.quiet_since:
            longest = holder
    return longest
