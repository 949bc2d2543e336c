"""`suspend`: let running tasks stand still."""

from __future__ import annotations

from typing import Annotated

from remotegpu_agent.cli.arguments import Argument
from remotegpu_agent.cli.asking import ask_each
from remotegpu_agent.cli.context import Globals


def suspend(
    options: Globals,
    ids: Annotated[list[str], Argument(metavar="ID...", text="Tasks, by id or unique prefix.")],
) -> int:
    """Suspend running tasks: all their processes stand still, and keep their memory, GPUs and lease.

    A task's timeout stands still as well. `resume` lets it go on, `cancel` ends it. What does not run is named.

    Example: remotegpu-agent suspend 0198a2
    """
    return ask_each(options, ids, "suspend", lambda view: str(view.get("state")))
