"""Who was there to look after leases."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from sqlalchemy import Connection, create_engine, func, select

from control_plane.settings import PRESENCE_GAP_MS, PRESENCE_KEPT_MS
from control_plane.store import presence
from control_plane.store.tables import metadata

NOW_MS = 1_770_000_000_000


@pytest.fixture
def db() -> Generator[Connection]:
    """An empty database in memory."""
    engine = create_engine("sqlite://")
    metadata.create_all(engine)
    with engine.begin() as db:
        yield db
    engine.dispose()


def test_first_plane_finds_nobody(db: Connection) -> None:
    """The first one is told so; from then on somebody is there, for every plane."""
    assert not presence.attend(db, "a", NOW_MS)
    assert presence.attend(db, "a", NOW_MS + 1000)
    assert presence.attend(db, "b", NOW_MS + 1000)


def test_plane_that_was_cut_off_knows_it(db: Connection) -> None:
    """A plane that could not say that it is there finds that nobody was."""
    presence.attend(db, "a", NOW_MS)
    assert presence.attend(db, "a", NOW_MS + PRESENCE_GAP_MS - 1)
    assert not presence.attend(db, "a", NOW_MS + 2 * PRESENCE_GAP_MS)


def test_last_plane_that_leaves(db: Connection) -> None:
    """After an orderly end nobody is there, however short it was."""
    presence.attend(db, "a", NOW_MS)
    presence.attend(db, "b", NOW_MS)
    presence.leave(db, "a")
    assert presence.attend(db, "c", NOW_MS + 1)
    presence.leave(db, "b")
    presence.leave(db, "c")
    assert not presence.attend(db, "d", NOW_MS + 2)


def test_dead_planes_are_forgotten(db: Connection) -> None:
    """The table does not grow with planes that left no word."""
    for number in range(10):
        presence.attend(db, f"dead-{number}", NOW_MS)
    presence.attend(db, "new", NOW_MS + PRESENCE_KEPT_MS + 1)
    assert db.execute(select(func.count()).select_from(presence.planes)).scalar_one() == 1
