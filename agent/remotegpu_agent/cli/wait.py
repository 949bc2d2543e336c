"""`wait`: until tasks have ended."""

from __future__ import annotations

from typing import Annotated

import typer

from remotegpu_agent.cli.context import globals_of, say


def wait(
    context: typer.Context,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Tasks, by id or unique prefix.")],
) -> None:
    """Wait until all the tasks have ended.

    The exit code is the task's own (128 + n for a signal, 124 timed out, 125 for anything of ours); the highest of
    several.

    Example: remotegpu-agent wait 0198a2 0198a3
    """
    from remotegpu_agent.cli import output
    from remotegpu_agent.cli.following import describe_end, exit_code_of, wait_for, worst

    options = globals_of(context)
    client = options.client()
    details = []
    for task_id in ids:
        details.append(wait_for(client, task_id))
        say(describe_end(details[-1]))
    code = worst([exit_code_of(detail) for detail in details])
    if options.is_json:
        output.print_json({"tasks": details, "exit_code": code})
    raise typer.Exit(code)
