"""The program `remotegpu-agent`: global options, the verbs, and the one place that no exception passes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from remotegpu_agent.cli import (
    cancel,
    config,
    doctor,
    logs,
    run,
    setup,
    show,
    status,
    submit,
    tasks,
    token,
    validate,
    version,
    wait,
)
from remotegpu_agent.cli.context import Globals
from remotegpu_agent.cli.exits import Exit, Stop

PROGRAM: Final = "remotegpu-agent"
DEBUG_VARIABLE: Final = "REMOTEGPU_AGENT_DEBUG"

_FLAGS: Final = frozenset({"--json", "--no-color"})
_VALUED: Final = frozenset({"--config", "--url", "--token-file"})
_OWN_OPTIONS: Final = {"setup": frozenset({"--url", "--token-file"})}
"""Verbs that give one of these names a meaning of their own."""

app = typer.Typer(
    name=PROGRAM,
    help="Runs tasks on GPU hosts: claims them under leases, supervises their processes, reports every result.",
    epilog="`remotegpu-agent VERB --help` shows an example of each verb. The options above may stand behind the verb.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="The config (/etc/remotegpu-agent/config.yaml).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="Plain text, also on a terminal.")] = False,
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="An agent's API, such as http://127.0.0.1:8090.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", metavar="FILE", help="The file with the token for --url.")
    ] = None,
) -> None:
    options = context.ensure_object(Globals)
    options.config, options.is_json, options.is_plain = config, json, no_color
    options.url, options.token_file = url, token_file


app.command("run")(run.run)
app.command("submit")(submit.submit)
app.command("validate")(validate.validate)
app.command("wait")(wait.wait)
app.command("list")(tasks.list_tasks)
app.command("show")(show.show)
app.command("logs")(logs.logs)
app.command("cancel")(cancel.cancel)
app.command("status")(status.status)
app.command("doctor")(doctor.doctor)
app.add_typer(config.app, name="config")
app.command("setup")(setup.setup)
app.add_typer(token.app, name="token")
app.command("version")(version.version)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit; whatever happens, one message and no traceback (unless REMOTEGPU_AGENT_DEBUG is 1)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    front, command = split_command(given)
    try:
        app(hoist(front), prog_name=PROGRAM, obj=Globals(command=command))
    except Stop as stop:
        _leave(stop.code, str(stop))
    except KeyboardInterrupt:
        _leave(Exit.INTERRUPTED, "interrupted")
    except BrokenPipeError:
        _close_output()
        sys.exit(Exit.FAILED)
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        kind, text = type(error).__name__, " ".join(str(error).split())[:300]
        _leave(
            Exit.FAILED,
            f"a mistake in this program: {kind}: {text}. Please report it to the maintainers with what "
            f"{DEBUG_VARIABLE}=1 shows",
        )
    sys.exit(Exit.DONE)


def split_command(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """The arguments before `--`, and for `submit` those behind it; other verbs keep theirs."""
    if "--" not in arguments:
        return arguments, None
    at = arguments.index("--")
    if _verb_of(arguments[:at]) != "submit":
        return arguments, None
    return arguments[:at], arguments[at + 1 :]


def hoist(arguments: list[str]) -> list[str]:
    """Global options moved in front of the verb, so that `list --json` works as `--json list` does."""
    own = _OWN_OPTIONS.get(_verb_of(arguments) or "", frozenset())
    before: list[str] = []
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if word == "--":
            rest += [word, *queue]
            break
        name, has_value, _ = word.partition("=")
        if word in _FLAGS or (name in _VALUED - own and has_value):
            before.append(word)
        elif word in _VALUED - own:
            before += [word, *queue[:1]]
            del queue[:1]
        else:
            rest.append(word)
    return before + rest


def _verb_of(arguments: Sequence[str]) -> str | None:
    is_value = False
    for word in arguments:
        if is_value:
            is_value = False
        elif word in _VALUED:
            is_value = True
        elif not word.startswith("-"):
            return word
    return None


def _leave(code: Exit, message: str) -> NoReturn:
    try:
        print(message if code is Exit.INTERRUPTED else f"{PROGRAM}: {message}", file=sys.stderr)
        sys.stdout.flush()
    except BrokenPipeError:
        _close_output()
    sys.exit(code)


def _close_output() -> None:
    """Whoever read our output is gone; keep the interpreter from complaining about that at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(devnull, descriptor)
