"""Lines of a run record are believed only if they are whole."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from remotegpu_schemas import limits
from remotegpu_schemas.attempt import RECORD_FORMAT_VERSION
from remotegpu_sidecar import record

SPEC = record.encode("spec", b'{"a":1}')
ENDED = record.encode("ended", b'{"b":2}')


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """An empty record."""
    number = os.open(tmp_path / "record", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    yield number
    os.close(number)


def test_constants_are_those_of_the_schema() -> None:
    """The shim must not import the schema, so its numbers are compared here."""
    assert record.MAX_BYTES == limits.RECORD_MAX_BYTES
    assert record.VERSION == RECORD_FORMAT_VERSION


def test_line_is_json_with_a_fixed_prefix() -> None:
    """Any JSON reader can read it, and the checksum covers what follows the prefix."""
    assert json.loads(SPEC) == {"v": 1, "crc": SPEC[14:22].decode(), "kind": "spec", "data": {"a": 1}}
    prefix = b'{"v":1,"crc":"%s",' % SPEC[14:22]
    assert SPEC.startswith(prefix)
    assert int(SPEC[14:22], 16) == zlib.crc32(SPEC[len(prefix) : -1])


def test_lines_are_read_by_kind(fd: int, tmp_path: Path) -> None:
    """Each kind has its newest line."""
    for line in (SPEC, ENDED, record.encode("ended", b'{"b":3}')):
        record.append(fd, line)
    assert record.read(tmp_path / "record") == ({"spec": {"a": 1}, "ended": {"b": 3}}, [])


@pytest.mark.parametrize("cut", range(1, len(ENDED) - 1))
def test_torn_last_line_was_not_written(cut: int) -> None:
    """Wherever it is torn, it does not count, and is no fault."""
    assert record.parse(SPEC + ENDED[:cut]) == ({"spec": {"a": 1}}, [])


def test_append_after_a_torn_line_starts_a_new_one(fd: int, tmp_path: Path) -> None:
    """What is written after a power cut is not lost with what was torn."""
    os.write(fd, SPEC + ENDED[:20])
    record.append(fd, ENDED)
    lines, complaints = record.read(tmp_path / "record")
    assert lines == {"spec": {"a": 1}, "ended": {"b": 2}}
    assert complaints == ["line 2: the checksum is wrong: torn or damaged"]


@pytest.mark.parametrize("position", range(len(ENDED) - 1))
def test_damaged_line_does_not_count(position: int) -> None:
    """One flipped bit anywhere makes the line invalid, and nothing else."""
    damaged = bytearray(ENDED)
    damaged[position] ^= 1
    lines, complaints = record.parse(SPEC + bytes(damaged))
    assert lines == {"spec": {"a": 1}}
    assert len(complaints) == 1


def test_unknown_kinds_and_newer_versions_are_no_harm() -> None:
    """A later shim's lines are kept apart or reported."""
    newer = ENDED.replace(b'{"v":1', b'{"v":2')
    lines, complaints = record.parse(SPEC + newer + record.encode("mystery", b"{}"))
    assert lines == {"spec": {"a": 1}, "mystery": {}}
    assert complaints == ["line 2: format version 2; this program reads version 1"]


@pytest.mark.parametrize("body", [b'"kind":1,"data":{}}', b'"kind":"ended","data":[]}', b'"kind":"ended"}', b"[[["])
def test_line_of_another_shape_is_reported(body: bytes) -> None:
    """A right checksum over the wrong thing."""
    line = b'{"v":1,"crc":"%08x",%s\n' % (zlib.crc32(body), body)
    lines, complaints = record.parse(line)
    assert (lines, len(complaints)) == ({}, 1)


def test_reading_is_bounded(tmp_path: Path) -> None:
    """A record that has grown beyond reason is not loaded."""
    path = tmp_path / "record"
    path.write_bytes(SPEC)
    os.truncate(path, record.MAX_BYTES + 1)
    lines, complaints = record.read(path)
    assert lines == {}
    assert "more than" in complaints[0]


def test_f52_a_pipe_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    """F52: a task of the agent's own user can put one there; it has no valid line, and that is the complaint."""
    path = tmp_path / "record"
    os.mkfifo(path)
    assert record.read(path) == ({}, ["the run record is not a regular file"])


def test_full_disk_is_told(fd: int, tmp_path: Path) -> None:
    """Part of a line is an error, and the whole line can be written later."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(OSError, match="disk is full"):
            record.append(fd, SPEC)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    record.append(fd, SPEC)
    assert record.read(tmp_path / "record")[0] == {"spec": {"a": 1}}
