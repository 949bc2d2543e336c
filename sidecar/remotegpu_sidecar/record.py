"""The lines of a run's `record`: how they are written, and what is believed of them. Standard library only.

A line is one JSON object that starts with the fixed prefix `{"v":1,"crc":"xxxxxxxx",`; the checksum is the CRC-32
of everything between that prefix and the newline. Nothing is ever fsynced: a killed process loses nothing, and after
a power cut a torn line counts as not written. The version is that of the whole directory: `deadline`, `suspend` and the
output have none of their own.

Kinds: `spec`, `shim`, `starting`, `started`, `suspended`, `resumed`, `ended`.
"""

from __future__ import annotations

import json
import os
import stat
import zlib

FILE_NAME = "record"
VERSION = 1
# Equal to remotegpu_schemas.limits.RECORD_MAX_BYTES, which the shim must not import.
MAX_BYTES = 16 * 1024 * 1024

_VERSION_PREFIX = b'{"v":'
_PREFIX = b'{"v":%d,"crc":"' % VERSION
_BODY_START = len(_PREFIX) + len('xxxxxxxx",')


def encode(kind: str, data: bytes) -> bytes:
    """One line of the record; `data` is a JSON object without newlines."""
    body = b'"kind":"%s","data":%s}' % (kind.encode("ascii"), data)
    return b'%s%08x",%s\n' % (_PREFIX, zlib.crc32(body), body)


def append(fd: int, line: bytes) -> None:
    """Append a line with one write to a file opened with O_RDWR and O_APPEND; a torn line before it stays torn.

    Raises OSError; then the line counts as not written and may be appended again.
    """
    size = os.fstat(fd).st_size
    if size and os.pread(fd, 1, size - 1) != b"\n":
        line = b"\n" + line
    written = os.write(fd, line)
    if written != len(line):
        raise OSError(28, f"only {written} of {len(line)} bytes of the run record could be written: the disk is full")


def read(path: str | os.PathLike[str], dir_fd: int | None = None) -> tuple[dict[str, dict[str, object]], list[str]]:
    """The newest valid line of each kind, and what was wrong with the others. Raises OSError.

    A file above MAX_BYTES is not read: it has no valid line, and that is the complaint. Nor is what is no file: a task
    of the agent's own user may put a pipe there, and whoever waited for that would wait for ever.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dir_fd)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            return {}, ["the run record is not a regular file"]
        size = status.st_size
        if size > MAX_BYTES:
            return {}, [f"the run record has {size} bytes, more than {MAX_BYTES}"]
        return parse(os.read(fd, size))  # of a regular file one call gives all of it
    finally:
        os.close(fd)


def parse(content: bytes) -> tuple[dict[str, dict[str, object]], list[str]]:
    """As `read`, from the bytes themselves. Never raises. An unfinished last line was not written: no complaint."""
    lines: dict[str, dict[str, object]] = {}
    complaints: list[str] = []
    texts = content.split(b"\n")
    for number, line in enumerate(texts, start=1):
        if not line:
            continue
        try:
            kind, data = _parse_line(line)
        except (ValueError, RecursionError) as error:
            if number < len(texts):
                complaints.append(f"line {number}: {error}")
        else:
            lines[kind] = data
    return lines, complaints


def cgroup_of(lines: dict[str, dict[str, object]]) -> str | None:
    """The path of the run's control group, if it was given one before its start."""
    path = lines.get("starting", {}).get("cgroup")
    return path if isinstance(path, str) else None


def _parse_line(line: bytes) -> tuple[str, dict[str, object]]:
    if not line.startswith(_PREFIX):
        version = line[len(_VERSION_PREFIX) :].split(b",", 1)[0]
        if line.startswith(_VERSION_PREFIX) and version.isdigit() and int(version) != VERSION:
            raise ValueError(f"format version {int(version)}; this program reads version {VERSION}")
        raise ValueError("not a line of a run record")
    body = line[_BODY_START:]
    if line[len(_PREFIX) : _BODY_START] != b'%08x",' % zlib.crc32(body):
        raise ValueError("the checksum is wrong: torn or damaged")
    value = json.loads(b"{" + body)
    kind, data = value.get("kind"), value.get("data")
    if not isinstance(kind, str) or not isinstance(data, dict):
        raise ValueError("a line without kind or data")  # noqa: TRY004 - a fault of the file, as the others
    return kind, data
