"""Keeps the black-hole breaker: counts how claimed tasks end, and sends canaries while it is open.

A canary is a local task like any other: it goes the whole way through store, scheduler, shim and the task's user. What
follows from an end is decided in `remotegpu_queue.breaker`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection
from typing import Final

import structlog

from remotegpu_agent.clock import Clock
from remotegpu_agent.executor import Active
from remotegpu_agent.supervise import Loops
from remotegpu_queue import breaker, units, views
from remotegpu_queue.admission import Block, BlockKind
from remotegpu_queue.breaker import Breaker, Phase, Rules
from remotegpu_queue.store import Store, StoreUnavailable
from remotegpu_queue.units import NewAttempt
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.errors import Refused
from remotegpu_schemas.states import Cause
from remotegpu_schemas.task import PRIORITY_MOST_URGENT, Task, TaskId

log = structlog.get_logger(__name__)

CANARY_LABEL: Final = ("remotegpu", "canary")
DEFAULT_COMMAND: Final = (
    'set -eu; file=$(mktemp); echo ok >"$file"; test "$(cat "$file")" = ok; rm "$file"; '
    'echo ok >"$REMOTEGPU_ARTIFACTS_DIR/canary"; rm "$REMOTEGPU_ARTIFACTS_DIR/canary"'
)
"""A shell starts as the task's user, and both of the places that every task writes to can be written."""

_KEY: Final = "breaker"
_CANARY_TIMEOUT_S: Final = 60.0
_STORE_RETRY_S: Final = 1.0


class BreakerKeeper:
    """Told of starts and ends by the executor; `on_changed` is called when claiming may begin or must end."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        loops: Loops,
        rules: Rules,
        *,
        boot_id: str,
        command: str | None,
        new_id: Callable[[], str],
        active: Callable[[], Collection[Active]],
        on_changed: Callable[[], None],
        on_submitted: Callable[[], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._loops = loops
        self._rules = rules
        self._boot_id = boot_id
        self._command = command or DEFAULT_COMMAND
        self._new_id = new_id
        self._active = active
        self._on_changed = on_changed
        self._on_submitted = on_submitted
        self._has_changed = asyncio.Event()
        self._canary: TaskId | None = None
        self._canary_ended = asyncio.Event()
        self._timers: dict[AttemptId, asyncio.TimerHandle] = {}
        self._proven: set[AttemptId] = set()
        self.breaker = Breaker()

    async def load(self) -> None:
        """Take up what an earlier agent process has seen."""
        text = await self._store.read(lambda db: units.find_meta(db, _KEY))
        if text is not None:
            found = json.loads(text)
            kept = breaker.from_text(found["breaker"])
            self.breaker = breaker.restarted(kept, is_same_boot=found["boot_id"] == self._boot_id)

    @property
    def block(self) -> Block | None:
        """Why nothing is claimed; None while something may be."""
        if not self.breaker.is_blocking:
            return None
        return Block(BlockKind.BREAKER_OPEN, breaker.sentence(self.breaker, self._rules))

    def room(self) -> int | None:
        """How many more tasks may be claimed now; None is no bound."""
        unproven = sum(
            1
            for active in self._active()
            if active.attempt_id not in self._proven and (active.attempt is None or _is_claimed(active))
        )
        return breaker.room(self.breaker, self._rules, unproven)

    # --- what the executor tells ---

    def started(self, active: Active) -> None:
        """A run has its process."""
        if _is_claimed(active):
            loop = asyncio.get_running_loop()
            self._timers[active.attempt_id] = loop.call_later(self._rules.within_s, self._lived, active.attempt_id)

    def ended(self, active: Active) -> None:
        """A run has ended, and what became of it is on disk."""
        if active.task_id == self._canary:
            self._probe_ended(active)
            return
        timer = self._timers.pop(active.attempt_id, None)
        if timer is not None:
            timer.cancel()
        self._proven.discard(active.attempt_id)
        if active.outcome is None or not _is_claimed(active):
            return
        cause = active.outcome.cause
        if cause is Cause.SUCCEEDED:
            self._become(breaker.proved(self.breaker))
        elif cause in breaker.HOST_MAY_BE_AT_FAULT and (timer is not None or active.started is None):
            error = active.outcome.error or str(cause)
            self._become(breaker.failed_fast(self.breaker, active.task_id, error, self._rules, self._clock.wall_ms()))
        else:
            self._on_changed()  # there is room for another one on trial

    def _lived(self, attempt_id: AttemptId) -> None:
        if self._timers.pop(attempt_id, None) is not None:
            self._proven.add(attempt_id)
            self._become(breaker.proved(self.breaker))
            self._on_changed()

    def _probe_ended(self, active: Active) -> None:
        if active.outcome is None:
            return
        self._canary = None
        has_passed = active.outcome.cause is Cause.SUCCEEDED
        log.info("a canary has ended", has_passed=has_passed, task_id=active.task_id, error=active.outcome.error)
        self._become(breaker.probe_ended(self.breaker, has_passed=has_passed, error=active.outcome.error or ""))
        self._canary_ended.set()

    def _become(self, after: Breaker) -> None:
        before, self.breaker = self.breaker, after
        if after == before:
            return
        if after.is_blocking and not before.is_blocking:
            log.error("no more tasks are claimed", reason=breaker.sentence(after, self._rules))
        elif after.phase is Phase.TRIAL:
            log.warning("claiming again, one task at a time")
        elif before.phase is Phase.TRIAL and after.phase is Phase.CLOSED:
            log.info("this host works again: claiming as ever")
        self._loops.spawn("breaker-store", self._store_state)
        self._has_changed.set()
        self._on_changed()

    async def _store_state(self) -> None:
        """For the next agent process; what it does not learn costs a few tasks more."""
        text = json.dumps({"boot_id": self._boot_id, "breaker": breaker.to_text(self.breaker)})
        try:
            await self._store.write(lambda db: units.set_meta(db, _KEY, text))
        except StoreUnavailable as error:
            log.warning("the breaker's state cannot be stored", error=str(error))

    # --- probing ---

    async def run(self) -> None:
        """Send canaries while the breaker is open, for ever."""
        while True:
            self._has_changed.clear()
            if self.breaker.phase is Phase.OPEN:
                await asyncio.sleep(breaker.probe_pause_s(self.breaker, self._rules))
                await self._probe()
            else:
                await self._has_changed.wait()

    async def _probe(self) -> None:
        name, value = CANARY_LABEL
        task = Task(
            id=f"canary-{self._new_id()}",
            name="canary",
            command=self._command,
            timeout_s=_CANARY_TIMEOUT_S,
            priority=PRIORITY_MOST_URGENT,
            labels={name: value},
        )
        new = NewAttempt(task=task, attempt_id=AttemptId(self._new_id()), origin="local", boot_id=self._boot_id)
        self._canary_ended.clear()
        self._canary = task.task_id
        self._become(breaker.probe_began(self.breaker))
        try:
            now_ms = self._clock.wall_ms()
            await self._store.write(lambda db: units.submit(db, [new], now_ms))
        except (StoreUnavailable, Refused) as error:
            self._missed(f"the canary could not be stored: {error}")
            return
        self._on_submitted()
        await self._until_ended(new.attempt_id)

    async def _until_ended(self, attempt_id: AttemptId) -> None:
        """It may wait for a slot for long; one that somebody ends meanwhile has no run that would tell."""
        while not self._canary_ended.is_set():
            try:
                async with asyncio.timeout(_CANARY_TIMEOUT_S):
                    await self._canary_ended.wait()
            except TimeoutError:
                found = await self._store.read(lambda db: views.attempt(db, attempt_id))
                if found is None or found.state.is_final:
                    self._missed("the canary was ended before it ran")
                    return

    def _missed(self, error: str) -> None:
        self._canary = None
        self._become(breaker.probe_ended(self.breaker, has_passed=False, error=error))


def _is_claimed(active: Active) -> bool:
    return active.attempt is not None and active.attempt.origin == "control_plane"
