"""The server's life: open the sockets, serve, and stop quickly with whatever is open. Knows no operation."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web

from remotegpu_agent.api import middlewares
from remotegpu_agent.api.auth import Rules
from remotegpu_agent.api.connection import Patience
from remotegpu_agent.api.context import CONTEXT, Context, Followers, Route
from remotegpu_agent.api.credentials import Credentials
from remotegpu_agent.api.envelope import HEADERS
from remotegpu_agent.api.failures import Failures
from remotegpu_agent.api.listener import Ended, Listener
from remotegpu_agent.api.origins import own_names
from remotegpu_agent.api.routes import ROUTES
from remotegpu_agent.api.settings import BASE_PATH, STOP_PATIENCE_S, ApiSettings, Endpoints
from remotegpu_agent.api.sockets import group_id_of, open_tcp, open_unix, parse_listen, remove_unix, url_of
from remotegpu_agent.api.tokens import make_token_file
from remotegpu_agent.audit import AuditLog
from remotegpu_agent.operations import ApiFigures, Operations
from remotegpu_schemas import limits
from remotegpu_schemas.errors import Misconfigured

DEFAULT_TOKENS_FILE: Final = "api-token"

log: structlog.typing.FilteringBoundLogger = structlog.get_logger(__name__)


class ApiServer:
    """Serves `operations` on TCP and on the Unix socket between `start` and `stop`."""

    def __init__(
        self,
        operations: Operations,
        settings: ApiSettings,
        audit: AuditLog,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._operations = operations
        self._settings = settings
        self._audit = audit
        self._now = now
        self._stopping = asyncio.Event()
        self._pending: set[asyncio.Task[web.StreamResponse]] = set()
        self._followers = Followers(settings.followers_max)
        self._failures = Failures(
            burst=settings.auth_failures_burst,
            per_s=limits.API_AUTH_FAILURES_PER_S,
            places=limits.API_AUTH_FAILURE_ADDRESSES_MAX,
        )
        self._credentials: Credentials | None = None
        self._watching: asyncio.Task[None] | None = None
        self._runner: web.AppRunner | None = None
        self._listeners: list[Listener] = []
        self._sockets: list[socket.socket] = []
        self._socket_inode: int | None = None
        self._endpoints = Endpoints(None, None)

    @property
    def endpoints(self) -> Endpoints:
        """Where it really listens; empty before `start`."""
        return self._endpoints

    @property
    def follower_count(self) -> int:
        """Clients that follow output now."""
        return self._followers.count

    @property
    def figures(self) -> ApiFigures:
        """How many there are, and what bounds and deadlines have ended so far."""
        refused = {str(reason): 0 for reason in Ended} | {"auth_failures": self._failures.refused_count}
        for listener in self._listeners:
            for reason, count in listener.ended.items():
                refused[reason] += count
        return ApiFigures(sum(listener.connection_count for listener in self._listeners), refused)

    @property
    def problems(self) -> list[str]:
        """What is wrong with files that were changed and so not read again; each a sentence."""
        return self._credentials.problems if self._credentials is not None else []

    async def start(self) -> Endpoints:
        """Open the sockets, make the token file if it is due, and serve.

        Raises Misconfigured, with nothing left open.
        """
        try:
            self._credentials = self._load_credentials()
            self._endpoints = self._open_sockets()
            await self._serve(self._credentials)
        except BaseException:
            await self.stop()
            raise
        log.info(
            "api_listening", url=self._endpoints.url, socket=self._endpoints.socket and str(self._endpoints.socket)
        )
        return self._endpoints

    async def stop(self) -> None:
        """Stop serving: long polls and streams end at once, the rest gets a moment. Safe to call twice."""
        self._stopping.set()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        for listener in self._listeners:
            await listener.stop()
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await self._end_changes()
            await runner.cleanup()
            await self._end_changes()
        for listener in self._listeners:
            listener.close()
        if self._settings.socket is not None and self._socket_inode is not None:
            remove_unix(self._settings.socket, self._socket_inode)
            self._socket_inode = None

    async def _end_changes(self) -> None:
        if self._pending:
            await asyncio.wait(self._pending, timeout=STOP_PATIENCE_S)
        for change in self._pending:
            change.cancel()
        await asyncio.gather(*self._pending, return_exceptions=True)

    def _load_credentials(self) -> Credentials:
        path = self._settings.tokens_file
        if path is None:
            path = self._settings.state_dir / DEFAULT_TOKENS_FILE
            make_token_file(path)
        return Credentials(path, self._settings.tls if self._settings.listen is not None else None)

    def _open_sockets(self) -> Endpoints:
        url: str | None = None
        if self._settings.listen is not None:
            address, port = parse_listen(self._settings.listen)
            if not address.is_loopback and self._settings.tokens_file is None:
                raise Misconfigured(
                    f"api.listen: {self._settings.listen} is reachable from other hosts; name the accepted tokens in "
                    "api.tokens_file, or listen on 127.0.0.1"
                )
            self._sockets.append(open_tcp(address, port))
            url = url_of(self._sockets[-1], is_tls=self._settings.tls is not None)
        path: Path | None = self._settings.socket
        if path is not None:
            self._sockets.append(open_unix(path, group_id_of(self._settings.socket_group)))
            self._socket_inode = path.lstat().st_ino
        return Endpoints(url, path)

    async def _serve(self, credentials: Credentials) -> None:
        settings = self._settings
        self._runner = web.AppRunner(
            self._application(credentials), handler_cancellation=True, shutdown_timeout=STOP_PATIENCE_S
        )
        await self._runner.setup()
        assert self._runner.server is not None
        for sock in self._sockets:
            is_unix = sock.family is socket.AF_UNIX
            listener = Listener(
                sock,
                self._runner.server,
                bounds=settings.unix_bounds if is_unix else settings.tcp_bounds,
                patience=Patience(settings.headers_deadline_s, settings.idle_s, settings.slow_reader_s),
                wall_s=self._now,
                tls=_no_tls if is_unix else lambda: credentials.tls,
            )
            listener.start()
            self._listeners.append(listener)
        self._watching = asyncio.create_task(credentials.watch(settings.look_at_files_s), name="api-credentials")

    def _application(self, credentials: Credentials) -> web.Application:
        app = web.Application(
            middlewares=[middlewares.outlive_caller, middlewares.answer, middlewares.guard, middlewares.read_body],
            client_max_size=self._settings.body_max_bytes,
        )
        routes: dict[object, Route] = {
            app.router.add_route(route.method, path, route.handler): route
            for route in ROUTES
            for path in (BASE_PATH + route.path, route.root_path)
            if path is not None
        }
        app[CONTEXT] = Context(
            operations=self._operations,
            settings=self._settings,
            rules=Rules(
                tokens=credentials,
                own_uid=os.geteuid(),
                group_id=group_id_of(self._settings.socket_group),
                legacy_callers=self._settings.legacy_callers,
            ),
            host_names=own_names(socket.gethostname(), self._settings.allowed_hosts),
            audit=self._audit,
            now=self._now,
            own_pid=os.getpid(),
            followers=self._followers,
            failures=self._failures,
            stopping=self._stopping,
            routes=routes,
            pending=self._pending,
        )
        app.on_response_prepare.append(_set_headers)
        return app


async def _set_headers(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)


def _no_tls() -> None:
    """The Unix socket stays on this host."""
