"""Attempt directories that earlier releases have left, which this one must load: `old_attempts/<release>/`.

Never changed, never removed; `old_attempts/make.py` says how those of the next release are made.
"""

from __future__ import annotations

import errno
import json
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from remotegpu_schemas.attempt import EndedBy, Frozen, ProcessIdentity, RunEnded, RunSpec, RunStarted
from remotegpu_sidecar.adoption import AdoptedState, survey
from remotegpu_sidecar.launcher import Launcher
from remotegpu_sidecar.output import read_output
from remotegpu_sidecar.runs import read_deadline
from tests.sidecar.old_attempts.make import FAKE_BOOT, FOLDER

RELEASES: Final = sorted(path.name for path in FOLDER.iterdir() if (path / "expected.json").exists())
MODELS: Final[dict[str, type[Frozen]]] = {"spec": RunSpec, "started": RunStarted, "ended": RunEnded}
STATES: Final = {
    "abandoned.1": AdoptedState.ENDED,
    "ended.1": AdoptedState.ENDED,
    "lease.1": AdoptedState.ENDED,
    "never.1": AdoptedState.NEVER_STARTED,
    "no-program.1": AdoptedState.ENDED,
    "open.1": AdoptedState.OTHER_BOOT,
    "signal.1": AdoptedState.ENDED,
    "suspended.1": AdoptedState.ENDED,
    "timeout.1": AdoptedState.ENDED,
    "torn.1": AdoptedState.OTHER_BOOT,
    "user.1": AdoptedState.ENDED,
    "warned.1": AdoptedState.ENDED,
}
# What make.py has each run do: cause, exit code, signal, errno. Not read from a record, nor through a model.
ENDS: Final = {
    "abandoned.1": (EndedBy.ABANDONED, None, None, None),
    "ended.1": (EndedBy.EXIT, 3, None, None),
    "lease.1": (EndedBy.LEASE, None, signal.SIGTERM, None),
    "no-program.1": (EndedBy.LAUNCH, None, None, errno.ENOENT),
    "signal.1": (EndedBy.EXIT, None, signal.SIGKILL, None),
    "suspended.1": (EndedBy.EXIT, 4, None, None),
    "timeout.1": (EndedBy.TIMEOUT, None, signal.SIGTERM, None),
    "user.1": (EndedBy.EXIT, 0, None, None),
    "warned.1": (EndedBy.EXIT, 0, None, None),
}
LOUD: Final = b"".join(b"line %d of many, many lines of output\n" % number for number in range(3000))
"""All that `ended.1` has written, of which its middle was dropped."""


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a release's attempts, as an upgraded agent finds them."""
    copy = tmp_path / "attempts"
    shutil.copytree(FOLDER / request.param / "attempts", copy)
    return copy


@pytest.fixture
def expected(release: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What that release itself has seen in them."""
    name = request.node.callspec.params["release"]
    found: dict[str, Any] = json.loads((FOLDER / name / "expected.json").read_text())
    assert set(found) == {path.name for path in release.iterdir()}
    return found


@pytest.fixture
async def launcher(release: Path) -> AsyncIterator[Launcher]:
    """This release's."""
    made = Launcher(release)
    await made.start()
    yield made
    await made.stop()


def test_the_present_release_is_among_them() -> None:
    """There is at least the first one; without any the tests below would prove nothing."""
    assert "0.1.0" in RELEASES


def test_f38_each_directory_is_understood(release: Path, expected: dict[str, Any]) -> None:
    """F38: every end with its cause and its figures, every open run as one of another boot; nothing is unreadable."""
    found = {each.directory.name: each for each in survey(release)}
    assert {name: each.state for name, each in found.items()} == STATES
    for name, each in found.items():
        assert each.record is not None, name
        lines = expected[name]["lines"]
        ended = each.record.ended
        assert (ended is not None) == ("ended" in lines), name
        if ended is not None:
            wanted = RunEnded.model_validate(lines["ended"])
            assert ended == wanted, name
            assert (ended.ended_by, ended.exit_code, ended.signal, ended.errno) == ENDS[name], name


@pytest.mark.parametrize("kind", MODELS)
def test_f38_every_key_is_still_read(release: Path, expected: dict[str, Any], kind: str) -> None:
    """F38: a key that was renamed or removed would be lost in silence: each comes back with its value."""
    seen = 0
    for name, what in expected.items():
        line = what["lines"].get(kind)
        if line is not None:
            read_back = MODELS[kind].model_validate(line).model_dump(mode="json")
            # A key that is null in every directory is told from one that has gone by its name alone.
            assert line.keys() <= read_back.keys(), name
            assert {key: read_back[key] for key in line} == line, name
            seen += 1
    assert seen > 1
    assert release.exists()


def test_f38_output_is_read_at_its_offsets(release: Path, expected: dict[str, Any]) -> None:
    """F38: first segment, gap, newest segments, both streams."""
    for name, what in expected.items():
        directory = release / name
        first, data, end = read_output(directory, "stdout", 0, 1 << 20)
        assert [first, len(data), end] == what["stdout"], name
        assert read_output(directory, "stdout", -20, 20)[1].decode() == what["tail"], name
        assert read_output(directory, "stderr", 0, 1 << 20)[1].decode() == what["stderr"], name


def test_f38_every_byte_that_was_kept_is_read(release: Path) -> None:
    """F38: read on from piece to piece, over the gap, the output is what the task wrote at those offsets."""
    directory = release / "ended.1"
    ended = {each.directory.name: each for each in survey(release)}["ended.1"].record
    assert ended is not None
    assert ended.ended is not None
    offset, kept, gaps = 0, 0, 0
    while offset < len(LOUD):
        first, data, end = read_output(directory, "stdout", offset, 5000)
        assert data == LOUD[first : first + len(data)]
        assert (bool(data), end) == (True, len(LOUD))
        gaps += first > offset
        kept += len(data)
        offset = first + len(data)
    assert (gaps, len(LOUD) - kept) == (1, ended.ended.output_dropped_bytes)


async def test_f38_they_are_adopted(launcher: Launcher, release: Path) -> None:
    """F38: the launcher takes stock of them, and nothing of a run of another boot is looked for or signalled."""
    adopted = {each.directory.name: each for each in await launcher.adopt()}
    assert {name: each.state for name, each in adopted.items()} == STATES
    assert all(each.run is None and not each.left_pids for each in adopted.values())
    found = adopted["open.1"].record
    assert found is not None
    assert found.started is not None
    assert isinstance(found.started.process, ProcessIdentity)
    assert found.started.process.boot_id == FAKE_BOOT
    assert (read_deadline(release / "open.1") or 0) > 0
    assert (release / "open.1" / "suspend").exists()
