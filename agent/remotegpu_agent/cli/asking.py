"""What the verbs that ask something of several things share: each for itself, and the refused ones named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from remotegpu_agent.cli.context import Globals, say
from remotegpu_agent.cli.exits import Exit, RefusedByAgent

if TYPE_CHECKING:
    from remotegpu_agent.cli.client import Client

View = dict[str, Any]


def ask_each(options: Globals, ids: Sequence[str], call: str, what: Callable[[View], str]) -> int:
    """POST /tasks/{id}/CALL for each of the tasks; `what` says of an answer what has become of the task.

    What is refused is named, and the others are asked all the same. Raises Stop.
    """
    from remotegpu_agent.cli.client import task_path

    return call_each(
        options,
        [(task_id, task_path(task_id, call)) for task_id in ids],
        lambda client, path: client.post(path),
        "tasks",
        lambda view: f"task {view.get('id')} {what(view)}",
    )


def call_each(
    options: Globals,
    paths: Sequence[tuple[str, str]],
    call: Callable[[Client, str], View],
    plural: str,
    sentence: Callable[[View], str],
) -> int:
    """Call each path, given with what was typed for it; `plural` is the key of all answers in JSON.

    `sentence` says of an answer what has happened. What is refused is named by what was typed, and the others are
    called all the same. Raises Stop.
    """
    from remotegpu_agent.cli import output

    client, views, code = options.client(), [], Exit.DONE
    for typed, path in paths:
        try:
            view = call(client, path)
        except RefusedByAgent as refusal:
            code = code or refusal.code
            say(f"remotegpu-agent: {typed}: {refusal}")
            continue
        views.append(view)
        if not options.is_json:
            print(sentence(view), flush=True)
    if options.is_json:
        output.print_json({plural: views})
    return code
