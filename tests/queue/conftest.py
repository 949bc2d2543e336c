"""A migrated database on an inline connection, and an open store."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from remotegpu_queue.store import Store
from tests.queue.support import open_inline


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """A real file, used without the store's threads."""
    with contextlib.closing(open_inline(tmp_path / "queue.db")) as connection:
        yield connection


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    """An open store on a directory of its own."""
    opened = await Store.open(tmp_path / "state")
    yield opened
    await opened.close()
