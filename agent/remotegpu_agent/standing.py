"""How the agent stands: ready, draining or degraded, and why. One answer for heartbeats, claims, API and people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from remotegpu_agent.control_plane import ControlPlane
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
        self.is_draining = False

    @property
    def reasons(self) -> list[str]:
        """What keeps the agent from being ready, each a sentence; empty when nothing does."""
        found = []
        if self.is_draining:
            found.append("draining: the control plane asked for no more tasks on this host")
        if self.is_outbox_full():
            found.append(_OUTBOX_FULL)
        if self.plane is not None and self.plane.contact.error is not None:
            found.append(f"control plane: {self.plane.contact.error}")
        return found

    @property
    def state(self) -> State:
        """In one word."""
        if self.is_draining:
            return "draining"
        return "degraded" if self.reasons else "ready"

    def blocked(self) -> list[str]:
        """Why no tasks are claimed, if so."""
        found = ["this agent is draining"] if self.is_draining else []
        if not self.is_registered():
            found.append("this agent is not registered yet")
        if self.is_outbox_full():
            found.append(_OUTBOX_FULL)
        return found

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
