"""`token`: tokens for the agent's own API."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from remotegpu_agent.cli.arguments import Option
from remotegpu_agent.cli.context import Globals, say
from remotegpu_agent.cli.exits import Exit, Stop


def new(
    options: Globals,
    name: Annotated[str, Option("--name", text="Who it is for; stands in the audit log.")] = "operator",
    role: Annotated[
        str, Option("--role", metavar="operate|read", choices=("operate", "read"), text="What it may do.")
    ] = "operate",
    append: Annotated[
        Path | None, Option("--append", metavar="FILE", text="Add its line to this file (made with mode 0600).")
    ] = None,
) -> None:
    """Make a token and print it; the line for api.tokens_file is name:role:token.

    Example: remotegpu-agent token new --name grafana --role read --append /etc/remotegpu-agent/tokens
    """
    import secrets

    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", name):
        raise Stop(Exit.USAGE, f"--name: {name[:40]!r} is no name: letters, digits and . _ @ - only, at most 64")
    token = secrets.token_urlsafe(32)
    line = f"{name}:{role}:{token}"
    if append is not None:
        append_line(append, line)
    if options.is_json:
        from remotegpu_agent.cli.output import print_json

        print_json({"name": name, "role": role, "token": token, "line": line})
    elif append is not None:
        print(token)
        say(f"added to {append}; a running agent takes it within seconds")
    else:
        print(line)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file that only its owner may read; it is on disk when this returns. Raises Stop."""
    import os

    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path, flags, 0o600), "r+b", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            needs_break = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
            file.write(("\n" if needs_break else "").encode() + line.encode() + b"\n")
            os.fsync(file.fileno())
    except OSError as error:
        raise Stop(Exit.FAILED, f"{path}: cannot be written: {error.strerror or error}") from None
