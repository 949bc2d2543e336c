"""Who gets a place, decided on plain values."""

from __future__ import annotations

from dataclasses import dataclass

from remotegpu_agent.api.places import Bounds, Places


@dataclass(eq=False)
class Held:
    """A connection, as far as it matters."""

    quiet_since: float = 0.0
    has_served: bool = True
    awaits_request: bool = True


def places(in_all: int, per_peer: int, **held: Held) -> Places[Held]:
    """With these connections; the first letter of a name is its peer."""
    filled: Places[Held] = Places(Bounds(in_all, per_peer))
    for name, each in held.items():
        filled.add(each, name[0])
    return filled


def test_as_long_as_there_is_room() -> None:
    """Nobody has to go."""
    assert places(3, 2, a1=Held(), b1=Held()).take("a") == (True, None)


def test_a_peers_own_connections_go_first() -> None:
    """Who has all that a peer may have gives up one of its own, though another's waits longer."""
    own, other = Held(quiet_since=5.0), Held(quiet_since=1.0)
    filled = places(9, 2, a1=Held(quiet_since=9.0), a2=own, b1=other)
    assert filled.take("a") == (True, own)
    assert own not in filled.holders
    assert filled.take("a") == (True, None)


def test_never_served_goes_before_served() -> None:
    """A connection without any request goes before one that was served, however long that has been idle."""
    silent = Held(quiet_since=9.0, has_served=False)
    assert places(2, 2, a1=Held(quiet_since=1.0), b1=silent).take("c") == (True, silent)


def test_busy_ones_stay() -> None:
    """Where all are busy the newcomer is turned away; one that is free again makes room."""
    busy = Held(awaits_request=False)
    filled = places(1, 1, a1=busy)
    assert filled.take("b") == (False, None)
    filled.discard(busy)
    filled.discard(busy)
    assert filled.take("b") == (True, None)
