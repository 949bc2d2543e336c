"""Takes connections from one listening socket, within bounds, and ends those whose time is over.

Accepts by itself instead of by `loop.create_server`, so that a connection is counted before its TLS handshake, by its
peer, and gets the certificate that is in force by then. Knows no request.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import enum
import socket
import ssl
from collections.abc import Callable, Hashable
from typing import Final

import structlog
from aiohttp import web

from remotegpu_agent.api.auth import local_peer, network_peer, peer_key
from remotegpu_agent.api.connection import Connection, Patience, Verdict
from remotegpu_agent.api.envelope import failure_bytes
from remotegpu_agent.api.places import Bounds, Places
from remotegpu_schemas.errors import Code

_TLS_CLOSE_S: Final = 5.0
_ACCEPT_AGAIN_S: Final = 1.0
_LOOK_S: Final = 1.0
_LOOKS_PER_PATIENCE: Final = 4
_UNREAD_MAX_BYTES: Final = 64 * 1024
_RETRY_AFTER_S: Final = 5
_FULL_SAID_EVERY_S: Final = 60.0

log: structlog.typing.FilteringBoundLogger = structlog.get_logger(__name__)


class Ended(enum.StrEnum):
    """Why a connection was ended by us."""

    IDLE = "idle"
    SLOW_HEADERS = "slow_headers"
    SLOW_READER = "slow_reader"
    HANDSHAKE = "handshake"
    EVICTED = "evicted"
    TURNED_AWAY = "turned_away"


_ENDED_BY: Final = {
    Verdict.IDLE: Ended.IDLE,
    Verdict.SLOW_HEADERS: Ended.SLOW_HEADERS,
    Verdict.SLOW_READER: Ended.SLOW_READER,
}


class Listener:
    """One listening socket between `start` and `stop`; the connections outlive `stop` and belong to `manager`."""

    def __init__(
        self,
        sock: socket.socket,
        manager: web.Server,
        *,
        bounds: Bounds,
        patience: Patience,
        wall_s: Callable[[], float],
        tls: Callable[[], ssl.SSLContext | None],
    ) -> None:
        self._sock = sock
        self._manager = manager
        self._patience = patience
        self._wall_s = wall_s
        self._tls = tls
        self._places: Places[Connection] = Places(bounds)
        self._opening: dict[Connection, asyncio.Task[None]] = {}
        self._accepting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        shortest_s = min(patience.headers_s, patience.idle_s, patience.slow_reader_s)
        self._look_s = min(_LOOK_S, shortest_s / _LOOKS_PER_PATIENCE)
        self._silent_until = 0.0
        self.ended: collections.Counter[Ended] = collections.Counter()
        """Connections that were not ended by their client nor by an ordinary close, by reason."""

    @property
    def connection_count(self) -> int:
        """Connections that are open now, those in a handshake too."""
        return len(self._places.holders)

    def start(self) -> None:
        """Begin to accept."""
        self._sock.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(), name="api-accept")

    async def stop(self) -> None:
        """Accept no more, and end what is still in its handshake. Safe to repeat."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        opening = list(self._opening.values())
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)

    def close(self) -> None:
        """Look at the connections no more: they are closed. Safe to repeat."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, address = await loop.sock_accept(self._sock)
            except ConnectionError:
                continue  # it went before it was accepted
            except OSError as error:
                # No descriptors or no memory (accept(2)): what is open is served on, and room comes back.
                log.error("api_accept_failed", error=error.strerror or str(error))
                await asyncio.sleep(_ACCEPT_AGAIN_S)
                continue
            try:
                self._admit(sock, _peer_of(sock, address))
            except OSError:
                sock.close()  # the peer is gone already
            except Exception:
                # The top of the loop over connections: one that fails must not keep the others out.
                log.exception("api_connection_not_admitted")
                sock.close()
            await asyncio.sleep(0)  # `sock_accept` does not wait while there is one: the rest of the agent goes on

    def _admit(self, sock: socket.socket, peer: Hashable) -> None:
        has_place, loser = self._places.take(peer)
        if loser is not None:
            self._evict(loser)
        if not has_place:
            self._turn_away(sock, peer)
            return
        connection = Connection(
            self._manager,
            loop=asyncio.get_running_loop(),
            patience=self._patience,
            wall_s=self._wall_s,
            on_lost=self._places.discard,
        )
        self._places.add(connection, peer)
        task = asyncio.create_task(self._open(sock, connection))
        self._opening[connection] = task
        task.add_done_callback(lambda _: self._opening.pop(connection, None))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._look_s, self._look)

    async def _open(self, sock: socket.socket, connection: Connection) -> None:
        loop, tls = asyncio.get_running_loop(), self._tls()
        try:
            if tls is None:
                await loop.connect_accepted_socket(lambda: connection, sock)
            else:
                await loop.connect_accepted_socket(
                    lambda: connection,
                    sock,
                    ssl=tls,
                    ssl_handshake_timeout=self._patience.headers_s,
                    ssl_shutdown_timeout=_TLS_CLOSE_S,
                )
        except OSError as error:  # ssl.SSLError and TimeoutError are OSErrors
            self._places.discard(connection)
            sock.close()
            self.ended[Ended.HANDSHAKE] += 1
            log.debug("api_handshake_failed", error=str(error))
        except asyncio.CancelledError:
            self._places.discard(connection)
            sock.close()
            raise

    def _look(self) -> None:
        """End whose time is over; again in a moment, as long as there is anybody."""
        now = asyncio.get_running_loop().time()
        for connection in self._places.holders:
            try:
                verdict = connection.look(now)
                if verdict is not Verdict.STAYS:
                    self.ended[_ENDED_BY[verdict]] += 1
                    connection.end(verdict)
            except Exception:
                # The top of the loop of deadlines: one connection that fails must not end those of the others.
                log.exception("api_connection_not_looked_at")
                connection.abort()
        has_any = bool(self._places.holders)
        self._timer = asyncio.get_running_loop().call_later(self._look_s, self._look) if has_any else None

    def _evict(self, connection: Connection) -> None:
        self.ended[Ended.EVICTED] += 1
        opening = self._opening.get(connection)
        if opening is not None:
            opening.cancel()
        connection.abort()

    def _turn_away(self, sock: socket.socket, peer: Hashable) -> None:
        """Every place is busy: say so, as far as that can be said without waiting for anybody."""
        self.ended[Ended.TURNED_AWAY] += 1
        now = asyncio.get_running_loop().time()
        if now >= self._silent_until:
            self._silent_until = now + _FULL_SAID_EVERY_S
            log.warning("api_full", peer=str(peer), connections=self.connection_count, every_s=_FULL_SAID_EVERY_S)
        with contextlib.closing(sock), contextlib.suppress(OSError):
            sock.setblocking(False)
            if self._tls() is None:
                sock.send(
                    failure_bytes(
                        Code.UNAVAILABLE,
                        "as many connections as there may be are busy; try again",
                        self._wall_s(),
                        retry_after_s=_RETRY_AFTER_S,
                    )
                )
                sock.shutdown(socket.SHUT_WR)
                # What came already and is not read makes the kernel throw the answer away (reset instead of end).
                sock.recv(_UNREAD_MAX_BYTES)


def _peer_of(sock: socket.socket, address: tuple[str, int]) -> Hashable:
    if sock.family is socket.AF_UNIX:
        return local_peer(sock).uid
    return peer_key(network_peer(address[0]))
