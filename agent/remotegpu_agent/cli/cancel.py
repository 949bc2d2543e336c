"""`cancel`: ask for the end of tasks."""

from __future__ import annotations

from typing import Annotated

from remotegpu_agent.cli.arguments import Argument
from remotegpu_agent.cli.context import Globals, say
from remotegpu_agent.cli.exits import Exit, RefusedByAgent


def cancel(
    options: Globals,
    ids: Annotated[list[str], Argument(metavar="ID...", text="Tasks, by id or unique prefix.")],
) -> int:
    """Cancel tasks: one that waits ends at once, one that runs gets its stop signal and its grace period.

    What cannot be cancelled is named, and the others are cancelled all the same.

    Example: remotegpu-agent cancel 0198a2
    """
    from remotegpu_agent.cli import output
    from remotegpu_agent.cli.client import task_path

    paths = [task_path(task_id, "cancel") for task_id in ids]
    client = options.client()
    views = []
    code = Exit.DONE
    for task_id, path in zip(ids, paths, strict=True):
        try:
            view = client.post(path)
        except RefusedByAgent as refusal:
            code = code or refusal.code
            say(f"remotegpu-agent: {task_id}: {refusal}")
            continue
        views.append(view)
        if not options.is_json:
            is_final = view.get("state") in {"completed", "failed", "cancelled"}
            print(f"task {view.get('id')} {view.get('state') if is_final else 'is being stopped'}", flush=True)
    if options.is_json:
        output.print_json({"tasks": views})
    return code
