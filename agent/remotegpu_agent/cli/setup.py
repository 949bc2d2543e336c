"""`setup`: asks what an agent must know, writes its config and token file, and checks them."""

from __future__ import annotations

import getpass
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from remotegpu_agent.cli.arguments import Option
from remotegpu_agent.cli.context import Globals, say
from remotegpu_agent.cli.exits import Exit, Stop

_TOKEN_NAME = "control-plane-token"


@dataclass(frozen=True)
class Answers:
    """What the operator said; None leaves the default."""

    url: str | None
    machine_id: str | None
    token: str | None
    token_file: Path | None
    state_dir: Path | None

    def text(self, config: Path) -> str:
        """The config file."""
        token_file = config.parent / _TOKEN_NAME if self.token else self.token_file
        agent = {"machine_id": self.machine_id, "state_dir": _absolute(self.state_dir)}
        plane = {"url": self.url, "token_file": _absolute(token_file)}
        head = "# Written by `remotegpu-agent setup`. All keys: docs, or `remotegpu-agent config show`.\n"
        return head + _section("agent", agent) + _section("control_plane", plane)


def setup(
    options: Globals,
    url: Annotated[
        str | None,
        Option("--url", metavar="URL", text='The control plane, such as https://plane.example; "" for none.'),
    ] = None,
    machine_id: Annotated[
        str | None, Option("--machine-id", metavar="ID", text="The id under which this machine is enrolled there.")
    ] = None,
    token: Annotated[
        str | None,
        Option("--token", metavar="TOKEN", text="The token (visible to others in ps; --token-file is better)."),
    ] = None,
    token_file: Annotated[
        Path | None, Option("--token-file", metavar="FILE", text="A file that holds the token already.")
    ] = None,
    state_dir: Annotated[
        Path | None, Option("--state-dir", metavar="DIR", text="Where the agent keeps its state.")
    ] = None,
    yes: Annotated[bool, Option("--yes", text="Ask nothing; replace a config that is there (kept as .bak).")] = False,
    from_agent_yaml: Annotated[Path | None, Option("--from-agent-yaml", text="", is_hidden=True)] = None,
) -> None:
    """Write the config of this agent, asking for what the flags leave out.

    Nothing is written before all of it has been checked.

    Example: remotegpu-agent setup --url https://plane.example --machine-id gpu-17 --token-file /root/token --yes
    """
    from remotegpu_agent.config import DEFAULT_PATH

    if from_agent_yaml is not None:
        raise Stop(Exit.USAGE, "--from-agent-yaml is not supported by this version; run `setup` without it")
    # Before the verb, the names --url and --token-file mean the same here: no agent is asked.
    given = Answers(
        url if url is not None else options.url, machine_id, token, token_file or options.token_file, state_dir
    )
    if given.token is not None and given.token_file is not None:
        raise Stop(Exit.USAGE, "give --token or --token-file, not both")
    path = (options.config or DEFAULT_PATH).absolute()
    if os.path.lexists(path) and not path.is_file():
        raise Stop(Exit.USAGE, f"{path}: is no regular file; name another by --config")
    if not yes:
        if not sys.stdin.isatty():
            raise Stop(Exit.USAGE, "setup asks its questions on a terminal, and this is none; give the flags and --yes")
        if path.exists() and _prompt(f"{path} exists. Replace it (the old one is kept as .bak)? [y/N]") not in _YES:
            raise Stop(Exit.FAILED, "nothing was changed")
        given = _ask(given)
    given = replace(
        given, url=given.url or None, machine_id=given.machine_id or None, token=(given.token or "").strip() or None
    )
    text = given.text(path)
    _check_draft(given, path, text)
    _check(path, _write(path, text, given.token), options)


_YES = frozenset({"y", "Y", "yes"})


def _ask(given: Answers) -> Answers:
    """The answers to what is still open; an empty answer leaves the default."""
    url, machine_id, token, state_dir = given.url, given.machine_id, given.token, given.state_dir
    if url is None:
        url = _prompt("URL of the control plane (empty: none, local tasks only)")
    if url:
        if machine_id is None:
            machine_id = _prompt("machine_id, as this machine is enrolled there")
        if token is None and given.token_file is None:
            token = _prompt("token (not shown)", is_secret=True)
    if state_dir is None:
        text = _prompt("directory for the agent's state (empty: /var/lib/remotegpu-agent)")
        state_dir = Path(text) if text else None
    return Answers(url, machine_id, token, given.token_file, state_dir)


def _prompt(question: str, *, is_secret: bool = False) -> str:
    """A line from the terminal; the question goes to standard error. The end of input is a refusal to go on."""
    try:
        if is_secret:
            return getpass.getpass(f"{question}: ", sys.stderr).strip()
        print(f"{question}: ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    except EOFError:
        line = ""
    if not line:
        raise KeyboardInterrupt
    return line.strip()


def _check_draft(given: Answers, path: Path, text: str) -> None:
    """Whether the agent could use what was said. Raises Stop, with nothing changed."""
    from remotegpu_agent.config import read_config_text
    from remotegpu_agent.config_check import check_token, read_token
    from remotegpu_schemas.errors import Misconfigured

    try:
        read_config_text(text.encode("utf-8", "surrogateescape"), str(path), {})
        if given.token is not None:
            check_token(given.token.encode("utf-8", "surrogateescape"))
        elif given.token_file is not None:
            read_token(given.token_file)
    except Misconfigured as error:
        raise Stop(Exit.USAGE, f"{error}\nnothing was written") from None
    except ValueError as error:
        raise Stop(Exit.USAGE, f"the token {given.token_file or ''} {error}; nothing was written") from None
    except OSError as error:
        reason = error.strerror or error
        raise Stop(Exit.USAGE, f"--token-file: cannot read {given.token_file}: {reason}; nothing was written") from None


def _write(path: Path, text: str, token: str | None) -> list[Path]:
    """Token, backup and config; the names of what was written."""
    written = []
    if token is not None:
        token_file = path.parent / _TOKEN_NAME
        _replace(token_file, token.encode() + b"\n", 0o600)
        written.append(token_file)
    if path.exists():
        backup = path.with_name(path.name + ".bak")
        try:
            old = path.read_bytes()
        except OSError as error:
            raise Stop(Exit.FAILED, f"{path}: cannot be read: {error.strerror or error}; run setup as root") from None
        _replace(backup, old, 0o600)
        written.append(backup)
    _replace(path, text.encode("utf-8", "surrogateescape"), 0o644)
    return [*written, path]


def _absolute(path: Path | None) -> str | None:
    return str(path.absolute()) if path is not None else None


def _section(name: str, values: dict[str, str | None]) -> str:
    lines = [
        f"  {key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items() if value is not None
    ]
    return f"{name}:\n{''.join(lines)}" if lines else ""


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write a file whole or not at all; it is on disk when this returns. Raises Stop."""
    draft = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(content)
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
