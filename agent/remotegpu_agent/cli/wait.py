"""`wait`: until tasks have ended."""

from __future__ import annotations

from typing import Annotated

from remotegpu_agent.cli.arguments import Argument
from remotegpu_agent.cli.context import Globals, say


def wait(
    options: Globals,
    ids: Annotated[list[str], Argument(metavar="ID...", text="Tasks, by id or unique prefix.")],
) -> int:
    """Wait until all the tasks have ended.

    The exit code is the task's own (128 + n for a signal, 124 timed out, 125 for anything of ours); the highest of
    several.

    Example: remotegpu-agent wait 0198a2 0198a3
    """
    from remotegpu_agent.cli import output
    from remotegpu_agent.cli.client import task_path
    from remotegpu_agent.cli.following import describe_end, exit_code_of, wait_for, worst

    client = options.client()
    # An id that fits nothing is told now, not after the task before it has ended; a prefix stays what it means now.
    found = [client.get(task_path(task_id)) for task_id in ids]
    details = []
    for detail in found:
        details.append(wait_for(client, detail))
        say(describe_end(details[-1]))
    code = worst([exit_code_of(detail) for detail in details])
    if options.is_json:
        output.print_json({"tasks": details, "exit_code": code})
    return code
