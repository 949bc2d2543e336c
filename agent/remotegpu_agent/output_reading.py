"""Reads the output of runs for people: pieces by byte offset, and pieces as they come. Decides nothing about runs.

Offsets are bytes of the stream; text is UTF-8 with what is none replaced, and a character is never cut in two.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from remotegpu_agent.directory_watch import DirectoryWatcher
from remotegpu_agent.operations import Stream
from remotegpu_schemas import limits
from remotegpu_schemas.api import LogChunk
from remotegpu_sidecar.output import read_output

_FOLLOW_MAX_BYTES: Final = 256 * limits.KIB
_UNWATCHED_LOOK_S: Final = 1.0


@dataclass(frozen=True)
class RunOutput:
    """The output of one run: where it lies, and a way to ask whether more may come."""

    directory: Path
    run_no: int
    has_ended: Callable[[], Awaitable[bool]]


async def read_piece(output: RunOutput, stream: Stream, offset: int, limit_bytes: int) -> LogChunk:
    """What is there now from `offset` on (negative: from the end). Empty for a run without output."""
    # Asked first: what is written between the two looks must not be taken for the whole.
    has_ended = await output.has_ended()
    first, data, end = await asyncio.to_thread(_read, output.directory, stream, offset, limit_bytes)
    is_last = has_ended and first + len(data) >= end
    text, used = decode(data, is_last=is_last)
    if data and used == 0 and (len(data) == limit_bytes or first + len(data) < end):
        # What would complete the character was dropped, or the reader's limit is shorter than it.
        text, used = decode(data, is_last=True)
    return LogChunk(
        stream=stream,
        run_no=output.run_no,
        offset=first,
        next_offset=first + used,
        text=text,
        is_end=is_last,
    )


async def follow(
    output: RunOutput,
    stream: Stream,
    offset: int,
    *,
    watcher: DirectoryWatcher,
    ended: Callable[[], asyncio.Future[None]],
) -> AsyncGenerator[LogChunk, None]:
    """Pieces from `offset` on as they are written, the last one with `is_end`.

    `ended` gives a future that is done when the run may have ended.
    """
    changed = asyncio.Event()
    with watcher.listen(output.directory, changed) as is_told:
        while True:
            changed.clear()
            may_have_ended = ended()
            try:
                piece = await read_piece(output, stream, offset, _FOLLOW_MAX_BYTES)
                if piece.text or piece.is_end:
                    yield piece
                if piece.is_end:
                    return
                if not piece.text:
                    await _either(changed, may_have_ended, None if is_told else _UNWATCHED_LOOK_S)
            finally:
                may_have_ended.cancel()
            offset = piece.next_offset


def decode(data: bytes, *, is_last: bool) -> tuple[str, int]:
    """Text of the bytes and how many of them it stands for; a character that is cut off at the end is left for later.

    With `is_last` nothing is left. NUL becomes U+FFFD as well.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data, is_last)
    left = len(decoder.getstate()[0])
    return text.replace("\0", "\ufffd"), len(data) - left


def _read(directory: Path, stream: Stream, offset: int, limit_bytes: int) -> tuple[int, bytes, int]:
    try:
        return read_output(directory, stream, offset, limit_bytes)
    except FileNotFoundError:  # the run has not been launched yet, or its output was removed
        return max(offset, 0), b"", 0


async def _either(changed: asyncio.Event, ended: asyncio.Future[None], timeout_s: float | None) -> None:
    change = asyncio.ensure_future(changed.wait())
    try:
        await asyncio.wait((change, ended), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        change.cancel()
