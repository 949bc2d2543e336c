"""`cancel`: ask for the end of tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from remotegpu_agent.cli.context import globals_of


def cancel(
    context: typer.Context,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Tasks, by id or unique prefix.")],
) -> None:
    """Cancel tasks: one that waits ends at once, one that runs gets its stop signal and its grace period.

    Example: remotegpu-agent cancel 0198a2
    """
    from remotegpu_agent.cli import output
    from remotegpu_agent.cli.client import quote

    options = globals_of(context)
    client = options.client()
    views = [client.post(f"/tasks/{quote(task_id)}/cancel") for task_id in ids]
    if options.is_json:
        output.print_json({"tasks": views})
        return
    for view in views:
        is_final = view.get("state") in {"completed", "failed", "cancelled"}
        print(f"task {view.get('id')} {view.get('state') if is_final else 'is being stopped'}")
