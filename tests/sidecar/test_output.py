"""Output segments: exact bytes at true offsets, within a bound, whatever is dropped."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from remotegpu_sidecar.output import SEGMENTS_DEFAULT, OutputWriter, read_output, segment_name

LIMIT = 64 * 1024
SEGMENT = LIMIT // SEGMENTS_DEFAULT

Write = Callable[[int, bytes], None]


def pattern(start: int, count: int) -> bytes:
    """Bytes that tell their offset: 8 characters for every 8 bytes."""
    first = start // 8 * 8
    text = b"".join(b"%08x" % (position & 0xFFFFFFFF) for position in range(first, start + count + 8, 8))
    return text[start - first : start - first + count]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[OutputWriter]:
    """A writer into tmp_path."""
    dir_fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    made = OutputWriter(dir_fd, LIMIT)
    yield made
    made.close()
    os.close(dir_fd)


def put(writer: OutputWriter, stream: int, data: bytes) -> None:
    """Write through memory, without a pipe."""
    writer.write(stream, memoryview(data))


def whole(directory: Path, stream: str, step: int = 1000) -> list[tuple[int, bytes]]:
    """Read a stream from 0 to its end: pieces without a gap inside."""
    pieces: list[tuple[int, bytes]] = []
    offset = 0
    while True:
        first, data, _end = read_output(directory, stream, offset, step)
        if not data:
            return pieces
        if pieces and pieces[-1][0] + len(pieces[-1][1]) == first:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + data)
        else:
            pieces.append((first, data))
        offset = first + len(data)


def test_no_output_no_file(writer: OutputWriter, tmp_path: Path) -> None:
    """Segments are created with their first byte."""
    writer.close()
    assert list(tmp_path.iterdir()) == []
    assert read_output(tmp_path, "stdout", 0, 100) == (0, b"", 0)


def test_what_is_written_is_read(writer: OutputWriter, tmp_path: Path) -> None:
    """Over the borders of segments, and each stream for itself."""
    put(writer, 0, pattern(0, 10_000))
    put(writer, 1, b"\xff\xfe\x00")
    assert read_output(tmp_path, "stdout", 0, 100_000) == (0, pattern(0, 10_000), 10_000)
    assert read_output(tmp_path, "stdout", 4000, 200) == (4000, pattern(4000, 200), 10_000)
    assert read_output(tmp_path, "stdout", -5, 100) == (9995, pattern(9995, 5), 10_000)
    assert read_output(tmp_path, "stdout", -50_000, 8) == (0, pattern(0, 8), 10_000)
    assert read_output(tmp_path, "stdout", 99_999, 8) == (10_000, b"", 10_000)
    assert read_output(tmp_path, "stderr", 0, 100) == (0, b"\xff\xfe\x00", 3)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    assert (tmp_path / segment_name("stdout", SEGMENT)).stat().st_size == SEGMENT


def test_first_and_newest_are_kept_within_the_bound(writer: OutputWriter, tmp_path: Path) -> None:
    """The middle goes, offsets stay true, the dropped bytes are counted."""
    total = 10 * LIMIT + 123
    for start in range(0, total, 997):
        put(writer, 0, pattern(start, min(997, total - start)))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= LIMIT
    head, tail = whole(tmp_path, "stdout")
    assert head == (0, pattern(0, SEGMENT))
    assert tail[1] == pattern(tail[0], total - tail[0])
    assert len(head[1]) + len(tail[1]) + writer.dropped_bytes == total == writer.end_offset(0)
    assert len(tail[1]) >= LIMIT - 3 * SEGMENT
    assert read_output(tmp_path, "stdout", SEGMENT + 1, 10)[0] == tail[0]


def test_quiet_stream_stays_whole_beside_a_loud_one(writer: OutputWriter, tmp_path: Path) -> None:
    """Only the stream with the most segments loses any."""
    put(writer, 1, pattern(0, 2 * SEGMENT))
    put(writer, 0, pattern(0, 20 * LIMIT))
    put(writer, 1, pattern(2 * SEGMENT, 2 * SEGMENT))
    assert whole(tmp_path, "stderr") == [(0, pattern(0, 4 * SEGMENT))]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= LIMIT


def test_full_disk_drops_and_counts_and_recovers(
    writer: OutputWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is raised; when there is room again, output goes on at its true offset."""
    clock = 100.0
    monkeypatch.setattr("remotegpu_sidecar.output.time.monotonic", lambda: clock)
    put(writer, 0, pattern(0, 1000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        put(writer, 0, pattern(1000, 1000))
        put(writer, 0, pattern(2000, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (writer.dropped_bytes, writer.end_offset(0)) == (1500, 3000)
    clock += 10
    put(writer, 0, pattern(3000, 1000))
    assert whole(tmp_path, "stdout") == [(0, pattern(0, 1500)), (3000, pattern(3000, 1000))]


def test_empty_segment_of_a_full_disk_is_removed(writer: OutputWriter, tmp_path: Path) -> None:
    """No litter where nothing could be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        put(writer, 0, b"lost")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert writer.dropped_bytes == 4


def test_pipe_is_moved_through(writer: OutputWriter, tmp_path: Path) -> None:
    """What one read gives; -1 when there is nothing, 0 at the end."""
    reader, sender = os.pipe()
    os.set_blocking(reader, False)
    try:
        assert writer.pump(0, reader) == -1
        os.write(sender, b"hello")
        assert writer.pump(0, reader) == 5
        os.close(sender)
        assert writer.pump(0, reader) == 0
    finally:
        os.close(reader)
    assert read_output(tmp_path, "stdout", 0, 10)[1] == b"hello"


@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 1), st.integers(1, 20_000)), min_size=1, max_size=30),
    st.booleans(),
)
@example(1, [(0, 16387), (1, 12769), (1, 20000)], False)  # as many segments each: the other's newest is not taken
@example(8, [(0, 29121), (1, 12761), (1, 20000)], False)
def test_first_and_newest_are_kept_whatever_is_to_be_retained(
    retain: int, writes: list[tuple[int, int]], can_splice: bool
) -> None:
    """Through pipes, in the kernel or by hand: true bytes within the bound; the first and the newest are there."""
    segments = 2 * (retain + 1)
    segment_bytes, ends = LIMIT // segments, [0, 0]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, dir_fd)
        writer = OutputWriter(dir_fd, LIMIT, segments)
        writer.can_splice = can_splice  # as where the file system cannot
        stack.callback(writer.close)
        pipes = [os.pipe() for _ in ends]
        for fd in itertools.chain(*pipes):
            stack.callback(os.close, fd)
        for reader, _ in pipes:
            os.set_blocking(reader, False)
        for stream, count in writes:
            reader, sender = pipes[stream]
            os.write(sender, pattern(ends[stream], count))
            ends[stream] += count
            while writer.pump(stream, reader) > 0:
                pass
            assert writer.end_offset(stream) == ends[stream]
            assert sum(path.stat().st_size for path in directory.iterdir()) <= LIMIT
        kept_bytes = 0
        for stream, word in enumerate(("stdout", "stderr")):
            pieces = whole(directory, word)
            kept_bytes += sum(len(data) for _, data in pieces)
            assert all(data == pattern(start, len(data)) for start, data in pieces)
            if ends[stream]:
                assert pieces[0][0] == 0
                assert len(pieces[0][1]) >= min(ends[stream], segment_bytes)
                newest = pieces[-1]
                assert newest[0] + len(newest[1]) == ends[stream]
                assert len(newest[1]) >= min(ends[stream], (retain - 1) * segment_bytes)
        assert kept_bytes + writer.dropped_bytes == sum(ends)


def test_f29_reader_stays_true_beside_a_writer_that_drops(writer: OutputWriter, tmp_path: Path) -> None:
    """F29: every byte read is the one at its offset, while segments appear and vanish."""
    total = 40 * LIMIT

    def write() -> None:
        for start in range(0, total, 1024):
            put(writer, 0, pattern(start, 1024))

    thread = threading.Thread(target=write)
    thread.start()
    offset = reads = 0
    while offset < total:
        first, data, end = read_output(tmp_path, "stdout", offset, 3000)
        assert first >= offset or first == end
        assert data == pattern(first, len(data))
        offset = first + len(data)
        reads += 1
    thread.join()
    assert reads > 10


def test_missing_directory_is_an_error(tmp_path: Path) -> None:
    """Not an empty stream."""
    with pytest.raises(FileNotFoundError):
        read_output(tmp_path / "none", "stdout", 0, 10)


def test_foreign_files_are_ignored(writer: OutputWriter, tmp_path: Path) -> None:
    """Only segment names count."""
    put(writer, 0, b"x")
    (tmp_path / "stdout.txt").write_text("no")
    assert read_output(tmp_path, "stdout", 0, 10) == (0, b"x", 1)
