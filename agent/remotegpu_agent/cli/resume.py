"""`resume`: let suspended tasks go on."""

from __future__ import annotations

from typing import Annotated

from remotegpu_agent.cli.arguments import Argument
from remotegpu_agent.cli.asking import ask_each
from remotegpu_agent.cli.context import Globals


def resume(
    options: Globals,
    ids: Annotated[list[str], Argument(metavar="ID...", text="Tasks, by id or unique prefix.")],
) -> int:
    """Let suspended tasks go on where they stood. What is not suspended is named.

    Example: remotegpu-agent resume 0198a2
    """
    return ask_each(options, ids, "resume", lambda view: str(view.get("state")))
