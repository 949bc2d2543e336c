"""Removes directories that tasks have filled, with whatever they planted there: links, mounts, endless depth.

What is thrown away is first renamed into `.trash`, which only the agent may enter; from there it is taken apart a
bounded piece at a time. A directory is entered only after it could be renamed there, so that nothing is removed behind
a mount point (rename(2) gives EBUSY), and no link is ever followed. Knows neither tasks nor the database.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_NAME: Final = ".trash"
_PIECE: Final = 1000
_SHOWN_CHARS: Final = 80
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass
class Emptied:
    """What one piece of work came to; `stuck` are sentences about what cannot be removed."""

    removed: int = 0
    has_more: bool = False
    stuck: list[str] = field(default_factory=list)


class Trash:
    """The trash of one directory: `throw` names of it away, then `empty` until nothing is left."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._path = parent / _NAME

    def throw(self, name: str) -> bool:
        """Move `<parent>/<name>` out of the way, at once; False if there is none. Raises OSError."""
        if "/" in name or name in {"", ".", "..", _NAME}:
            raise ValueError(f"{name!r} is not a name")
        with contextlib.suppress(FileExistsError):
            self._path.mkdir(mode=0o700)
        source, target = self._parent / name, self._path / secrets.token_hex(16)
        try:
            try:
                os.rename(source, target)
            except PermissionError:
                os.chmod(source, 0o700)  # as in `_lift`; the parent is the agent's: no task can put a link there
                os.rename(source, target)
        except FileNotFoundError:
            return False
        return True

    def empty(self, entries_max: int) -> Emptied:
        """Remove at most about so many entries. Safe to repeat, and after a crash in the middle. Raises OSError."""
        done = Emptied()
        try:
            top = os.open(self._path, _DIRECTORY)
        except FileNotFoundError:
            return done
        try:
            waiting = os.listdir(top)
            while waiting:
                if done.removed >= entries_max:
                    done.has_more = True
                    break
                name = waiting.pop()
                try:
                    waiting += _remove(top, name, done)
                except OSError as error:
                    done.stuck.append(f"{self._path / name}: {error.strerror or error}")
        finally:
            os.close(top)
        return done


def _remove(top: int, name: str, done: Emptied) -> list[str]:
    """Remove an entry of the trash, or a piece of it; returns what has to be looked at (again). Raises OSError."""
    try:
        os.unlink(name, dir_fd=top)
    except IsADirectoryError:
        pass
    else:
        done.removed += 1
        return []
    fd = _enter(top, name)
    try:
        with os.scandir(fd) as entries:
            piece = list(itertools.islice(entries, _PIECE))
        lifted, stuck = _take_apart(piece, fd, top)
    finally:
        os.close(fd)
    done.removed += len(piece) - len(stuck)
    done.stuck += [f"{name}/{reason}" for reason in stuck]
    if len(piece) == _PIECE and len(stuck) < _PIECE:
        return [name, *lifted]
    if not stuck:
        os.rmdir(name, dir_fd=top)
        done.removed += 1
    return lifted


def _take_apart(piece: list[os.DirEntry[str]], fd: int, top: int) -> tuple[list[str], list[str]]:
    """Remove files, lift directories; returns the new names of these, and what could be neither."""
    lifted: list[str] = []
    stuck: list[str] = []
    for entry in piece:
        try:
            if entry.is_dir(follow_symlinks=False):
                lifted.append(_lift(entry.name, fd, top))
            else:
                os.unlink(entry.name, dir_fd=fd)
        except OSError as error:
            stuck.append(f"{entry.name[:_SHOWN_CHARS]}: {error.strerror or error}")
    return lifted, stuck


def _enter(top: int, name: str) -> int:
    with contextlib.suppress(PermissionError):
        os.chmod(name, 0o700, dir_fd=top)  # its owner may have closed it; here nobody can put a link in its place
    return os.open(name, _DIRECTORY, dir_fd=top)


def _lift(name: str, source: int, top: int) -> str:
    """Move a directory to the top of the trash, so that depth costs neither descriptors nor recursion."""
    lifted = secrets.token_hex(16)
    try:
        os.rename(name, lifted, src_dir_fd=source, dst_dir_fd=top)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=source)  # a directory moves only if its own `..` may be written
        os.rename(name, lifted, src_dir_fd=source, dst_dir_fd=top)
    return lifted


def used_bytes(path: Path, entries_max: int) -> int:
    """What a tree occupies, as far as so many entries of it go. Follows no link; what cannot be read counts nothing."""
    total, seen, waiting = 0, 0, [path]
    while waiting and seen < entries_max:
        current = waiting.pop()
        with contextlib.suppress(OSError):
            fd = os.open(current, _DIRECTORY)
            try:
                with os.scandir(fd) as entries:
                    for entry in itertools.islice(entries, entries_max - seen):
                        seen += 1
                        if entry.is_dir(follow_symlinks=False):
                            waiting.append(current / entry.name)
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
            finally:
                os.close(fd)
    return total
