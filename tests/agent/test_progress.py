"""The progress file is the task's: read only if it is a regular file of its user, bounded, whatever it holds."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import pytest

from remotegpu_agent import progress as module
from remotegpu_agent.directory_watch import DirectoryWatcher
from remotegpu_agent.progress import ProgressFollower, parse_progress, read_progress
from remotegpu_agent.supervise import Loops
from remotegpu_queue.store import StoreUnavailable
from remotegpu_schemas.attempt import AttemptId, TaskUser
from tests.agent.support import Told
from tests.waiting import DEADLINE_S

A = AttemptId("a")
ME = os.geteuid()
NOBODY = TaskUser(name="nobody", uid=65534, gid=65534)


@pytest.mark.parametrize(
    ("content", "progress"),
    [
        (b"40 half way\n", (40.0, "half way")),
        (b"40\n", (40.0, "")),
        (b"40", (40.0, "")),
        (b"12.5% loss 0.3\n", (12.5, "loss 0.3")),
        (b"10 a\n20 b\n", (20.0, "b")),
        (b"10 a\n20 unfini", (10.0, "a")),
        (b"  30   spaces  \n", (30.0, "spaces")),
        (b"10 windows\r\n", (10.0, "windows")),
        (b"250 too much\n", (100.0, "too much")),
        (b"-5 too little\n", (0.0, "too little")),
        (b"1e1 tens\n", (10.0, "tens")),
        (b"50 \xff\xfe bad\0\n", (50.0, "�� bad�")),
        (b"nan x\n", None),
        (b"inf x\n", None),
        (b"done\n", None),
        (b"", None),
        (b"\n\n", None),
        (b"10 a\nrubbish\n", None),
        (b"\x00" * 5000, None),
    ],
)
def test_the_last_whole_line_counts(content: bytes, progress: tuple[float, str] | None) -> None:
    """Percent, cut to 0-100, and message; an unfinished line is left for later unless it is the only one."""
    assert parse_progress(content) == progress


def test_a_message_is_cut_to_what_the_plane_takes() -> None:
    """500 characters."""
    assert parse_progress(b"1 " + b"x" * 3000 + b"\n") == (1.0, "x" * 500)


def test_of_a_huge_file_the_tail_is_read(tmp_path: Path) -> None:
    """A sparse file of 1 TB costs one short read."""
    file = tmp_path / "progress"
    with file.open("wb") as out:
        out.truncate(10**12)
        out.seek(0, os.SEEK_END)
        out.write(b"\n77 far out\n")
    assert read_progress(file, None) == (77.0, "far out")


def test_f52_only_a_regular_file_of_the_tasks_user_is_read(tmp_path: Path) -> None:
    """F52: links (hard ones to others' files too), fifos, devices, directories, foreign files: nothing, and at once."""
    secret = tmp_path / "secret"
    secret.write_text("42 hunter2\n")
    link = tmp_path / "link"
    link.symlink_to(secret)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    device = tmp_path / "device"
    device.symlink_to("/dev/zero")
    directory = tmp_path / "directory"
    directory.mkdir()
    (tmp_path / "folder").symlink_to(tmp_path)
    hard = tmp_path / "hard"
    hard.hardlink_to(secret)
    for path in (link, fifo, device, directory, Path("/dev/zero"), tmp_path / "absent", tmp_path / "folder" / "secret"):
        assert read_progress(path, None) is None, path
    assert read_progress(secret, None) == (42.0, "hunter2")


@pytest.mark.skipif(ME != 0, reason="only root can give files away")
def test_f52_a_file_of_root_is_not_read_for_a_task_of_a_user(open_dir: Path) -> None:
    """F52: measured once: root followed a planted link to a file that only root may read. Hard links likewise."""
    file, hard = open_dir / "progress", open_dir / "hard"
    file.write_text("1 x\n")
    hard.hardlink_to(file)
    for path in (file, hard):
        assert read_progress(path, NOBODY) is None
    os.chown(file, NOBODY.uid, -1)
    assert read_progress(file, NOBODY) == (1.0, "x")


@pytest.mark.skipif(ME != 0, reason="only root can take on another user's rights")
def test_f52_what_the_tasks_user_may_not_read_is_not_read_for_it(open_dir: Path) -> None:
    """F52: its own file behind a directory that is closed to it stays unread, whatever root could do."""
    closed = open_dir / "closed"
    closed.mkdir(mode=0o700)
    file = closed / "progress"
    file.write_text("1 x\n")
    os.chown(file, NOBODY.uid, NOBODY.gid)
    assert read_progress(file, NOBODY) is None
    closed.chmod(0o711)
    assert read_progress(file, NOBODY) == (1.0, "x")


@pytest.fixture
async def loops(monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Loops]:
    """Loops for a follower that reports as often as something changes."""
    monkeypatch.setattr(module, "_REPORT_EVERY_S", 0.01)
    monkeypatch.setattr(module, "_UNWATCHED_LOOK_S", 0.01)
    made = Loops()
    yield made
    await made.close()
    assert not made.failures


@pytest.fixture
async def watcher(loops: Loops) -> AsyncGenerator[DirectoryWatcher]:
    """A running watcher."""
    made = DirectoryWatcher()
    loops.run_forever("watch", made.run)
    yield made
    await loops.close()
    made.close()


async def test_changes_are_reported_until_it_is_forgotten(
    loops: Loops, watcher: DirectoryWatcher, tmp_path: Path
) -> None:
    """Each new last line once; a line that says the same again is none; nothing after `forget`."""
    told, file = Told(), tmp_path / "progress"
    follower = ProgressFollower(loops, watcher, _report_to(told))
    follower.follow(A, file, None)
    follower.follow(A, file, None)
    file.write_text("10 a\n")
    await told.wait(1)
    with file.open("a") as out:
        out.write("10 a\n")
    with file.open("a") as out:
        out.write("20 b\n")
    assert await told.wait(2) == [("a", 10.0, "a"), ("a", 20.0, "b")]
    follower.forget(A)
    follower.forget(A)
    file.write_text("30 c\n")
    await asyncio.sleep(0.05)
    assert len(told.calls) == 2


def _report_to(told: Told) -> Callable[[AttemptId, float, str], Awaitable[None]]:
    async def report(attempt_id: AttemptId, percent: float, message: str) -> None:
        told(attempt_id, percent, message)

    return report


async def test_a_directory_that_was_remade_is_looked_at(
    loops: Loops, watcher: DirectoryWatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task may remove the directory that is watched and make it anew: what it writes there is seen, if later."""
    monkeypatch.setattr(module, "_WATCHED_LOOK_S", 0.01)
    told, directory = Told(), tmp_path / "messages"
    directory.mkdir()
    follower = ProgressFollower(loops, watcher, _report_to(told))
    follower.follow(A, directory / "progress", None)
    (directory / "progress").write_text("10 a\n")
    assert await told.wait(1) == [(A, 10.0, "a")]
    (directory / "progress").unlink()
    directory.rmdir()
    directory.mkdir()
    (directory / "progress").write_text("20 b\n")
    assert await told.wait(2) == [(A, 10.0, "a"), (A, 20.0, "b")]


async def test_a_directory_that_cannot_be_watched_is_looked_at(
    loops: Loops, watcher: DirectoryWatcher, tmp_path: Path
) -> None:
    """One that is not there yet is followed by looking now and then; a link in its place leads nowhere."""
    told, real = Told(), tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    follower = ProgressFollower(loops, watcher, _report_to(told))
    follower.follow(A, tmp_path / "link" / "progress", None)
    follower.follow(AttemptId("b"), tmp_path / "later" / "progress", None)
    (real / "progress").write_text("10 a\n")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "progress").write_text("20 b\n")
    assert await told.wait(1) == [("b", 20.0, "b")]


async def test_f24_a_full_disk_does_not_end_the_following(
    loops: Loops, watcher: DirectoryWatcher, tmp_path: Path
) -> None:
    """F24: what could not be stored is stored when there is room."""
    told, refusals = Told(), 3

    async def report(attempt_id: AttemptId, percent: float, message: str) -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise StoreUnavailable("the disk is full")
        told(percent)

    file = tmp_path / "progress"
    file.write_text("10 a\n")
    ProgressFollower(loops, watcher, report).follow(A, file, None)
    assert await told.wait(1) == [10.0]


async def test_a_watched_directory_tells_all_who_listen(watcher: DirectoryWatcher, tmp_path: Path) -> None:
    """Made, written, moved in; two listeners of one directory have one watch, and one may leave."""
    first, second = asyncio.Event(), asyncio.Event()
    with watcher.listen(tmp_path, first) as is_told:
        with watcher.listen(tmp_path, second) as is_told_too:
            assert is_told
            assert is_told_too
            (tmp_path / "x").write_text("x")
            await _all(first, second)
        first.clear()
        second.clear()
        (tmp_path / "x").rename(tmp_path / "y")
        await _all(first)
        assert not second.is_set()
    with watcher.listen(tmp_path, second) as is_told:
        assert is_told
        (tmp_path / "z").touch()
        await _all(second)


async def test_other_directories_tell_nothing(watcher: DirectoryWatcher, tmp_path: Path) -> None:
    """Who listens to one directory is not woken by another."""
    here, there = asyncio.Event(), asyncio.Event()
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    with watcher.listen(tmp_path / "here", here), watcher.listen(tmp_path / "there", there):
        (tmp_path / "there" / "x").touch()
        await _all(there)
        assert not here.is_set()


async def test_what_cannot_be_watched_says_so(watcher: DirectoryWatcher, tmp_path: Path) -> None:
    """Absent, a file: the caller has to look for itself."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "absent", tmp_path / "file"):
        with watcher.listen(path, asyncio.Event()) as is_told:
            assert not is_told


async def test_f52_a_link_in_a_directorys_place_does_not_deafen_others(
    watcher: DirectoryWatcher, tmp_path: Path
) -> None:
    """F52: the kernel has one watch for both names; the end of the link's must not end the directory's."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    honest = asyncio.Event()
    with watcher.listen(tmp_path / "real", honest):
        with watcher.listen(tmp_path / "link", asyncio.Event()):
            pass
        for name in ("x", "y", "z"):
            (tmp_path / "real" / name).touch()
            await _all(honest)
            honest.clear()


async def _all(*events: asyncio.Event) -> None:
    async with asyncio.timeout(DEADLINE_S):
        for event in events:
            await event.wait()
