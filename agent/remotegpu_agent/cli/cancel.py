"""`cancel`: ask for the end of tasks."""

from __future__ import annotations

from typing import Annotated, Any

from remotegpu_agent.cli.arguments import Argument
from remotegpu_agent.cli.asking import ask_each
from remotegpu_agent.cli.context import Globals


def cancel(
    options: Globals,
    ids: Annotated[list[str], Argument(metavar="ID...", text="Tasks, by id or unique prefix.")],
) -> int:
    """Cancel tasks: one that waits ends at once, one that runs gets its stop signal and its grace period.

    What cannot be cancelled is named, and the others are cancelled all the same.

    Example: remotegpu-agent cancel 0198a2
    """
    return ask_each(options, ids, "cancel", _what)


def _what(view: dict[str, Any]) -> str:
    is_final = view.get("state") in {"completed", "failed", "cancelled"}
    return str(view.get("state")) if is_final else "is being stopped"
