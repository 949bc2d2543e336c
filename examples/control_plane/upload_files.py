"""The directory that uploads go to. A file's name there is its upload's id: nothing that a peer chose.

Several instances of one plane need the same directory. Files appear whole: they are written beside their place first.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, Final, Protocol

from control_plane.settings import CannotServe
from remotegpu_schemas.errors import Code, Refused

_PARTIAL: Final = ".partial"
_PARTIAL_KEPT_S: Final = 86_400.0
"""What is older was left behind by a plane that died; a younger one may be another instance's."""
_WRITE_BYTES: Final = 1024 * 1024


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


class UploadDirectory:
    """An open directory; made by `open_directory`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def path_of(self, upload_id: str) -> Path:
        """Where the file is once it has come."""
        return self._path / upload_id

    async def receive(self, upload_id: str, size_bytes: int, sha256: str, chunks: AsyncIterator[bytes]) -> None:
        """Store what comes, if it is of this size and digest; a file that is there already is replaced by its like.

        Raises Refused: 30018 above the size, 30005 for another content, 30027 for a full disk.
        """
        partial = self._path / _PARTIAL / f"{upload_id}.{secrets.token_hex(8)}"
        try:
            await self._write(partial, size_bytes, sha256, chunks)
            await asyncio.to_thread(_move, partial, self.path_of(upload_id))
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise Refused(Code.HOST_FULL, "the control plane's disk for uploads is full") from error
            raise
        finally:
            await asyncio.to_thread(partial.unlink, missing_ok=True)

    async def remove(self, upload_id: str) -> None:
        """Remove the file, if there is one."""
        await asyncio.to_thread(self.path_of(upload_id).unlink, missing_ok=True)

    async def _write(self, partial: Path, size_bytes: int, sha256: str, chunks: AsyncIterator[bytes]) -> None:
        digest: _Digest = hashlib.sha256()
        received = 0
        waiting = bytearray()
        file = await asyncio.to_thread(partial.open, "xb")
        try:
            async for chunk in chunks:
                received += len(chunk)
                if received > size_bytes:
                    raise Refused(Code.PAYLOAD_TOO_LARGE, f"more than the {size_bytes} bytes that were announced")
                waiting += chunk
                if len(waiting) >= _WRITE_BYTES:
                    await asyncio.to_thread(_append, file, digest, bytes(waiting))
                    waiting.clear()
            await asyncio.to_thread(_append, file, digest, bytes(waiting))
            if received != size_bytes:
                raise Refused(Code.INVALID_PARAMETERS, f"{received} bytes instead of the {size_bytes} announced")
            if digest.hexdigest() != sha256:
                raise Refused(Code.INVALID_PARAMETERS, "the content has another SHA-256 than the one announced")
            await asyncio.to_thread(_to_disk, file)
        finally:
            await asyncio.to_thread(file.close)


def open_directory(path: Path, now_s: float) -> UploadDirectory:
    """Make the directory if it is missing, and clear what dead planes left. Raises CannotServe with what to do."""
    try:
        (path / _PARTIAL).mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in (path / _PARTIAL).iterdir():
            with contextlib.suppress(FileNotFoundError):
                if now_s - left.stat().st_mtime > _PARTIAL_KEPT_S:
                    left.unlink()
    except OSError as error:
        raise CannotServe(
            f"the directory for uploads {path} cannot be used: {error.strerror}; name one that can be written"
        ) from error
    return UploadDirectory(path)


def _move(partial: Path, path: Path) -> None:
    partial.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)  # the name too must be there after a power cut, since the store is told so
    finally:
        os.close(directory)


def _append(file: BinaryIO, digest: _Digest, content: bytes) -> None:
    digest.update(content)
    file.write(content)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
