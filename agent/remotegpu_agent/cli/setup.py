"""`setup`: asks what an agent must know, writes its config and token file, and checks them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from remotegpu_agent.cli.context import Globals, globals_of, say
from remotegpu_agent.cli.exits import Exit, Stop

_TOKEN_NAME = "control-plane-token"


def setup(
    context: typer.Context,
    url: Annotated[
        str | None, typer.Option("--url", help='The control plane, such as https://plane.example; "" for none.')
    ] = None,
    machine_id: Annotated[
        str | None, typer.Option("--machine-id", help="The id under which this machine is enrolled there.")
    ] = None,
    token: Annotated[
        str | None, typer.Option("--token", help="The token (visible to others in ps; --token-file is better).")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", metavar="FILE", help="A file that holds the token already.")
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option("--state-dir", metavar="DIR", help="Where the agent keeps its state.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Ask nothing; replace a config that is there (kept as .bak).")
    ] = False,
    from_agent_yaml: Annotated[Path | None, typer.Option("--from-agent-yaml", hidden=True)] = None,
) -> None:
    """Write the config of this agent, asking for what the flags leave out.

    Example: remotegpu-agent setup --url https://plane.example --machine-id gpu-17 --token-file /root/token --yes
    """
    from remotegpu_agent.config import DEFAULT_PATH

    if from_agent_yaml is not None:
        raise Stop(Exit.USAGE, "--from-agent-yaml is not supported by this version; run `setup` without it")
    options = globals_of(context)
    if token is not None and token_file is not None:
        raise Stop(Exit.USAGE, "give --token or --token-file, not both")
    path = (options.config or DEFAULT_PATH).absolute()
    if not yes and not sys.stdin.isatty():
        raise Stop(Exit.USAGE, "setup asks its questions on a terminal, and this is none; give the flags and --yes")
    if path.exists() and not yes and not typer.confirm(f"{path} exists. Replace it (the old one is kept as .bak)?"):
        raise Stop(Exit.FAILED, "nothing was changed")
    if not yes:
        url, machine_id, token, state_dir = _ask(url, machine_id, token, token_file, state_dir)
    written = _write(path, url or None, machine_id, token, token_file, state_dir)
    _check(path, written, options)


def _ask(
    url: str | None, machine_id: str | None, token: str | None, token_file: Path | None, state_dir: Path | None
) -> tuple[str | None, str | None, str | None, Path | None]:
    """The answers to what is still open; an empty answer leaves the default."""
    if url is None:
        url = _prompt("URL of the control plane (empty: none, local tasks only)")
    if url:
        if machine_id is None:
            machine_id = _prompt("machine_id, as this machine is enrolled there")
        if token is None and token_file is None:
            token = _prompt("token (not shown)", is_secret=True)
    if state_dir is None:
        text = _prompt("directory for the agent's state (empty: /var/lib/remotegpu-agent)")
        state_dir = Path(text) if text else None
    return url, machine_id, token, state_dir


def _prompt(question: str, *, is_secret: bool = False) -> str:
    answer: str = typer.prompt(question, default="", show_default=False, hide_input=is_secret, err=True)
    return answer.strip()


def _write(
    path: Path,
    url: str | None,
    machine_id: str | None,
    token: str | None,
    token_file: Path | None,
    state_dir: Path | None,
) -> list[Path]:
    written = []
    if token:
        token_file = path.parent / _TOKEN_NAME
        _replace(token_file, token.strip() + "\n", 0o600)
        written.append(token_file)
    agent = {"machine_id": machine_id or None, "state_dir": str(state_dir.absolute()) if state_dir else None}
    plane = {"url": url, "token_file": str(token_file.absolute()) if token_file else None}
    text = "# Written by `remotegpu-agent setup`. All keys: docs, or `remotegpu-agent config show`.\n"
    text += _section("agent", agent) + _section("control_plane", plane)
    if path.exists():
        backup = path.with_name(path.name + ".bak")
        _replace(backup, path.read_text("utf-8", "surrogateescape"), 0o600)
        written.append(backup)
    _replace(path, text, 0o644)
    return [*written, path]


def _section(name: str, values: dict[str, Any]) -> str:
    lines = [
        f"  {key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items() if value is not None
    ]
    return f"{name}:\n{''.join(lines)}" if lines else ""


def _replace(path: Path, text: str, mode: int) -> None:
    """Write a file whole or not at all; it is on disk when this returns. Raises Stop."""
    draft = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
    except OSError as error:
        raise Stop(Exit.FAILED, f"{path}: cannot be written: {error.strerror or error}; run setup as root") from None


def _check(path: Path, written: list[Path], options: Globals) -> None:
    from remotegpu_agent.cli.output import print_json
    from remotegpu_agent.config import DEFAULT_PATH, check_files, load_config
    from remotegpu_schemas.errors import Misconfigured

    for file in written:
        say(f"written: {file}")
    try:
        problems = check_files(load_config(path, os.environ))
    except Misconfigured as error:
        raise Stop(Exit.USAGE, f"{error}\nrun setup again, or mend the file") from None
    flag = "" if path == DEFAULT_PATH else f" --config {path}"
    if options.is_json:
        print_json({"written": [str(file) for file in written], "problems": problems})
    for problem in problems:
        say(f"problem: {problem}")
    if problems:
        raise Stop(Exit.FAILED, f"mend this, then: remotegpu-agent{flag} doctor")
    say(f"good. Next: remotegpu-agent{flag} doctor, then: remotegpu-agent{flag} run")
