"""The program `remotegpu-agent` as a real process, and how a call of it ended."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tests.agent.cli.scripted_agent import DEADLINE_S

PROGRAM = (sys.executable, "-m", "remotegpu_agent.cli")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a call of the program ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output, which is exactly one JSON document."""
        return json.loads(self.out)


Cli = Callable[..., Ended]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a real process: ours, without what would change the program's mind."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("REMOTEGPU_", "PYTHON", "LC_"))}
    return {**kept, "LC_ALL": "C.UTF-8", "TERM": "xterm", **changes}


class _Program(subprocess.Popen[str]):
    """A process that a failing test does not wait for."""

    def __exit__(self, *error: object) -> None:
        if error[0] is not None:
            self.kill()
        super().__exit__(*error)


def process(*arguments: object, environ: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """The program as a process of its own, with pipes."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return _Program([*PROGRAM, *map(str, arguments)], env=environment(**(environ or {})), **{**pipes, **options})


def run(*arguments: object, environ: Mapping[str, str] | None = None, **options: Any) -> Ended:
    """The program as a process, to its end; whatever happens, it shows no traceback."""
    text = options.pop("input", None)
    if text is not None:
        options["stdin"] = subprocess.PIPE
    with process(*arguments, environ=environ, **options) as child:
        return ended(child, text)


def ended(child: subprocess.Popen[str], text: str | None = None) -> Ended:
    """What a process left, once it has ended."""
    try:
        out, err = child.communicate(text, timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        raise
    assert "Traceback" not in (err or "")
    assert "Exception ignored" not in (err or "")
    return Ended(child.returncode, out or "", err or "")
