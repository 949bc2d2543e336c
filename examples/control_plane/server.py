"""The plane's life: open the database, listen, stop. Composes the parts."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator
from typing import Final

from aiohttp import web

from control_plane.admin_api import AdminApi
from control_plane.agent_api import AgentApi
from control_plane.compat import Compat
from control_plane.dialect import Strict
from control_plane.faults import Faults
from control_plane.service import Service
from control_plane.settings import BODY_MAX_BYTES, STOP_PATIENCE_S, CannotServe, Settings
from control_plane.upload_api import UploadApi

_BACKLOG: Final = 512


def new_id() -> str:
    """An id of a task or an attempt that nobody chose."""
    return secrets.token_hex(12)


class Plane:
    """One control plane between `start` and `stop`. `faults` is what tests order of it, and outlives a restart."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.faults = Faults()
        self.port = settings.port
        self._service: Service | None = None
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Where it listens, without a path."""
        host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
        return f"http://{host}:{self.port}"

    @property
    def service(self) -> Service:
        """What the plane does, for callers in the same process. Raises RuntimeError unless it is started."""
        if self._service is None:
            raise RuntimeError("the control plane is not started")
        return self._service

    async def start(self) -> None:
        """Serve; after a `stop` again on the same port. Raises CannotServe, with nothing left open."""
        self._service = await Service.open(self.settings, new_id)
        try:
            await self._listen(self._service)
        except OSError as error:
            await self.stop()
            reason = error.strerror or str(error)
            raise CannotServe(
                f"cannot listen on {self.settings.host}:{self.port}: {reason}; choose another address or port"
            ) from error
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Answer what waits, close connections and the database. Safe to call twice."""
        service, self._service = self._service, None
        runner, self._runner = self._runner, None
        if service is not None:
            service.stop_waiting()
        self.faults.release_held()
        if runner is not None:
            await runner.cleanup()
        if service is not None:
            await service.close()

    def clock_moved(self) -> None:
        """`settings.now` was moved by hand: leases may be over."""
        self.service.reaper.look_now()

    async def _listen(self, service: Service) -> None:
        app = web.Application(middlewares=[self.faults.middleware], client_max_size=BODY_MAX_BYTES)
        uploads = UploadApi(service.uploads, self.settings.public_url, new_id) if service.uploads else None
        dialect = Compat(self.settings) if self.settings.compat else Strict(offers_uploads=uploads is not None)
        AgentApi(service, dialect, new_id, uploads).add_routes(app)
        AdminApi(service, new_id, uploads).add_routes(app)
        if uploads is not None:
            uploads.add_routes(app)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_PATIENCE_S)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.settings.host, self.port, backlog=_BACKLOG, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]


@contextlib.asynccontextmanager
async def serve(settings: Settings) -> AsyncGenerator[Plane]:
    """A started plane for the time of a `with`. Raises CannotServe."""
    plane = Plane(settings)
    await plane.start()
    try:
        yield plane
    finally:
        await plane.stop()
