"""A run's output on disk: segment files named by the offset of their first byte, bounded, true when the middle is gone.

The shim writes (`OutputWriter`), anyone reads at any time (`read_output`). Standard library only.

The bound is shared: both streams together have at most so many segments, each of its share of the limit. At the bound
the stream with the most segments gives up its oldest one but the first, so a quiet stream stays whole beside a loud
one. What the disk has no room for is dropped and counted as well; the next segment starts at its true offset.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time

STREAMS = ("stdout", "stderr")
SEGMENTS_DEFAULT = 16
"""What records say nothing of."""
MORE_BYTES = 64 * 1024
"""Who got so many at once may find more."""

_READ_BYTES = 4096
_SPLICE_BYTES = 1024 * 1024
_SPLICE_F_NONBLOCK = 2
_RETRY_S = 0.5
_READ_ATTEMPTS = 8


def segment_name(stream: str, offset: int) -> str:
    """The file that holds a stream's bytes from `offset` on."""
    return f"{stream}.{offset:016d}"


class _Stream:
    """One stream on its way to disk. `end` counts all its bytes so far; its newest segment is open if `fd` >= 0."""

    __slots__ = ("end", "fd", "name", "sizes", "starts")

    def __init__(self, name: str) -> None:
        self.name = name
        self.end = 0
        self.fd = -1
        self.starts: list[int] = []
        self.sizes: list[int] = []

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class OutputWriter:
    """Moves bytes from the task's pipes to segments in a directory, in the kernel where that can be (splice(2)).

    Decision record 0007 has the figures. `segments_max` is at least 4: the first and the newest of both streams.
    """

    def __init__(self, dir_fd: int, limit_bytes: int, segments_max: int = SEGMENTS_DEFAULT) -> None:
        self._dir_fd = dir_fd
        self._segments_max = segments_max
        self._segment_bytes = max(limit_bytes // segments_max, 1)
        self.can_splice = True
        self._streams = [_Stream(name) for name in STREAMS]
        self._retry_at_s = 0.0
        self.dropped_bytes = 0

    def end_offset(self, stream: int) -> int:
        """How many bytes the stream has had so far, dropped ones too."""
        return self._streams[stream].end

    def pump(self, stream: int, fd: int) -> int:
        """Move some of what is in a non-blocking pipe. The bytes moved; 0 at its end, -1 when it is empty."""
        target = self._streams[stream]
        try:
            if target.fd >= 0 and self.can_splice:
                count = self._splice(target, fd)
                if count is not None:
                    return count
            # Also what makes a segment: one without a byte is not to be.
            data = os.read(fd, _READ_BYTES if self.can_splice else MORE_BYTES)
        except BlockingIOError:
            return -1
        self.write(stream, memoryview(data))
        return len(data)

    def _splice(self, target: _Stream, fd: int) -> int | None:
        """As `pump`; None where it cannot be done so: the bytes are still in the pipe. Raises BlockingIOError."""
        room = self._segment_bytes - target.sizes[-1]
        try:
            count = os.splice(fd, target.fd, min(room, _SPLICE_BYTES), flags=_SPLICE_F_NONBLOCK)
        except BlockingIOError:
            raise
        except OSError as error:
            self.can_splice = error.errno != errno.EINVAL  # not by this file system
            return None
        self._grown(target, count)
        return count

    def write(self, stream: int, data: memoryview) -> None:
        """Append to a stream. A full disk never raises: what does not fit is dropped and counted."""
        target = self._streams[stream]
        while data:
            if target.fd < 0 and not self._open_segment(target):
                self._drop(target, len(data))
                return
            room = self._segment_bytes - target.sizes[-1]
            try:
                written = os.write(target.fd, data[:room])
            except OSError:
                self._retry_at_s = time.monotonic() + _RETRY_S
                self._end_segment(target)
                self._drop(target, len(data))
                return
            self._grown(target, written)
            data = data[written:]

    def _grown(self, target: _Stream, count: int) -> None:
        target.end += count
        target.sizes[-1] += count
        if target.sizes[-1] >= self._segment_bytes:
            self._end_segment(target)

    def close(self) -> None:
        """End the open segments. Safe to repeat."""
        for stream in self._streams:
            self._end_segment(stream)

    def _open_segment(self, stream: _Stream) -> bool:
        if time.monotonic() < self._retry_at_s:
            return False
        self._make_room(stream)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            stream.fd = os.open(segment_name(stream.name, stream.end), flags, 0o600, dir_fd=self._dir_fd)
        except OSError:
            self._retry_at_s = time.monotonic() + _RETRY_S
            return False
        stream.starts.append(stream.end)
        stream.sizes.append(0)
        return True

    def _end_segment(self, stream: _Stream) -> None:
        if stream.fd < 0:
            return
        stream.close()
        if stream.sizes[-1] == 0:
            self._remove(stream, len(stream.starts) - 1)

    def _make_room(self, beginner: _Stream) -> None:
        """For one more segment of `beginner`, which gives way where both have as many: it is about to have more."""
        while sum(len(stream.starts) for stream in self._streams) >= self._segments_max:
            loudest = max(self._streams, key=lambda stream: (len(stream.starts), stream is beginner))
            self.dropped_bytes += loudest.sizes[1]
            self._remove(loudest, 1)

    def _remove(self, stream: _Stream, index: int) -> None:
        with contextlib.suppress(OSError):  # somebody removed it, or the disk is gone
            os.unlink(segment_name(stream.name, stream.starts[index]), dir_fd=self._dir_fd)
        del stream.starts[index], stream.sizes[index]

    def _drop(self, stream: _Stream, count: int) -> None:
        stream.end += count
        self.dropped_bytes += count


def read_output(
    directory: str | os.PathLike[str], stream: str, offset: int, limit_bytes: int
) -> tuple[int, bytes, int]:
    """Up to `limit_bytes` of a stream from `offset` on: (offset of the first byte, the bytes, the stream's end so far).

    A negative offset counts from the end. What was dropped is skipped: the first byte may lie beyond `offset`, and the
    bytes never reach over a gap; read on at first + len(bytes). Safe beside an active writer: no bytes before the end
    mean that they were dropped while they were looked for; ask again. Raises OSError.
    """
    attempts = 1
    first, data, end = _read_once(directory, stream, offset, limit_bytes)
    while not data and first < end and limit_bytes and attempts < _READ_ATTEMPTS:
        attempts += 1
        first, data, end = _read_once(directory, stream, offset, limit_bytes)
    return first, data, end


def _read_once(directory: str | os.PathLike[str], stream: str, offset: int, limit_bytes: int) -> tuple[int, bytes, int]:
    dir_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        starts = _segment_starts(dir_fd, stream)
        if not starts:
            return 0, b"", 0
        # A writer goes on meanwhile: the end is what it is when the newest segment is looked at.
        end = starts[-1] + _segment_size(dir_fd, stream, starts[-1])
        wanted = min(max(end + offset, 0) if offset < 0 else offset, end)
        first, have, parts = wanted, 0, []
        for index, start in enumerate(starts):
            position = first + have
            if index + 1 < len(starts) and starts[index + 1] <= position:
                continue
            if start > position:
                if have:  # a gap
                    break
                first = position = start
            part = _read_segment(dir_fd, stream, start, position - start, limit_bytes - have)
            parts.append(part)
            have += len(part)
            if have >= limit_bytes:
                break
        return first, b"".join(parts), max(end, first + have)
    finally:
        os.close(dir_fd)


def _segment_starts(dir_fd: int, stream: str) -> list[int]:
    prefix = stream + "."
    names = (name[len(prefix) :] for name in os.listdir(dir_fd) if name.startswith(prefix))
    return sorted(int(name) for name in names if name.isdigit())


def _segment_size(dir_fd: int, stream: str, start: int) -> int:
    try:
        return os.stat(segment_name(stream, start), dir_fd=dir_fd).st_size
    except FileNotFoundError:  # dropped since it was listed
        return 0


def _read_segment(dir_fd: int, stream: str, start: int, skip: int, limit_bytes: int) -> bytes:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(segment_name(stream, start), flags, dir_fd=dir_fd)
    except FileNotFoundError:  # dropped since it was listed
        return b""
    try:
        os.lseek(fd, skip, os.SEEK_SET)
        size = max(min(limit_bytes, os.fstat(fd).st_size - skip), 0)
        return os.read(fd, size)
    finally:
        os.close(fd)
