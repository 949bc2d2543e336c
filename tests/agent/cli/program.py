"""The program `remotegpu-agent` as a real process, and how a call of it ended."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, AnyStr, Final

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


class Program(subprocess.Popen[AnyStr]):
    """A process that a failing test does not wait for."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.kill()
        super().__exit__(kind, error, trace)


_PIPES: Final[dict[str, Any]] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


def process(*arguments: object, environ: Mapping[str, str] | None = None, **options: Any) -> Program[str]:
    """The program as a process of its own, with pipes."""
    whole: dict[str, Any] = {**_PIPES, "text": True, "env": environment(**(environ or {})), **options}
    return Program([*PROGRAM, *map(str, arguments)], **whole)


def process_of_bytes(*arguments: object, environ: Mapping[str, str] | None = None) -> Program[bytes]:
    """The same, with pipes that hand over what came at once, as it is."""
    whole: dict[str, Any] = {**_PIPES, "bufsize": 0, "env": environment(**(environ or {}))}
    return Program([*PROGRAM, *map(str, arguments)], **whole)


def run(*arguments: object, environ: Mapping[str, str] | None = None, **options: Any) -> Ended:
    """The program as a process, to its end; whatever happens, it shows no traceback."""
    text = options.pop("input", None)
    if text is not None:
        options["stdin"] = subprocess.PIPE
    with process(*arguments, environ=environ, **options) as child:
        return ended(child, text)


def ended(child: Program[str], text: str | None = None) -> Ended:
    """What a process left, once it has ended."""
    try:
        out, err = child.communicate(text, timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        raise
    assert "Traceback" not in (err or "")
    assert "Exception ignored" not in (err or "")
    return Ended(child.returncode, out or "", err or "")
