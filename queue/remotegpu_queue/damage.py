"""A damaged database: how it is found out, and how it is set aside. It is never deleted, and never written again.

Knows nothing of tasks. What is rebuilt from the attempt directories afterwards is `restoring.py`'s.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Final

from remotegpu_schemas import limits
from remotegpu_schemas.errors import AgentError

_CODES: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_HEADER_BYTES: Final = 100
_SCHEMA_FORMAT_MAX: Final = 4
_REASON_MAX_CHARS: Final = 300
_CHECKED_MAX_BYTES: Final = 32 * limits.MIB
_COPY_MAX_BYTES: Final = 64 * limits.MIB
_PARTS: Final = ("", "-wal", "-shm")
"""The file itself, its log, and the log's index (sqlite.org/walformat.html)."""


class Damaged(AgentError):
    """The database is damaged; the message says how it was found out."""


@dataclass(frozen=True)
class SetAside:
    """A database that was moved away: where it is now, why, and the little that could still be read of it."""

    path: Path
    reason: str
    meta: dict[str, str] = field(default_factory=dict)


def is_damage(error: BaseException) -> bool:
    """Whether SQLite says that the file is no database any more (sqlite.org/rescode.html)."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, sqlite3.Error) and code is not None and (code & 0xFF) in _CODES


def suspect_path(path: Path) -> Path:
    """The mark that an agent leaves which met damage while it ran: the next one looks at everything."""
    return path.with_name(f"{path.name}.suspect")


def has_stopped_cleanly(path: Path) -> bool:
    """Whether whoever had the database last has closed it: SQLite then removes the log."""
    return not _log_path(path).exists() and not suspect_path(path).exists()


def refuse_remains(path: Path) -> None:
    """Raise Damaged for a log whose database is gone or empty: SQLite would drop it without a word."""
    with contextlib.suppress(FileNotFoundError):
        if _log_path(path).stat().st_size == 0:
            return
        if not path.exists() or path.stat().st_size == 0:
            raise Damaged("the database is gone or empty, but for its log")


def refuse_header(path: Path) -> None:
    """Raise Damaged for a file that begins as no database of ours does (sqlite.org/fileformat.html, section 1.3).

    Of some damage there SQLite says that the format is newer, or that the file is read-only. Raises OSError.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except FileNotFoundError:
        return
    if not header:
        return  # made a moment ago, or by `touch`
    is_whole = (
        len(header) == _HEADER_BYTES
        and header.startswith(b"SQLite format 3\0")
        and set(header[18:20]) <= {1, 2}
        and header[21:24] == b"\x40\x20\x20"
        and int.from_bytes(header[44:48], "big") <= _SCHEMA_FORMAT_MAX
    )
    if not is_whole:
        raise Damaged("file is not a database")


def examine(path: Path) -> None:
    """Look for damage where the last stop gives reason to. Raises Damaged, sqlite3.Error, OSError.

    A connection that could write would bring the log into the damaged file when it is closed.
    """
    refuse_remains(path)
    refuse_header(path)
    if has_stopped_cleanly(path) or not path.exists():
        return
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        refuse_damage(db, is_thorough=suspect_path(path).exists())
    suspect_path(path).unlink(missing_ok=True)


def refuse_damage(db: sqlite3.Connection, *, is_thorough: bool) -> None:
    """Look at every page, and with `is_thorough` at every index too. Raises Damaged.

    A large database's CHECKs are left out unless it is to be thorough: they take 1.1 of 1.2 s for 80,000 tasks, 75 MB.
    """
    try:
        size: int = db.execute("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").fetchone()[0]
        has_checks = is_thorough or size <= _CHECKED_MAX_BYTES
        db.execute(f"PRAGMA ignore_check_constraints = {'OFF' if has_checks else 'ON'}")
        found = db.execute("PRAGMA integrity_check(1)" if is_thorough else "PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        if is_damage(error):
            raise Damaged(str(error)) from error
        raise
    if found != "ok":
        raise Damaged(" ".join(str(found).split())[:_REASON_MAX_CHARS])


def set_aside(path: Path, reason: str, now: datetime) -> SetAside:
    """Move the database with its log to `<name>.damaged-<time>`. Raises OSError."""
    target = _free_name(path.with_name(f"{path.name}.damaged-{now:%Y%m%dT%H%M%SZ}"))
    for part in _PARTS:
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{part}", f"{target}{part}")
    suspect_path(path).unlink(missing_ok=True)
    return SetAside(target, reason, _salvage_meta(target))


def notices(path: Path) -> list[str]:
    """A sentence for each damaged database that lies beside this one."""
    found = path.parent.glob(f"{path.name}.damaged-*")
    names = sorted(each.name for each in found if not each.name.endswith(_PARTS[1:]))
    return [
        f"the database was damaged and has been rebuilt: {name} is what there was; tasks that only it knows do not run "
        "(look into it, then move it away)"
        for name in names
    ]


def _free_name(wanted: Path) -> Path:
    candidate, number = wanted, 1
    while any(os.path.lexists(f"{candidate}{part}") for part in _PARTS):
        number += 1
        candidate = wanted.with_name(f"{wanted.name}.{number}")
    return candidate


def _salvage_meta(path: Path) -> dict[str, str]:
    """The table `meta` (the agent's name, an operator's drain), as far as it can be read. Touches neither file."""
    found = _meta_of(path)
    log_path = _log_path(path)
    with contextlib.suppress(OSError):
        # With the log SQLite would write: what it has is newer, but to be had of a copy only.
        if log_path.stat().st_size > 0 and path.stat().st_size + log_path.stat().st_size <= _COPY_MAX_BYTES:
            with tempfile.TemporaryDirectory(dir=path.parent) as directory:
                copy = Path(directory) / path.name
                shutil.copy(path, copy)
                shutil.copy(log_path, _log_path(copy))
                found |= _meta_of(copy, is_alone=False)
    return found


def _meta_of(path: Path, *, is_alone: bool = True) -> dict[str, str]:
    options = "mode=ro&immutable=1" if is_alone else "mode=rw"
    found: dict[str, str] = {}
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?{options}", uri=True)) as db,
    ):
        db.execute("PRAGMA writable_schema = ON")  # a file that is too short is read as far as it goes
        for key, value in db.execute("SELECT key, value FROM meta"):
            if isinstance(key, str) and isinstance(value, str):
                found[key] = value  # noqa: PERF403 - one at a time: what comes before the damage counts
    return found


def _log_path(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")
