"""`db`: the agent's database as a whole. Works on the file itself, whether or not an agent runs on it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

from remotegpu_agent.cli.arguments import Argument
from remotegpu_agent.cli.context import Globals, say
from remotegpu_agent.cli.exits import Exit, Stop

T = TypeVar("T")


def check(options: Globals) -> int:
    """Look at every page, index and reference of the database. Exit code 1 if something is wrong.

    A running agent goes on meanwhile; it looks by itself after an unclean stop.

    Example: remotegpu-agent db check
    """
    from remotegpu_agent.cli.output import print_json
    from remotegpu_queue import maintenance

    path = _path(options)
    health = _work(path, lambda: maintenance.check(path))
    if options.is_json:
        rows = {"version": health.version, "rows": health.rows}
        print_json({"path": str(path), "is_sound": not health.problems, "problems": health.problems, **rows})
    else:
        for problem in health.problems:
            print(problem)
        if not health.problems:
            counts = ", ".join(f"{count} {table}" for table, count in health.rows.items())
            print(f"{path}: sound, version {health.version}, {counts}")
    if health.problems:
        say(f"{path} is damaged: restart the agent, which will set it aside and make a new one of what runs")
        return Exit.FAILED
    return Exit.DONE


def backup(
    options: Globals,
    target: Annotated[Path, Argument("FILE", "Where to; must not exist yet. Made with mode 0600.")],
) -> None:
    """Copy the database as it is at one moment to a file; also while the agent runs.

    To put it back: stop the agent, move queue.db, queue.db-wal and queue.db-shm away, copy FILE to queue.db.

    Example: remotegpu-agent db backup /var/backups/remotegpu-queue.db
    """
    from remotegpu_queue import maintenance

    path = _path(options)
    try:
        size = _work(path, lambda: maintenance.back_up(path, target.absolute()))
    except FileExistsError:
        raise Stop(Exit.USAGE, f"{target} exists already; a backup never replaces a file") from None
    if options.is_json:
        from remotegpu_agent.cli.output import print_json

        print_json({"path": str(target.absolute()), "bytes": size})
    else:
        print(f"{target}: {size} bytes")


def _path(options: Globals) -> Path:
    from remotegpu_agent.config import load_config
    from remotegpu_queue.store import DATABASE_NAME
    from remotegpu_schemas.errors import Misconfigured

    try:
        return load_config(options.config, os.environ).agent.state_dir / DATABASE_NAME
    except Misconfigured as error:
        raise Stop(Exit.USAGE, str(error)) from None


def _work(path: Path, work: Callable[[], T]) -> T:
    try:
        return work()
    except FileExistsError:
        raise
    except FileNotFoundError as error:
        raise Stop(
            Exit.NOT_FOUND, error.args[0] if not error.filename else f"{error.filename}: {error.strerror}"
        ) from None
    except sqlite3.Error as error:
        raise Stop(Exit.FAILED, f"{path} cannot be read as a database: {error}") from None
    except OSError as error:
        raise Stop(Exit.FAILED, f"{error.filename or path}: {error.strerror or error}") from None
