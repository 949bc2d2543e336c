"""Uploads behind both APIs: signed URLs for agents, files for operators. Whoever has a URL may store that one file."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from control_plane.answers import Bare
from control_plane.settings import UPLOADS_AT_ONCE_MAX
from control_plane.store import audit, uploads
from control_plane.store.audit import Actor
from control_plane.store.fencing import Call
from control_plane.store.outcomes import Refusal
from control_plane.store.uploads import Bounds, Upload, Wanted
from control_plane.upload_files import UploadDirectory
from control_plane.work import Work
from remotegpu_schemas.errors import Code, Refused


@dataclass(frozen=True)
class Ticket:
    """The right to store one file until a time: what a URL is made of. `expires_s` is seconds since 1970."""

    upload: Upload
    expires_s: int
    signature: str


class Uploads:
    """The uploads of one open plane."""

    def __init__(self, work: Work, directory: UploadDirectory) -> None:
        self._work = work
        self._directory = directory
        self._coming = 0
        # Every instance has the same operator's token, and so the same key; a new token makes old URLs void.
        self._key = hmac.digest(work.settings.admin_token.encode(), b"remotegpu upload urls 1", "sha256")

    async def ask(self, call: Call, wanted: Wanted) -> Ticket:
        """Where the attempt's file goes. A repeat names the same file, with a URL that is good for as long again."""
        settings = self._work.settings
        if wanted.size_bytes > settings.upload_max_bytes:
            raise Refused(
                Code.INVALID_PARAMETERS, f"size_bytes: {wanted.size_bytes} is above {settings.upload_max_bytes}"
            )
        bounds = Bounds(settings.uploads_per_attempt_max, settings.uploads_total_max_bytes)
        upload_id, now_ms = self._work.new_id(), self._work.now_ms
        upload = await self._work.ask(lambda db: uploads.ask(db, call, wanted, bounds, upload_id, now_ms))
        expires_s = now_ms // 1000 + int(settings.upload_url_ttl_s)
        return Ticket(upload, expires_s, self._signature(upload.upload_id, expires_s))

    async def receive(self, upload_id: str, expires_s: int, signature: str, chunks: AsyncIterator[bytes]) -> Upload:
        """Store the bytes of a file. Raises Bare (403) for a URL that is not ours or not good any more, and Refused."""
        if not hmac.compare_digest(
            self._signature(upload_id, expires_s).encode(), signature.encode("utf-8", "replace")
        ):
            raise Bare(403, "this URL was not given out by this control plane")
        if expires_s * 1000 <= self._work.now_ms:
            raise Bare(403, "this URL has expired; ask for a new one")
        upload = await self._work.run(lambda db: uploads.get(db, upload_id))
        if upload is None:
            raise Bare(404, "this file was removed")
        if self._coming >= UPLOADS_AT_ONCE_MAX:
            raise Refused(Code.UNAVAILABLE, f"{self._coming} uploads are coming in already; try again later")
        self._coming += 1
        try:
            await self._directory.receive(upload_id, upload.size_bytes, upload.sha256, chunks)
        finally:
            self._coming -= 1
        now_ms = self._work.now_ms
        if not await self._work.run(lambda db: uploads.mark_stored(db, upload_id, now_ms)):
            await self._directory.remove(upload_id)
            raise Bare(404, "this file was removed")
        return upload

    async def of_task(self, task_id: str) -> list[dict[str, Any]]:
        """The files of a task, as stored."""
        return await self._work.run(lambda db: uploads.of_task(db, task_id))

    async def path_of(self, task_id: str, attempt_id: str, name: str) -> Path:
        """Where a file that has come is. Raises Refused (30004)."""
        upload = await self._work.run(lambda db: uploads.stored(db, task_id, attempt_id, name))
        if upload is None:
            raise _not_there(task_id, attempt_id, name)
        return self._directory.path_of(upload.upload_id)

    async def remove(self, task_id: str, attempt_id: str, name: str, by: Actor) -> None:
        """Remove a file, come or not. Raises Refused (30004)."""
        now_ms = self._work.now_ms

        def unit(db: Connection) -> str | Refusal:
            upload_id = uploads.remove(db, task_id, attempt_id, name)
            if upload_id is None:
                return Refusal(Code.TASK_NOT_FOUND, str(_not_there(task_id, attempt_id, name)))
            audit.record(db, now_ms, by, "artifact.remove", task_id, f"{name} of attempt {attempt_id}")
            return upload_id

        await self._directory.remove(await self._work.ask(unit))

    def _signature(self, upload_id: str, expires_s: int) -> str:
        told = f"PUT\n{upload_id}\n{expires_s}".encode("utf-8", "replace")
        return hmac.new(self._key, told, hashlib.sha256).hexdigest()


def _not_there(task_id: str, attempt_id: str, name: str) -> Refused:
    return Refused(Code.TASK_NOT_FOUND, f"attempt {attempt_id} of task {task_id} has no file {name}")
