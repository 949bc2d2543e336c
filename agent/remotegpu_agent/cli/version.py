"""`version`: of this program."""

from __future__ import annotations

import platform

from remotegpu_agent import VERSION
from remotegpu_agent.cli.context import Globals


def version(options: Globals) -> None:
    """Print the version of this program and of its Python.

    Example: remotegpu-agent version --json
    """
    if options.is_json:
        from remotegpu_agent.cli.output import print_json

        print_json({"version": VERSION, "python": platform.python_version()})
        return
    print(f"remotegpu-agent {VERSION} (Python {platform.python_version()})")
