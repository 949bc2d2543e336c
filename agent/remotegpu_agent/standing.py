"""How the agent stands: ready, draining or degraded, and why. One answer for heartbeats, claims, API and people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias

from remotegpu_agent.contact import Problem
from remotegpu_agent.control_plane import ControlPlane
from remotegpu_queue.admission import STORAGE_KINDS, Block, BlockKind
from remotegpu_schemas import limits
from remotegpu_schemas.api import ControlPlaneStatus
from remotegpu_schemas.wire import format_time

State: TypeAlias = Literal["ready", "draining", "degraded"]


_OUTBOX_FULL: Final = f"{limits.OUTBOX_MAX_ROWS} reports wait for the control plane: no more tasks are claimed"


class Standing:
    """Asked, never pushed: the parts that know are looked at when somebody wants to know."""

    def __init__(self, url: str | None) -> None:
        self._url = url
        self.plane: ControlPlane | None = None
        self.is_registered: Callable[[], bool] = lambda: False
        self.is_outbox_full: Callable[[], bool] = lambda: False
        self.drain_sentence: Callable[[], str | None] = lambda: None
        self.host_blocks: Callable[[], Sequence[Block]] = tuple
        self.notices: Callable[[], Sequence[str]] = tuple
        """What an operator should look at though everything goes on."""
        self.breaker_block: Callable[[], Block | None] = lambda: None

    def blocks(self) -> list[Block]:
        """What keeps the agent from claiming tasks; empty when nothing does."""
        found = [*self.host_blocks()]
        drain = self.drain_sentence()
        if drain is not None:
            found.insert(0, Block(BlockKind.DRAINING, drain))
        breaker = self.breaker_block()
        if breaker is not None:
            found.append(breaker)
        if self.is_outbox_full():
            found.append(Block(BlockKind.OUTBOX_FULL, _OUTBOX_FULL))
        if self._url is not None and not self.is_registered():
            found.append(Block(BlockKind.UNREGISTERED, "this agent is not registered yet"))
        return found

    def blocked(self) -> list[str]:
        """Why no tasks are claimed, if so."""
        return [block.reason for block in self.blocks()]

    def holds_start(self, *, is_local: bool) -> str | None:
        """Why a task that waits here may not start, whatever is free; None if it may.

        A drain lets what was claimed run to its end: its lease is held for that.
        """
        drain = self.drain_sentence()
        if drain is not None and is_local:
            return drain
        return next((block.reason for block in self.host_blocks()), None)

    def refuses_submission(self) -> str | None:
        """Why there is no room to keep another task; None if there is."""
        return next((block.reason for block in self.host_blocks() if block.kind in STORAGE_KINDS), None)

    @property
    def reasons(self) -> list[str]:
        """What keeps the agent from being ready, each a sentence; empty when nothing does."""
        found = [block.reason for block in self.blocks() if block.kind is not BlockKind.UNREGISTERED]
        found += self.notices()
        if self.plane is not None and self.plane.contact.error is not None:
            found.append(f"control plane: {self.plane.contact.error}")
        return found

    @property
    def state(self) -> State:
        """In one word."""
        if self.drain_sentence() is not None:
            return "draining"
        return "degraded" if self.reasons else "ready"

    @property
    def contact_problem(self) -> Problem | None:
        """What is wrong with the contact to the control plane, if anything is known to be."""
        return self.plane.contact.problem if self.plane is not None else None

    def control_plane(self) -> ControlPlaneStatus:
        """How it stands with the control plane."""
        contact = self.plane.contact if self.plane is not None else None
        last_ms = contact.last_contact_ms if contact is not None else None
        return ControlPlaneStatus(
            url=self._url,
            is_connected=contact is not None and contact.is_connected,
            is_registered=self.is_registered(),
            last_contact_at=format_time(last_ms / 1000) if last_ms is not None else None,
            error=contact.error if contact is not None else None,
        )
