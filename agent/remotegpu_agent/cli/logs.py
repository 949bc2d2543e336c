"""`logs`: the output of a task."""

from __future__ import annotations

import sys
from typing import Annotated

from remotegpu_agent.cli.arguments import Argument, Option
from remotegpu_agent.cli.context import Globals
from remotegpu_agent.cli.exits import Exit, Stop


def logs(
    options: Globals,
    task_id: Annotated[str, Argument(metavar="ID", text="The task, by id or unique prefix.")],
    follow: Annotated[bool, Option("-f", "--follow", text="Go on until the output ends.")] = False,
    stderr: Annotated[bool, Option("--stderr", text="Standard error instead of standard output.")] = False,
    since_offset: Annotated[
        int, Option("--since-offset", metavar="N", text="From this byte on; negative counts from the end.")
    ] = 0,
    run: Annotated[
        int | None, Option("--run", "--attempt", metavar="N", least=1, text="Of this run; default: the last.")
    ] = None,
) -> None:
    """Print the output of a task.

    Example: remotegpu-agent logs -f --stderr 0198a2
    """
    from remotegpu_agent.cli import output
    from remotegpu_agent.cli.client import task_path
    from remotegpu_agent.cli.following import follow_run, last_run, read_run

    if follow and options.is_json:
        raise Stop(Exit.USAGE, "--json is one document and -f has no end; use one of them")
    path = task_path(task_id)
    client = options.client()
    stream = "stderr" if stderr else "stdout"
    if follow:
        path, run = last_run(client, path, run)
        for text in follow_run(client, path, stream, since_offset, run):
            sys.stdout.write(text)
            sys.stdout.flush()
        return
    chunks = read_run(client, path, stream, since_offset, run)
    if options.is_json:
        found = list(chunks)
        text = "".join(str(chunk.get("text", "")) for chunk in found)
        output.print_json({**found[-1], "offset": found[0].get("offset"), "text": text})
        return
    for chunk in chunks:
        sys.stdout.write(str(chunk.get("text", "")))
    sys.stdout.flush()
