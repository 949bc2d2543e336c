"""A gate at which a task's script waits until the test opens it."""

from __future__ import annotations

from pathlib import Path


class Gate:
    """A file that is there once the gate is open; `wait` is the shell's side."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def wait(self) -> str:
        """A shell command that returns once the gate is open."""
        return f"until [ -e '{self._path}' ]; do sleep 0.02; done"

    def open(self) -> None:
        """Let everybody through, from now on."""
        self._path.touch()
