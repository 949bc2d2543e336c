"""What the verbs that ask something of tasks share: each task for itself, and the refused ones named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from remotegpu_agent.cli.context import Globals, say
from remotegpu_agent.cli.exits import Exit, RefusedByAgent


def ask_each(options: Globals, ids: Sequence[str], call: str, what: Callable[[dict[str, Any]], str]) -> int:
    """POST /tasks/{id}/CALL for each of the tasks; `what` says of an answer what has become of the task.

    What is refused is named, and the others are asked all the same. Raises Stop.
    """
    from remotegpu_agent.cli import output
    from remotegpu_agent.cli.client import task_path

    paths = [task_path(task_id, call) for task_id in ids]
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
            print(f"task {view.get('id')} {what(view)}", flush=True)
    if options.is_json:
        output.print_json({"tasks": views})
    return code
