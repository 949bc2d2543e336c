"""`validate`: check task files without submitting them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from remotegpu_agent.cli.arguments import Argument
from remotegpu_agent.cli.context import Globals, say
from remotegpu_agent.cli.exits import Exit, Stop

_SUFFIXES = frozenset({".yaml", ".yml", ".json"})


def validate(
    options: Globals,
    paths: Annotated[
        list[Path], Argument(metavar="FILE|DIR...", text="Task files; of a directory its .yaml, .yml and .json.")
    ],
) -> int:
    """Check task files; all mistakes of all files, with line and column. Exit code 2 if there are any.

    Example: remotegpu-agent validate tasks/ nightly.yaml
    """
    from remotegpu_agent.cli import output
    from remotegpu_agent.cli.files import read_task_file
    from remotegpu_schemas.problems import InvalidFile, render_report
    from remotegpu_schemas.taskfile import load_task_file

    results = []
    reports = []
    for path in _files(paths):
        name, text = read_task_file(str(path))
        try:
            count = len(load_task_file(text, name))
        except InvalidFile as error:
            problems = [
                {"line": problem.line, "column": problem.column, "message": problem.message}
                for problem in error.problems
            ]
            results.append({"file": name, "tasks": 0, "problems": problems})
            reports.append(render_report(error.problems, "this file cannot be used"))
        else:
            results.append({"file": name, "tasks": count, "problems": []})
    if options.is_json:
        output.print_json({"files": results})
    else:
        for result in results:
            if not result["problems"]:
                print(f"{result['file']}: good, {result['tasks']} task{'' if result['tasks'] == 1 else 's'}")
        for report in reports:
            say(report)
    if reports:
        say(f"{len(reports)} of {len(results)} file{'' if len(results) == 1 else 's'} cannot be used.")
        return Exit.USAGE
    return Exit.DONE


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        try:
            found = sorted(child for child in path.iterdir() if child.suffix in _SUFFIXES and child.is_file())
        except OSError as error:
            raise Stop(Exit.USAGE, f"{path}: the directory cannot be read: {error.strerror or error}") from None
        if not found:
            raise Stop(Exit.USAGE, f"{path}: there is no .yaml, .yml or .json file in this directory")
        yield from found
