"""The calls about uploads: an agent asks for a URL, whoever has it puts the file there, operators get it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Final
from urllib.parse import quote

from aiohttp import ClientError, web
from pydantic import AfterValidator, Field

from control_plane.answers import Bare
from control_plane.dialect import Strict
from control_plane.endpoints import endpoint
from control_plane.operator_calls import Route, actor_of, count_of, with_times
from control_plane.requests import AttemptBody, Body, Text, parse
from control_plane.settings import UPLOAD_STALL_S
from control_plane.store.fencing import Call
from control_plane.store.uploads import FILE_NAME_CHARS, Wanted
from control_plane.uploads import Uploads
from remotegpu_schemas.wire import JsonObject

_PATH: Final = "/api/v1/uploads/{upload_id}"
_OCTETS: Final = "application/octet-stream"


def _file_name(value: str) -> str:
    if value in {".", ".."} or not value.isprintable() or "/" in value or "\\" in value:
        raise ValueError("must be the name of a file: no path, no control characters")
    return value


_FileName = Annotated[Text, Field(min_length=1, max_length=FILE_NAME_CHARS), AfterValidator(_file_name)]


class UploadUrlBody(AttemptBody):
    """POST /tasks/{id}/result/upload-url."""

    name: _FileName
    size_bytes: Annotated[int, Field(ge=0, lt=2**53)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @property
    def wanted(self) -> Wanted:
        """As the store takes it."""
        return Wanted(self.name, self.size_bytes, self.sha256)


class _FileBody(Body):
    name: _FileName


class UploadApi:
    """The handlers. `public_url` is where agents reach the plane; None: where the asking agent reached it."""

    def __init__(self, uploads: Uploads, public_url: str | None, new_id: Callable[[], str]) -> None:
        self._uploads = uploads
        self._public_url = public_url
        self._new_id = new_id

    def add_routes(self, app: web.Application) -> None:
        """Add the call that needs no token: its URL is the right to it."""
        app.router.add_put(_PATH, endpoint(Strict(), self._new_id, self._put), name="upload")

    def routes(self) -> list[Route]:
        """An operator's calls."""
        path = "/tasks/{task_id}/artifacts"
        return [
            Route("GET", path, "admin-artifacts", self._list),
            Route("GET", path + "/{attempt_id}/{name}", "admin-artifact", self._get),
            Route("DELETE", path + "/{attempt_id}/{name}", "admin-artifact-remove", self._remove),
        ]

    async def url_for(self, request: web.Request, about: Call, body: UploadUrlBody) -> JsonObject:
        """Answer an agent that wants to upload a file."""
        ticket = await self._uploads.ask(about, body.wanted)
        base = (self._public_url or str(request.url.origin())).rstrip("/")
        path = _PATH.format(upload_id=ticket.upload.upload_id)
        return {
            "url": f"{base}{path}?expires={ticket.expires_s}&signature={ticket.signature}",
            "method": "PUT",
            "headers": {"Content-Type": _OCTETS},
            "key": ticket.upload.key,
        }

    async def _put(self, request: web.Request) -> JsonObject:
        expires_s = count_of(request, "expires", 0)
        signature = request.query.get("signature", "")
        upload = await self._uploads.receive(request.match_info["upload_id"], expires_s, signature, _chunks(request))
        return {"key": upload.key, "size_bytes": upload.size_bytes, "sha256": upload.sha256}

    async def _list(self, request: web.Request) -> JsonObject:
        found = await self._uploads.of_task(request.match_info["task_id"])
        return {"artifacts": [with_times(upload) for upload in found]}

    async def _get(self, request: web.Request) -> web.StreamResponse:
        task_id, attempt_id, name = _names(request)
        path = await self._uploads.path_of(task_id, attempt_id, name)
        headers = {
            "Content-Type": _OCTETS,
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}",
            "X-Content-Type-Options": "nosniff",
        }
        return web.FileResponse(path, headers=headers)

    async def _remove(self, request: web.Request) -> JsonObject:
        task_id, attempt_id, name = _names(request)
        await self._uploads.remove(task_id, attempt_id, name, actor_of(request))
        return {"task_id": task_id, "attempt_id": attempt_id, "name": name}


def _names(request: web.Request) -> tuple[str, str, str]:
    names = request.match_info
    return names["task_id"], names["attempt_id"], parse(_FileBody, {"name": names["name"]}).name


async def _chunks(request: web.Request) -> AsyncIterator[bytes]:
    """The body as it comes. Raises Bare when it stops coming."""
    try:
        while True:
            async with asyncio.timeout(UPLOAD_STALL_S):
                chunk = await request.content.readany()
            if not chunk:
                return
            yield chunk
    except TimeoutError:
        raise Bare(408, f"nothing came for {UPLOAD_STALL_S:g} s") from None
    except (ClientError, ConnectionError, web.RequestPayloadError):
        raise Bare(400, "the upload broke off") from None
