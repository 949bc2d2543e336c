"""`token`: tokens for the agent's own API."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from remotegpu_agent.cli.context import globals_of, say
from remotegpu_agent.cli.exits import Exit, Stop

app = typer.Typer(help="Tokens for the agent's API.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _token() -> None:
    pass


@app.command("new")
def new(
    context: typer.Context,
    name: Annotated[str, typer.Option("--name", help="Who it is for; stands in the audit log.")] = "operator",
    role: Annotated[str, typer.Option("--role", metavar="operate|read", help="What it may do.")] = "operate",
    append: Annotated[
        Path | None, typer.Option("--append", metavar="FILE", help="Add its line to this file (made with mode 0600).")
    ] = None,
) -> None:
    """Make a token and print it; the line for api.tokens_file is name:role:token.

    Example: remotegpu-agent token new --name grafana --role read --append /etc/remotegpu-agent/tokens
    """
    import secrets

    if role not in {"operate", "read"}:
        raise typer.BadParameter(f"there is no role {role[:40]!r}; use 'operate' or 'read'", param_hint="'--role'")
    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", name):
        raise typer.BadParameter("letters, digits and . _ @ - only, at most 64", param_hint="'--name'")
    token = secrets.token_urlsafe(32)
    line = f"{name}:{role}:{token}"
    if append is not None:
        append_line(append, line)
    if globals_of(context).is_json:
        from remotegpu_agent.cli.output import print_json

        print_json({"name": name, "role": role, "token": token, "line": line})
    elif append is not None:
        print(token)
        say(f"added to {append}; the agent reads it when it starts")
    else:
        print(line)


def append_line(path: Path, line: str, mode: Literal[0o600] = 0o600) -> None:
    """Add a line to a file that only its owner may read; it is on disk when this returns. Raises Stop."""
    import os

    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path, flags, mode), "r+b", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            needs_break = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
            file.write(("\n" if needs_break else "").encode() + line.encode() + b"\n")
            os.fsync(file.fileno())
    except OSError as error:
        raise Stop(Exit.FAILED, f"{path}: cannot be written: {error.strerror or error}") from None
