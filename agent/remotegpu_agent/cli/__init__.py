"""The command line: one verb a file. What is heavy is imported inside of the functions that need it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit. Interrupted even while it loads, it ends without a traceback."""
    try:
        from remotegpu_agent.cli.app import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run(arguments)


__all__ = ["main"]
