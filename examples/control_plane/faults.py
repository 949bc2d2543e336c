"""Faults that a test orders, by the name of a call: lost connections, delays, made-up answers.

Names are those of the routes: register, heartbeat, claim, start, renew, progress, complete, release,
upload-url, upload.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, assert_never

from aiohttp import web
from aiohttp.typedefs import Handler

from control_plane.bell import Bell


@dataclass(frozen=True)
class DropBefore:
    """The connection goes before the call is handled: nothing happened."""


@dataclass(frozen=True)
class DropAfter:
    """The connection goes after the call was handled: its answer is lost."""


@dataclass(frozen=True)
class Delay:
    """The call is handled so many seconds later."""

    seconds: float


@dataclass(frozen=True)
class Hold:
    """The call is handled once `release` is set; `reached` says that it has come."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True)
class Respond:
    """This answer instead of handling the call; the body may be any bytes."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


Fault: TypeAlias = DropBefore | DropAfter | Delay | Hold | Respond


def hiccup(status: Literal[404, 409, 410], *, in_body: bool = False) -> Respond:
    """What deployed planes answer when their database hiccups: the bare status, or HTTP 200 with it as body code."""
    body = json.dumps({"code": status, "msg": "record not found", "data": None}).encode()
    return Respond(200 if in_body else status, body, {"Content-Type": "application/json"})


class Faults:
    """What is ordered and not used up yet. `calls` counts the calls by name, faulty or not.

    `most_at_once` is the greatest number of them that were under way together since `watch_load`.
    """

    def __init__(self) -> None:
        self._ordered: dict[str, deque[Fault]] = {}
        self._lasting: dict[str, Fault] = {}
        self._holds: list[Hold] = []
        self._called = Bell()
        self.calls: Counter[str] = Counter()
        self._under_way = 0
        self.most_at_once = 0

    def order(self, call: str, *faults: Fault, times: int = 1) -> None:
        """The next calls of this name meet these faults, one each, the whole row `times` over."""
        self._ordered.setdefault(call, deque()).extend(faults * times)
        self._remember(faults)

    def order_always(self, call: str, fault: Fault) -> None:
        """Every call of this name meets the fault until `clear`; what is ordered besides comes first."""
        self._lasting[call] = fault
        self._remember((fault,))

    def clear(self, call: str | None = None) -> None:
        """Forget the faults of this name, or all; what is held goes on."""
        for ordered in (self._ordered, self._lasting):
            for name in [call] if call is not None else list(ordered):
                ordered.pop(name, None)
        self.release_held()

    def release_held(self) -> None:
        """Every call that is held goes on."""
        for hold in self._holds:
            hold.release.set()
        self._holds.clear()

    async def wait_calls(self, call: str, count: int, timeout_s: float) -> None:
        """Return when the plane has seen `count` calls of this name since its start. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while True:
                rung = self._called.listen()
                if self.calls[call] >= count:
                    return
                await rung.wait()

    def watch_load(self) -> None:
        """Count the calls that are under way together from now on."""
        self.most_at_once = self._under_way

    def next_fault(self, call: str) -> Fault | None:
        """Count a call, and take the fault that it meets."""
        self.calls[call] += 1
        self._called.ring()
        ordered = self._ordered.get(call)
        return ordered.popleft() if ordered else self._lasting.get(call)

    def _remember(self, faults: tuple[Fault, ...]) -> None:
        self._holds.extend(fault for fault in faults if isinstance(fault, Hold))

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Outermost: what is ordered happens to the call."""
        name = request.match_info.route.name
        if name is None:
            return await handler(request)
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            return await self._meet(self.next_fault(name), request, handler)
        finally:
            self._under_way -= 1

    async def _meet(self, fault: Fault | None, request: web.Request, handler: Handler) -> web.StreamResponse:
        match fault:
            case None:
                return await handler(request)
            case DropBefore():
                return _drop(request)
            case DropAfter():
                await handler(request)
                return _drop(request)
            case Delay(seconds):
                await asyncio.sleep(seconds)
                return await handler(request)
            case Hold():
                fault.reached.set()
                await fault.release.wait()
                return await handler(request)
            case Respond(status, body, headers):
                return web.Response(status=status, body=body, headers=headers)
            case _:
                assert_never(fault)


def _drop(request: web.Request) -> web.Response:
    """Cut the connection; the response goes nowhere."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()
