"""The program `remotegpu-agent`: global options, the verbs, and the one place that no exception passes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

from remotegpu_agent.cli import (
    cancel,
    config,
    database,
    dead_letters,
    doctor,
    drain,
    logs,
    openapi,
    resume,
    run,
    setup,
    show,
    status,
    submit,
    suspend,
    tasks,
    token,
    validate,
    version,
    wait,
)
from remotegpu_agent.cli.arguments import PROGRAM, Verb, call, new_parser, usage_error
from remotegpu_agent.cli.context import Globals
from remotegpu_agent.cli.exits import Exit, Stop

DEBUG_VARIABLE: Final = "REMOTEGPU_AGENT_DEBUG"

VERBS: Final[Mapping[str, Verb]] = {
    "run": run.run,
    "submit": submit.submit,
    "validate": validate.validate,
    "wait": wait.wait,
    "list": tasks.list_tasks,
    "show": show.show,
    "logs": logs.logs,
    "cancel": cancel.cancel,
    "suspend": suspend.suspend,
    "resume": resume.resume,
    "status": status.status,
    "drain": drain.drain,
    "undrain": drain.undrain,
    "dead-letters list": dead_letters.list_letters,
    "dead-letters show": dead_letters.show,
    "dead-letters resend": dead_letters.resend,
    "dead-letters drop": dead_letters.drop,
    "doctor": doctor.doctor,
    "config show": config.show,
    "config check": config.check,
    "config path": config.path,
    "db check": database.check,
    "db backup": database.backup,
    "setup": setup.setup,
    "token new": token.new,
    "openapi": openapi.openapi,
    "version": version.version,
}
"""To add a verb: a file with its function, and a line here."""

_GROUPS: Final = frozenset(name.partition(" ")[0] for name in VERBS if " " in name)
_FLAGS: Final = frozenset({"--json", "--no-color"})
_VALUED: Final = frozenset({"--config", "--url", "--token-file"})
_OWN_OPTIONS: Final = {"setup": frozenset({"--url", "--token-file"})}
"""Verbs that give one of these names a meaning of their own."""
_HELP: Final = frozenset({"-h", "--help"})


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program and exit; whatever happens, one message and no traceback (unless REMOTEGPU_AGENT_DEBUG is 1)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _prepare_streams()
    code, message = _outcome(given)
    if code not in {Exit.DONE, Exit.INTERRUPTED} and message is not None and is_waiting(given):
        code = Exit.OURS
    try:
        if message:
            print(message if code == Exit.INTERRUPTED else f"{PROGRAM}: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError as error:
        code = code or _output_failed(error, given)
        _close_output()
    sys.exit(code)


def _outcome(given: list[str]) -> tuple[int, str | None]:
    """The exit code, and what there is to say if it is ours and not the task's."""
    try:
        return _run(given), None
    except Stop as stop:
        return stop.code, str(stop)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED, "interrupted"
    except BrokenPipeError:
        _close_output()
        return Exit.FAILED, ""
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE) == "1":
            raise
        kind, text = type(error).__name__, " ".join(str(error).split())[:300]
        return (
            Exit.FAILED,
            f"a mistake in this program: {kind}: {text}. Please report it with what {DEBUG_VARIABLE}=1 shows",
        )


def _run(given: list[str]) -> int:
    front, command = split_command(given)
    before, rest = separate(front)
    parser = new_parser(PROGRAM, _description(), f"{PROGRAM} [OPTION...] VERB ...")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the config (/etc/remotegpu-agent/config.yaml)")
    parser.add_argument("--json", dest="is_json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--no-color", dest="is_plain", action="store_true", help="plain text, also on a terminal")
    parser.add_argument("--url", metavar="URL", help="an agent's API, such as http://127.0.0.1:8090")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="the file with the token for --url")
    options = Globals(command=command, **vars(parser.parse_args(before)))
    if not rest or rest[0] in _HELP:
        parser.print_help(sys.stdout if rest else sys.stderr)
        return Exit.DONE if rest else Exit.USAGE
    name, words = _named(rest)
    if name in _GROUPS:
        print(_description(f"{name} "))
        return Exit.DONE
    if not _HELP.isdisjoint(words):
        words = ["--help"]
    try:
        return call(VERBS[name], name, options, words)
    except SystemExit:  # how argparse ends after --help
        return Exit.DONE


def _named(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb's name and what stands behind it; a group's own name if its help is wanted. Raises Stop."""
    first = words[0]
    if first.startswith("-"):
        raise usage_error(PROGRAM, f"there is no option {first[:40]!r} before the verb")
    if first not in _GROUPS:
        if first not in VERBS:
            raise _unknown_verb(first, sorted({*VERBS, *_GROUPS}))
        return first, list(words[1:])
    if len(words) > 1 and words[1] in _HELP:
        return first, []
    choices = [name.removeprefix(f"{first} ") for name in VERBS if name.startswith(f"{first} ")]
    if len(words) == 1:
        raise usage_error(PROGRAM, f"'{first}' needs one of: {', '.join(choices)}")
    if words[1] not in choices:
        raise _unknown_verb(words[1], choices)
    return f"{first} {words[1]}", list(words[2:])


def _unknown_verb(word: str, choices: Sequence[str]) -> Stop:
    import difflib

    near = difflib.get_close_matches(word, choices, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return usage_error(PROGRAM, f"there is no verb {word[:40]!r} in this version{hint}")


def _description(prefix: str = "") -> str:
    lines = [
        "Runs tasks on GPU hosts: claims them under leases, supervises their processes, reports every result.",
        "",
        "verbs:",
    ]
    for name, verb in VERBS.items():
        if name.startswith(prefix):
            summary = (verb.__doc__ or "").strip().split("\n", maxsplit=1)[0]
            lines.append(f"  {name:<13} {summary}")
    end = f"`{PROGRAM} VERB --help` shows an example of each verb. The options below may also stand behind the verb."
    return "\n".join([*lines, "", end] if not prefix else lines)


def split_command(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """The arguments before `--`, and for `submit` those behind it; other verbs keep theirs."""
    if "--" not in arguments:
        return arguments, None
    at = arguments.index("--")
    if _verb_of(arguments[:at]) != "submit":
        return arguments, None
    return arguments[:at], arguments[at + 1 :]


def separate(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Global options, wherever they stand, and the rest: `list --json` works as `--json list` does."""
    own = _OWN_OPTIONS.get(_verb_of(arguments) or "", frozenset())
    before: list[str] = []
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if word == "--":
            rest += [word, *queue]
            break
        # Before the verb these names are nobody's own.
        valued = _VALUED - own if rest else _VALUED
        if word in _FLAGS or word.partition("=")[0] in valued:
            before.append(word)
            if word in valued:
                before += queue[:1]
                del queue[:1]
        else:
            rest.append(word)
    return before, rest


def is_waiting(arguments: Sequence[str]) -> bool:
    """Whether the exit code is a task's own, so that ours must differ from it."""
    front, _ = split_command(list(arguments))
    verb = _verb_of(front)
    return verb == "wait" or (verb == "submit" and not {"--wait", "--follow"}.isdisjoint(front))


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


def _prepare_streams() -> None:
    """Text that a stream cannot hold is written as escapes; a stream that the caller closed swallows all."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open to the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _output_failed(error: OSError, given: Sequence[str]) -> Exit:
    """The results did not arrive: a full disk, or a reader that left early (which is its own affair)."""
    if not isinstance(error, BrokenPipeError):
        with contextlib.suppress(OSError):
            print(f"{PROGRAM}: cannot write the output: {error.strerror or error}", file=sys.stderr, flush=True)
    return Exit.OURS if is_waiting(given) else Exit.FAILED


def _close_output() -> None:
    """Nobody takes our output; keep the interpreter from complaining about that at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(devnull, descriptor)
