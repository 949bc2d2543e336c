"""Output for people: no character is cut in two, no byte is lost but those that were dropped."""

from __future__ import annotations

import asyncio
import itertools
import os
import tempfile
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_agent.directory_watch import DirectoryWatcher
from remotegpu_agent.output_reading import RunOutput, decode, follow, read_piece
from remotegpu_agent.supervise import Loops
from remotegpu_schemas.api import LogChunk
from remotegpu_sidecar.output import OutputWriter, segment_name
from tests.waiting import DEADLINE_S

TEXTS = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(
        st.sampled_from([b"a", b"\xc3\xbc", b"\xe2\x82\xac", b"\xf0\x9f\x98\x80", b"\xff", b"\0"]), max_size=20
    ).map(b"".join),
)


@given(TEXTS, st.lists(st.integers(0, 60), max_size=8))
def test_any_split_of_any_bytes_gives_the_same_text(data: bytes, cuts: list[int]) -> None:
    """Whoever goes on at `used` reads what decoding at once gives."""
    text, position = "", 0
    for cut in sorted({min(cut, len(data)) for cut in cuts} | {len(data)}):
        is_last = cut == len(data)
        part, used = decode(data[position:cut], is_last=is_last)
        text, position = text + part, position + used
        assert cut - position < 4
    assert text == data.decode("utf-8", "replace").replace("\0", "�")
    assert position == len(data)


@given(TEXTS, st.integers(1, 7))
def test_pieces_of_any_size_are_the_whole(data: bytes, limit: int) -> None:
    """Reading on at `next_offset` ends, skips nothing, and is the text as it is, once a character fits the limit."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if data:
            (directory / segment_name("stdout", 0)).write_bytes(data)
        chunks = asyncio.run(_read_all(directory, limit))
    assert [chunk.offset for chunk in chunks] == [0, *(chunk.next_offset for chunk in chunks[:-1])]
    assert chunks[-1].next_offset == len(data)
    if limit >= 4:
        assert "".join(chunk.text for chunk in chunks) == data.decode("utf-8", "replace").replace("\0", "�")


async def _read_all(directory: Path, limit: int) -> list[LogChunk]:
    chunks: list[LogChunk] = []
    while not chunks or not chunks[-1].is_end:
        chunks.append(await read_piece(_output(directory), "stdout", chunks[-1].next_offset if chunks else 0, limit))
        assert len(chunks) < 100
    return chunks


def _output(directory: Path, *, has_ended: bool = True) -> RunOutput:
    async def ended() -> bool:
        return has_ended

    return RunOutput(directory, 1, ended)


async def test_a_character_that_is_not_whole_yet_is_left_for_later(tmp_path: Path) -> None:
    """While the run goes on; at its end what will never be whole is replaced."""
    (tmp_path / segment_name("stdout", 0)).write_bytes(b"ab\xe2\x82")
    piece = await read_piece(_output(tmp_path, has_ended=False), "stdout", 0, 100)
    assert (piece.text, piece.next_offset, piece.is_end) == ("ab", 2, False)
    piece = await read_piece(_output(tmp_path, has_ended=False), "stdout", 2, 100)
    assert (piece.text, piece.next_offset, piece.is_end) == ("", 2, False)
    piece = await read_piece(_output(tmp_path), "stdout", 2, 100)
    assert (piece.text, piece.next_offset, piece.is_end) == ("�", 4, True)


async def test_dropped_segments_are_skipped_and_offsets_stay_true(tmp_path: Path) -> None:
    """A character cut by the gap on either side is replaced; what follows begins at its own offset."""
    (tmp_path / segment_name("stdout", 0)).write_bytes(b"first\xe2\x82")
    (tmp_path / segment_name("stdout", 1000)).write_bytes(b"\xaclast")
    chunks = await _read_all(tmp_path, 100)
    assert [(chunk.offset, chunk.next_offset, chunk.text) for chunk in chunks if chunk.text] == [
        (0, 5, "first"),
        (5, 7, "�"),
        (1000, 1005, "�last"),
    ]
    assert chunks[-1].is_end


async def test_the_real_writer_at_its_bound(tmp_path: Path) -> None:
    """F29: of 1 MB with a bound of 64 KiB the first and the newest bytes are read, at their true offsets."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        writer = OutputWriter(fd, 64 * 1024)
        line = b"0123456789abcde\n"
        for _ in range(65536):
            writer.write(0, memoryview(line))
        writer.close()
    finally:
        os.close(fd)
    chunks = await _read_whole(tmp_path)
    assert chunks[0].offset == 0
    assert chunks[-1].next_offset == 65536 * 16
    gaps = [(a, b) for a, b in itertools.pairwise(chunks) if b.offset != a.next_offset]
    assert len(gaps) == 1
    for chunk in chunks:
        assert chunk.text == (line * 4096).decode()[chunk.offset % 16 :][: len(chunk.text)]
        assert len(chunk.text) == chunk.next_offset - chunk.offset


async def _read_whole(directory: Path) -> list[LogChunk]:
    chunks = [await read_piece(_output(directory), "stdout", 0, 8192)]
    while not chunks[-1].is_end:
        chunks.append(await read_piece(_output(directory), "stdout", chunks[-1].next_offset, 8192))
    return chunks


@pytest.mark.parametrize(("offset", "text"), [(-3, "llo"), (-100, "hello"), (2, "llo"), (5, ""), (500, "")])
async def test_offsets_from_either_end(tmp_path: Path, offset: int, text: str) -> None:
    """Negative counts from the end; beyond the end there is nothing, and that is the end."""
    (tmp_path / segment_name("stdout", 0)).write_bytes(b"hello")
    piece = await read_piece(_output(tmp_path), "stdout", offset, 100)
    assert (piece.text, piece.is_end, piece.next_offset) == (text, True, 5)


@pytest.mark.parametrize("has_ended", [False, True])
async def test_a_run_without_output(tmp_path: Path, *, has_ended: bool) -> None:
    """Not launched yet, silent, or removed: empty, and final only after the end."""
    for directory in (tmp_path, tmp_path / "absent"):
        piece = await read_piece(_output(directory, has_ended=has_ended), "stderr", -5, 100)
        assert (piece.text, piece.offset, piece.next_offset, piece.is_end) == ("", 0, 0, has_ended)


@pytest.fixture
async def watcher() -> AsyncGenerator[DirectoryWatcher]:
    """A running watcher."""
    loops, made = Loops(), DirectoryWatcher()
    loops.run_forever("watch", made.run)
    yield made
    await loops.close()
    made.close()


async def test_following_a_run_to_its_end(watcher: DirectoryWatcher, tmp_path: Path) -> None:
    """Each piece comes when it is written, the last one with `is_end`; a listener is cancelled after each look."""
    ended = asyncio.Event()
    futures: list[asyncio.Future[None]] = []

    async def has_ended() -> bool:
        return ended.is_set()

    def listen() -> asyncio.Future[None]:
        futures.append(asyncio.get_running_loop().create_future())
        return futures[-1]

    file = tmp_path / segment_name("stdout", 0)
    chunks = follow(RunOutput(tmp_path, 1, has_ended), "stdout", 0, watcher=watcher, ended=listen)
    async with asyncio.timeout(DEADLINE_S), aclosing(chunks):
        first = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0.02)
        file.write_bytes(b"one\xc3")
        assert (await first).text == "one"
        with file.open("ab") as out:
            out.write(b"\xbc two")
        assert (await anext(chunks)).text == "ü two"
        last = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0.02)
        assert not last.done()
        ended.set()
        futures[-1].set_result(None)
        piece = await last
        assert (piece.text, piece.is_end, piece.next_offset) == ("", True, 9)
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)
    assert all(future.done() for future in futures)


async def test_following_a_directory_that_cannot_be_watched(watcher: DirectoryWatcher, tmp_path: Path) -> None:
    """It is looked at from time to time: the output of a run that is launched later comes too."""
    directory = tmp_path / "later"
    is_over = False

    async def has_ended() -> bool:
        return is_over

    chunks = follow(
        RunOutput(directory, 1, has_ended),
        "stdout",
        0,
        watcher=watcher,
        ended=asyncio.get_running_loop().create_future,
    )
    async with asyncio.timeout(DEADLINE_S), aclosing(chunks):
        first = asyncio.ensure_future(anext(chunks))
        await asyncio.sleep(0.02)
        directory.mkdir()
        (directory / segment_name("stdout", 0)).write_bytes(b"late")
        is_over = True
        pieces = [await first, *[piece async for piece in chunks]]  # a look may come between the output and the end
        assert ("".join(piece.text for piece in pieces), pieces[-1].is_end) == ("late", True)
