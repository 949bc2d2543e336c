"""Reports that were refused for good: shown, sent again, or dropped by an operator; never by the agent itself."""

from __future__ import annotations

from collections.abc import Callable

from remotegpu_queue import outbox
from remotegpu_queue.outbox import Report
from remotegpu_queue.store import Store
from remotegpu_schemas.api import DeadLetter, DeadLetterPage
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.limits import STORE_PATIENCE_S
from remotegpu_schemas.wire import format_time


class DeadLetters:
    """Over the store; `on_changed` is called when one is due again or has gone, which makes room for other reports."""

    def __init__(self, store: Store, boot_id: str, *, on_changed: Callable[[], None]) -> None:
        self._store = store
        self._boot_id = boot_id
        self._on_changed = on_changed

    async def page(self, limit: int, offset: int) -> DeadLetterPage:
        """One page, oldest first, without bodies, which may be large."""
        found, total = await self._store.read(lambda db: outbox.dead_letters(db, limit, offset))
        views = [_view(report).model_copy(update={"body": {}}) for report in found]
        return DeadLetterPage(dead_letters=views, total=total, limit=limit, offset=offset)

    async def show(self, letter_id: int) -> DeadLetter:
        """One, whole. Raises Refused."""
        found = await self._store.read(lambda db: outbox.dead_letter(db, letter_id))
        if found is None:
            raise Refused(Code.DEAD_LETTER_NOT_FOUND, f"there is no dead letter {letter_id}; see dead-letters list")
        return _view(found)

    async def resend(self, letter_id: int) -> DeadLetter:
        """Due at once. Raises Refused."""
        letter = await self.show(letter_id)
        if not await self._store.write(
            lambda db: outbox.resend_dead(db, letter_id, self._boot_id), patience_s=STORE_PATIENCE_S
        ):
            raise Refused(Code.DEAD_LETTER_NOT_FOUND, f"dead letter {letter_id} has just gone")
        self._on_changed()
        return letter

    async def drop(self, letter_id: int) -> DeadLetter:
        """Gone for good. Raises Refused."""
        letter = await self.show(letter_id)
        if not await self._store.write(lambda db: outbox.drop_dead(db, letter_id), patience_s=STORE_PATIENCE_S):
            raise Refused(Code.DEAD_LETTER_NOT_FOUND, f"dead letter {letter_id} has just gone")
        self._on_changed()
        return letter


def _view(report: Report) -> DeadLetter:
    return DeadLetter(
        id=report.id,
        kind=report.kind,
        task_id=report.task_id,
        attempt_id=report.attempt_id,
        created_at=format_time(report.created_at_ms / 1000),
        tries=report.tries,
        error=report.last_error,
        body=report.body,
    )
