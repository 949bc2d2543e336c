"""Forgets finished tasks and audit files by age and by size, tasks with their directories; what nobody knows any more.

What may be forgotten is `maintenance.py`'s to say. A task's directories are thrown away inside of the unit that forgets
it: whoever claims the same task again makes new ones in a later one.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from remotegpu_agent.audit import AuditLog
from remotegpu_agent.trash import Trash, used_bytes
from remotegpu_queue import maintenance
from remotegpu_queue.maintenance import Finished
from remotegpu_queue.store import Store, StoreUnavailable
from remotegpu_schemas import limits
from remotegpu_sidecar.adoption import directory_name

log = structlog.get_logger(__name__)

ROUND_EVERY_S: Final = 600.0
SIZE_SPARES_S: Final = 3600.0
"""What ended so lately stays whatever its size: whoever waits for a result must be able to fetch it."""


@dataclass(frozen=True)
class RetentionSettings:
    """Ages in seconds; a size of 0 is no bound."""

    max_age_s: float
    size_max_bytes: int
    audit_max_age_s: float
    audit_size_max_bytes: int


@dataclass
class Round:
    """What one round has done."""

    tasks_by_age: int = 0
    tasks_by_size: int = 0
    strays: int = 0
    audit_files: int = 0
    entries: int = 0


class Retention:
    """Runs for ever, a round at a time. `strays` are run directories that the start has found to be nobody's."""

    def __init__(
        self,
        store: Store,
        state_dir: Path,
        audit: AuditLog,
        settings: RetentionSettings,
        *,
        wall_s: Callable[[], float],
        is_live: Callable[[str], bool],
    ) -> None:
        self._store = store
        self._attempts_dir, self._work_dir = state_dir / "attempts", state_dir / "work"
        self._attempts, self._work = Trash(self._attempts_dir), Trash(self._work_dir)
        self._audit = audit
        self._settings = settings
        self._wall_s = wall_s
        self._is_live = is_live
        self.strays: Sequence[Path] = ()
        self.spared_tasks: Collection[str] | None = None
        """Tasks of which something may live though no row knows them; None: that may be any."""

    async def run(self) -> None:
        """A round, then a pause, for ever."""
        while True:
            try:
                done = await self.round()
            except (OSError, StoreUnavailable) as error:
                log.warning("finished tasks cannot be cleaned up yet", error=str(error))
            else:
                if done != Round():
                    log.info("cleaned up", **vars(done))
            await asyncio.sleep(ROUND_EVERY_S)

    async def round(self) -> Round:
        """Everything that is due now. Raises OSError, StoreUnavailable; safe to repeat."""
        done = Round()
        done.tasks_by_age = await self._forget_by_age()
        done.tasks_by_size = await self._forget_by_size()
        done.strays = await self._drop_strays()
        done.audit_files = await asyncio.to_thread(self._drop_audit_files)
        for trash in (self._attempts, self._work):
            done.entries += await self._empty(trash)
        return done

    # --- finished tasks ---

    async def _forget_by_age(self) -> int:
        before_ms, size = round((self._wall_s() - self._settings.max_age_s) * 1000), limits.RETENTION_BATCH_TASKS
        forgotten, found_all = 0, False
        while not found_all:
            # Looked for on the reader: those that may not go yet are passed over one by one.
            found = await self._store.read(lambda db: maintenance.finished_before(db, before_ms, size))
            count = await self._write_off(found)
            forgotten, found_all = forgotten + count, len(found) < size or count == 0
        return forgotten

    async def _write_off(self, tasks: Sequence[Finished]) -> int:
        return await self._store.write(lambda db: self._forget(db, tasks)) if tasks else 0

    def _forget(self, db: sqlite3.Connection, tasks: Sequence[Finished]) -> int:
        forgotten = 0
        for task in tasks:
            if self._is_live(task.task_id) or not maintenance.may_be_forgotten(db, task.task_id):
                continue
            try:
                for attempt_id, run_no in task.runs:
                    self._attempts.throw(directory_name(attempt_id, run_no))
                self._work.throw(task.task_id)
            except ValueError as error:  # what is no name has no directory either
                log.error("a task of a damaged database is forgotten", reason=str(error))
            forgotten += maintenance.forget(db, task.task_id)
        return forgotten

    async def _forget_by_size(self) -> int:
        """The newest are kept as far as the bound goes; what is older goes."""
        if not self._settings.size_max_bytes:
            return 0
        spared_ms = round((self._wall_s() - SIZE_SPARES_S) * 1000)
        left_bytes, forgotten = self._settings.size_max_bytes, 0
        place: tuple[int, int] | None = None
        while True:
            page, place = await self._page_below(place)
            excess = []
            for task in page:
                if left_bytes > 0:
                    left_bytes -= await asyncio.to_thread(self._size, task)
                if left_bytes <= 0 and task.ended_at_ms < spared_ms:
                    excess.append(task)
            forgotten += await self._write_off(excess)
            if place is None:
                return forgotten

    async def _page_below(self, place: tuple[int, int] | None) -> tuple[list[Finished], tuple[int, int] | None]:
        size = limits.RETENTION_BATCH_TASKS
        return await self._store.read(lambda db: maintenance.finished_newest_first(db, place, size))

    def _size(self, task: Finished) -> int:
        directories = [self._attempts_dir / directory_name(*key) for key in task.runs]
        total = sum(used_bytes(each, limits.RETENTION_TREE_MAX_ENTRIES) for each in directories)
        return total + used_bytes(self._work_dir / task.task_id, limits.RETENTION_TREE_MAX_ENTRIES)

    # --- what nobody knows ---

    async def _drop_strays(self) -> int:
        before_s = self._wall_s() - self._settings.max_age_s
        old = await asyncio.to_thread(_older_than, self.strays, before_s)
        for path in old:
            self._attempts.throw(path.name)
        self.strays = [path for path in self.strays if path not in set(old)]
        return len(old) + await self._drop_unknown_work(before_s)

    async def _drop_unknown_work(self, before_s: float) -> int:
        """Working directories whose task is in no row: it was lost with a database, or forgotten without its work."""
        if self.spared_tasks is None:
            return 0
        spared = set(self.spared_tasks)
        old = [
            name for name in await asyncio.to_thread(_old_directories, self._work_dir, before_s) if name not in spared
        ]
        dropped = 0
        for start in range(0, len(old), limits.RETENTION_BATCH_TASKS):
            names = old[start : start + limits.RETENTION_BATCH_TASKS]
            dropped += await self._drop_if_unknown(names)
        return dropped

    async def _drop_if_unknown(self, names: list[str]) -> int:
        unknown = await self._store.read(lambda db: maintenance.unknown_tasks(db, names))

        def unit(db: sqlite3.Connection) -> int:
            return sum(self._work.throw(name) for name in maintenance.unknown_tasks(db, unknown))

        return await self._store.write(unit) if unknown else 0

    def _drop_audit_files(self) -> int:
        now_s, max_bytes = self._wall_s(), self._settings.audit_size_max_bytes
        dropped = self._audit.drop_before(now_s - self._settings.audit_max_age_s)
        return dropped + self._audit.drop_above(max_bytes, now_s) if max_bytes else dropped

    async def _empty(self, trash: Trash) -> int:
        removed = 0
        while True:
            done = await asyncio.to_thread(trash.empty, limits.RETENTION_PIECE_ENTRIES)
            removed += done.removed
            if done.stuck:
                log.warning("something cannot be removed", count=len(done.stuck), first=done.stuck[0])
            if not done.has_more or not done.removed:
                return removed


def _old_directories(parent: Path, before_s: float) -> list[str]:
    try:
        with os.scandir(parent) as entries:
            found = [Path(entry.path) for entry in entries if not entry.name.startswith(".")]
    except FileNotFoundError:
        return []
    return [path.name for path in _older_than(found, before_s)]


def _older_than(paths: Sequence[Path], before_s: float) -> list[Path]:
    """Those that were last changed, or had their owner changed, before a time; what is gone is none of them."""
    found = []
    for path in paths:
        try:
            status = path.lstat()
        except OSError:
            continue
        if max(status.st_mtime, status.st_ctime) < before_s:
            found.append(path)
    return found
