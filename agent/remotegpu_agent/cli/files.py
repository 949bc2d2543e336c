"""Reading what the operator names on the command line, with errors that say what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from remotegpu_agent.cli.exits import Exit, Stop
from remotegpu_schemas import limits

STDIN_NAME = "standard input"


def read_task_file(name: str) -> tuple[str, bytes]:
    """The name for messages and the bytes; `-` is standard input. Reads one byte above the bound at most."""
    most = limits.TASK_FILE_MAX_BYTES + 1
    if name == "-":
        return STDIN_NAME, sys.stdin.buffer.read(most)
    path = Path(name)
    if os.path.isdir(path):
        raise Stop(Exit.USAGE, f"{name}: is a directory; name the files in it")
    try:
        with path.open("rb") as file:
            return name, file.read(most)
    except FileNotFoundError:
        raise Stop(Exit.USAGE, f"{name}: there is no such file{_hint(name)}") from None
    except OSError as error:
        raise Stop(Exit.USAGE, f"{name}: cannot be read: {error.strerror or error}") from None


def _hint(name: str) -> str:
    """Who types `submit nvidia-smi` means a command."""
    import shutil

    return f"; to run the command, write: remotegpu-agent submit -- {name}" if shutil.which(name) else ""
