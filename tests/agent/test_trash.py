"""Removing what tasks have filled: links, mounts, endless depth, closed directories; bounded, and after a crash."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from remotegpu_agent.trash import Trash, used_bytes

MANY = 10**6


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """The directory whose entries are thrown away; a stranger lies beside it."""
    (tmp_path / "work").mkdir()
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "file").write_text("precious")
    return tmp_path / "work"


@pytest.fixture
def trash(parent: Path) -> Trash:
    """Its trash."""
    return Trash(parent)


def left(parent: Path) -> list[str]:
    """What is still there, in the trash too."""
    return sorted(str(path.relative_to(parent)) for path in parent.rglob("*") if path.name != ".trash")


def test_a_tree_goes_and_its_neighbours_stay(parent: Path, trash: Trash) -> None:
    """Gone under its name at once, and from the disk once the trash is emptied."""
    for name in ("a", "b"):
        (parent / name / "deep").mkdir(parents=True)
        (parent / name / "deep" / "file").write_text("x")
    assert trash.throw("a")
    assert not (parent / "a").exists()
    assert not trash.throw("a")
    done = trash.empty(MANY)
    assert (done.has_more, done.stuck, left(parent)) == (False, [], ["b", "b/deep", "b/deep/file"])
    assert (parent / ".trash").stat().st_mode & 0o777 == 0o700


def test_f52_links_are_removed_and_never_followed(parent: Path, trash: Trash, tmp_path: Path) -> None:
    """F52: to a file, to a directory, to nowhere, and in the place of the directory itself."""
    (parent / "a").mkdir()
    (parent / "a" / "to-directory").symlink_to(tmp_path / "stranger")
    (parent / "a" / "to-file").symlink_to(tmp_path / "stranger" / "file")
    (parent / "a" / "to-nowhere").symlink_to(tmp_path / "nowhere")
    os.link(tmp_path / "stranger" / "file", parent / "a" / "hard")
    os.mkfifo(parent / "a" / "fifo")
    (parent / "b").symlink_to(tmp_path / "stranger")
    assert trash.throw("a")
    assert trash.throw("b")
    assert trash.empty(MANY).stuck == []
    assert left(parent) == []
    assert (tmp_path / "stranger" / "file").read_text() == "precious"


def test_f52_endless_depth_costs_neither_descriptors_nor_recursion(parent: Path, trash: Trash) -> None:
    """F52: 5,000 levels, with less than a hundred descriptors."""
    fd = os.open(parent, os.O_RDONLY)
    for level in range(5_000):
        name = "a" if level == 0 else "d"
        os.mkdir(name, dir_fd=fd)
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    assert used_bytes(parent / "a", MANY) >= 0  # as deep as a path may be, and no error
    assert trash.throw("a")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(100, len(os.listdir("/proc/self/fd")) + 20), before[1]))
    try:
        assert trash.empty(MANY).stuck == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert left(parent) == []


def test_a_piece_is_bounded_and_the_next_goes_on(parent: Path, trash: Trash) -> None:
    """Nothing is held up by a directory of any size."""
    (parent / "a").mkdir()
    for number in range(2500):
        (parent / "a" / f"{number}").touch()
    trash.throw("a")
    pieces = []
    while (done := trash.empty(100)).has_more:
        pieces.append(done.removed)
    assert max(pieces) <= 1100
    assert len(pieces) >= 2
    assert left(parent) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_nothing_is_removed_behind_a_mount_point(parent: Path, trash: Trash, tmp_path: Path) -> None:
    """A data set that was mounted inside of a task's directory survives it, and what lies beside it goes."""
    inner = parent / "a" / "b" / "data"
    inner.mkdir(parents=True)
    (parent / "a" / "b" / "file").touch()
    subprocess.run(["mount", "--bind", str(tmp_path / "stranger"), str(inner)], check=True)
    try:
        assert trash.throw("a")
        for _ in range(2):
            done = trash.empty(MANY)
            assert len(done.stuck) == 1
            assert "data: Device or resource busy" in done.stuck[0]
        assert (tmp_path / "stranger" / "file").read_text() == "precious"
        assert not any(path.name == "file" and path.parent.name != "data" for path in parent.rglob("*"))
    finally:
        [mounted] = [
            line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines() if str(parent) in line
        ]
        subprocess.run(["umount", mounted], check=True)
    assert trash.empty(MANY).stuck == []
    assert left(parent) == []


@pytest.fixture
def as_nobody(parent: Path, tmp_path: Path) -> Iterator[None]:
    """Without root's rights, as an agent that runs as an ordinary user."""
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_mode & 0o005 != 0o005:
            path.chmod(path.stat().st_mode | 0o055)
    os.chown(parent, 65534, 65534)
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.usefixtures("as_nobody")
def test_directories_that_their_owner_has_closed_go_too(parent: Path, trash: Trash) -> None:
    """An agent that is not root opens them first: they are its own user's."""
    (parent / "a" / "b" / "c").mkdir(parents=True)
    (parent / "a" / "b" / "c" / "file").touch()
    for path in (parent / "a" / "b" / "c", parent / "a" / "b", parent / "a"):
        path.chmod(0o000)
    assert trash.throw("a")
    assert trash.empty(MANY).stuck == []
    assert left(parent) == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".trash"])
def test_only_names_are_taken(trash: Trash, name: str) -> None:
    """Nothing outside of the directory can be named."""
    with pytest.raises(ValueError, match="is not a name"):
        trash.throw(name)


def test_what_is_used_counts_blocks_of_files_and_no_links(parent: Path, tmp_path: Path) -> None:
    """What a link leads to is somebody else's; a bound on the entries holds."""
    (tmp_path / "stranger" / "big").write_bytes(bytes(10**6))
    (parent / "a" / "b").mkdir(parents=True)
    (parent / "a" / "link").symlink_to(tmp_path / "stranger")
    (parent / "a" / "b" / "file").write_bytes(bytes(300_000))
    used = used_bytes(parent / "a", MANY)
    assert 300_000 <= used < 500_000
    assert used_bytes(parent / "nowhere", MANY) == 0
    assert used_bytes(parent / "a" / "link", MANY) == 0
    assert used_bytes(parent / "a", 1) < used
