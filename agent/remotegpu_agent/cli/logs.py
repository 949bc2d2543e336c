"""`logs`: the output of a task."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from remotegpu_agent.cli.context import globals_of
from remotegpu_agent.cli.exits import Exit, Stop


def logs(
    context: typer.Context,
    task_id: Annotated[str, typer.Argument(metavar="ID", help="The task, by id or unique prefix.")],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the output ends.")] = False,
    stderr: Annotated[bool, typer.Option("--stderr", help="Standard error instead of standard output.")] = False,
    since_offset: Annotated[
        int, typer.Option("--since-offset", metavar="N", help="From this byte on; negative counts from the end.")
    ] = 0,
    run: Annotated[
        int | None, typer.Option("--run", "--attempt", metavar="N", min=1, help="Of this run; default: the last.")
    ] = None,
) -> None:
    """Print the output of a task.

    Example: remotegpu-agent logs -f --stderr 0198a2
    """
    from remotegpu_agent.cli import output
    from remotegpu_agent.cli.following import follow_run, read_run

    options = globals_of(context)
    if follow and options.is_json:
        raise Stop(Exit.USAGE, "--json is one document and -f has no end; use one of them")
    client = options.client()
    stream = "stderr" if stderr else "stdout"
    if follow:
        for text in follow_run(client, task_id, stream, since_offset, run):
            sys.stdout.write(text)
            sys.stdout.flush()
        return
    chunks = read_run(client, task_id, stream, since_offset, run)
    if options.is_json:
        found = list(chunks)
        text = "".join(str(chunk.get("text", "")) for chunk in found)
        output.print_json({**found[-1], "offset": found[0].get("offset"), "text": text})
        return
    for chunk in chunks:
        sys.stdout.write(str(chunk.get("text", "")))
    sys.stdout.flush()
