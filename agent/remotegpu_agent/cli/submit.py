"""`submit`: task files, or one command, to the agent on this host."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from remotegpu_agent.cli.arguments import Argument, Option
from remotegpu_agent.cli.context import Globals, say
from remotegpu_agent.cli.exits import INVALID_PARAMETERS, Broken, Exit, RefusedByAgent, Stop, Unreachable
from remotegpu_schemas import limits

if TYPE_CHECKING:
    from remotegpu_agent.cli.client import Client

_YAML = "application/yaml"
_JSON = "application/json"
_REPORT_LINE = re.compile(r"^body:\d+:\d+: (.*)$", re.MULTILINE)
_BODY = re.compile(r"^body(?=:)", re.MULTILINE)


@dataclass(frozen=True)
class Body:
    """What is sent at once: a file under its name, or a command without one; `count` is its tasks."""

    name: str | None
    content: bytes
    count: int = 1


def submit(
    options: Globals,
    files: Annotated[
        list[str] | None, Argument(metavar="FILE...", text="Task files; - is standard input. Or: -- CMD ARG...")
    ] = None,
    wait: Annotated[bool, Option("--wait", text="Wait, and end with the task's exit code.")] = False,
    follow: Annotated[bool, Option("--follow", text="Show the output as it comes, then end as --wait.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", text="Check, and show what would be submitted.")] = False,
    priority: Annotated[
        int | None, Option("--priority", least=1, most=10, text="1 is the most urgent, over what the file says.")
    ] = None,
    gpus: Annotated[int | None, Option("--gpus", least=0, most=64, text="For a command: so many GPUs.")] = None,
    name: Annotated[str | None, Option("--name", text="For a command: the task's name.")] = None,
    env: Annotated[list[str] | None, Option("--env", metavar="K=V", text="For a command; repeatable.")] = None,
    timeout: Annotated[str | None, Option("--timeout", text="For a command: such as 90s, 10m, 24h.")] = None,
    workdir: Annotated[str | None, Option("--workdir", metavar="DIR", text="For a command.")] = None,
) -> int:
    """Submit the tasks of files, or one command behind `--`.

    All files are checked before the first is sent. With --wait or --follow the exit code is the task's own (128 + n
    for a signal, 124 timed out), 125 for anything that is not the task's doing; the highest of several.

    Examples: remotegpu-agent submit --wait train.yaml

    remotegpu-agent submit --gpus 1 --timeout 2h --follow -- python train.py --epochs 3
    """
    bodies = _bodies(options, files or [], priority, gpus, name, env or [], timeout, workdir)
    if dry_run:
        _show_dry_run(options, bodies)
        return Exit.DONE
    return _submit(options, bodies, waits=wait or follow, follows=follow)


def _bodies(
    options: Globals,
    files: Sequence[str],
    priority: int | None,
    gpus: int | None,
    name: str | None,
    env: Sequence[str],
    timeout: str | None,
    workdir: str | None,
) -> list[Body]:
    """What is to be sent, all of it checked."""
    command = options.command
    if command is not None and files:
        raise Stop(Exit.USAGE, "give task files, or a command behind --, not both")
    if command is not None:
        return [Body(None, _command_body(command, priority, gpus, name, env, timeout, workdir))]
    if not files:
        raise Stop(
            Exit.USAGE,
            "nothing to submit: name task files (- is standard input), or write a command behind --, as in "
            "remotegpu-agent submit -- nvidia-smi",
        )
    given = {"--gpus": gpus, "--name": name, "--env": env or None, "--timeout": timeout, "--workdir": workdir}
    misplaced = [option for option, value in given.items() if value is not None]
    if misplaced:
        raise Stop(Exit.USAGE, f"{', '.join(misplaced)}: for a command behind -- only; write it into the task file")
    return _file_bodies(files, priority)


def _command_body(
    command: Sequence[str],
    priority: int | None,
    gpus: int | None,
    name: str | None,
    env: Sequence[str],
    timeout: str | None,
    workdir: str | None,
) -> bytes:
    if not command:
        raise Stop(Exit.USAGE, "there is no command behind --; write for example: remotegpu-agent submit -- nvidia-smi")
    task: dict[str, Any] = {"command": command[0], "args": list(command[1:])}
    if env:
        task["env"] = dict(_variable(text) for text in env)
    if gpus is not None:
        task["resources"] = {"gpus": gpus}
    given = {"priority": priority, "name": name, "timeout": timeout, "workdir": workdir and os.path.abspath(workdir)}
    task.update({key: value for key, value in given.items() if value is not None})
    try:
        return json.dumps({"task": task}, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise Stop(Exit.USAGE, "the command has bytes that are not UTF-8; put it into a script") from None


def _variable(text: str) -> tuple[str, str]:
    name, has_value, value = text.partition("=")
    if not has_value or not name:
        raise Stop(Exit.USAGE, f"--env: {text[:40]!r} is not NAME=VALUE")
    return name, value


def _file_bodies(files: Sequence[str], priority: int | None) -> list[Body]:
    """The files, all of them checked. Raises Stop with the report on every file that cannot be used."""
    from remotegpu_agent.cli.files import read_task_file
    from remotegpu_schemas.problems import InvalidFile, Problem, render_report
    from remotegpu_schemas.taskfile import CONSEQUENCE, load_task_file, override_tasks

    bodies: list[Body] = []
    problems: list[Problem] = []
    for file in files:
        name, text = read_task_file(file)
        try:
            count = len(load_task_file(text, name))
        except InvalidFile as error:
            problems += error.problems
        else:
            content = text if priority is None else override_tasks(text, name, {"priority": priority})
            bodies.append(Body(name, content, count))
    if problems:
        raise Stop(Exit.USAGE, render_report(problems, CONSEQUENCE))
    return bodies


def _show_dry_run(options: Globals, bodies: Sequence[Body]) -> None:
    from remotegpu_agent.cli.output import print_json
    from remotegpu_schemas.problems import InvalidFile
    from remotegpu_schemas.task import TaskId
    from remotegpu_schemas.taskfile import load_task_file

    tasks = []
    for body in bodies:
        try:
            submissions = load_task_file(body.content, body.name or "body")
        except InvalidFile as error:
            raise Stop(Exit.USAGE, _messages(str(error))) from None
        for item in submissions:
            task = item.task(TaskId(item.form.id or "unnamed")).model_dump(mode="json", exclude_defaults=True)
            tasks.append({**task, "id": item.form.id})
    if options.is_json:
        print_json({"tasks": tasks})
        return
    for task in tasks:
        print(json.dumps({key: value for key, value in task.items() if value is not None}, ensure_ascii=False))
    say(f"{len(tasks)} task{'' if len(tasks) == 1 else 's'} would be submitted; this was a dry run.")


def _submit(options: Globals, bodies: Sequence[Body], *, waits: bool, follows: bool) -> int:
    from remotegpu_agent.cli import following, output

    if follows and options.is_json:
        raise Stop(Exit.USAGE, "--json is one document, and --follow shows the task's own output; use one of them")
    if follows and sum(body.count for body in bodies) != 1:
        raise Stop(Exit.USAGE, "--follow is for one task; submit them, and follow each by `remotegpu-agent logs -f ID`")
    client = options.client()
    task_ids: list[str] = []
    for body in bodies:
        try:
            new_ids = _post(client, body.name, body.content)
        except Stop:
            if task_ids:
                say(f"submitted before that: {' '.join(task_ids)}")
            raise
        task_ids += new_ids
        if not options.is_json:
            for task_id in new_ids:
                # With --follow standard output is the task's.
                say(f"task {task_id}") if follows else print(task_id, flush=True)
    if not waits:
        if options.is_json:
            output.print_json({"task_ids": task_ids})
        return Exit.DONE
    try:
        if follows:
            following.follow(client, task_ids[0], ("stdout", "stderr"), following.write_output)
        details = [following.wait_for(client, {"id": task_id}) for task_id in task_ids]
    except KeyboardInterrupt:
        say(f"interrupted; the task goes on: remotegpu-agent wait {' '.join(task_ids)}")
        return Exit.INTERRUPTED
    for detail in details:
        say(following.describe_end(detail))
    code = following.worst([following.exit_code_of(detail) for detail in details])
    if options.is_json:
        output.print_json({"task_ids": task_ids, "tasks": details, "exit_code": code})
    return code


def _post(client: Client, name: str | None, body: bytes) -> list[str]:
    try:
        answer = client.post("/tasks", body, _JSON if name is None else _YAML, _whereabouts())
    except Broken as broken:
        hint = "it may have been submitted or not: look with remotegpu-agent list before you repeat it"
        raise Unreachable(f"{broken}; {hint}") from None
    except RefusedByAgent as refusal:
        if refusal.business_code != INVALID_PARAMETERS:
            raise
        if name is None:
            raise Stop(Exit.USAGE, _messages(refusal.text)) from None
        renamed = _BODY.sub(lambda _match: name, refusal.text)
        raise RefusedByAgent(refusal.business_code, renamed) from None
    return [str(task_id) for task_id in answer.get("task_ids", [])]


def _whereabouts() -> list[tuple[str, object]]:
    """The present directory, where a task that runs as its submitter runs. Nothing if it is gone or is not UTF-8."""
    with contextlib.suppress(OSError, UnicodeEncodeError):
        here = os.getcwd()
        if len(here.encode("utf-8")) <= limits.PATH_MAX_CHARS:
            return [("directory", here)]
    return []


def _messages(report: str) -> str:
    """The sentences of a report on a body that nobody wrote by hand; its lines and columns mean nothing to people."""
    return "; ".join(_REPORT_LINE.findall(report)) or report
