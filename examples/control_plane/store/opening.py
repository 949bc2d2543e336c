"""Which kind of database a setting names."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from control_plane.store.database import Database
from control_plane.store.sqlite import open_sqlite

URL_SCHEMES: Final = ("postgresql://", "postgres://", "postgresql+asyncpg://")


def is_url(text: str) -> bool:
    """Whether it names a PostgreSQL; everything else is a file."""
    return text.startswith(URL_SCHEMES)


async def open_database(where: Path | str) -> Database:
    """Open it, made with its tables if it is new. Raises CannotServe with what to do."""
    if isinstance(where, str) and is_url(where):
        # Late: SQLite must do without the drivers of PostgreSQL.
        from control_plane.store.postgres import open_postgres  # noqa: PLC0415

        return await open_postgres(where)
    return await open_sqlite(Path(where))
