"""`drain` and `undrain`: empty this host of tasks, and let it take on tasks again."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Final

from remotegpu_agent.cli.arguments import Option
from remotegpu_agent.cli.context import Globals, say
from remotegpu_agent.cli.exits import Exit, Stop

_ASK_S: Final = 60.0
"""The agent answers as soon as the host is empty; a call that waits longer might be cut by something in between."""


def drain(
    options: Globals,
    reason: Annotated[str, Option("--reason", metavar="TEXT", text="Why; shown where nothing runs for it.")] = "",
    is_waiting: Annotated[bool, Option("--wait", text="Return when nothing runs any more.")] = False,
    timeout: Annotated[
        str | None,
        Option("--timeout", metavar="DURATION", text="With --wait: give up after so long, exit 1."),
    ] = None,
) -> int:
    """Take on no more tasks, over restarts too, until undrain; what runs goes on to its end.

    Example: remotegpu-agent drain --reason 'new driver' --wait --timeout 2h
    """
    give_up_s = None if timeout is None else _seconds(timeout)
    if give_up_s is not None and not is_waiting:
        raise Stop(Exit.USAGE, "--timeout goes with --wait (see `remotegpu-agent drain --help`)")
    client = options.client()
    state = client.post("/drain", json.dumps({"reason": reason}).encode())
    if is_waiting:
        ends_at_s = None if give_up_s is None else time.monotonic() + give_up_s
        while state.get("is_draining") and not state.get("is_drained"):
            left_s = _ASK_S if ends_at_s is None else min(_ASK_S, ends_at_s - time.monotonic())
            if left_s <= 0:
                break
            state = client.get("/drain", (("wait", round(left_s, 3)),), wait_s=left_s)
    _print(state, options)
    return Exit.DONE if not is_waiting or state.get("is_drained") else Exit.FAILED


def undrain(options: Globals) -> None:
    """Take on tasks again.

    Example: remotegpu-agent undrain
    """
    _print(options.client().post("/undrain"), options)


def _print(state: dict[str, Any], options: Globals) -> None:
    from remotegpu_agent.cli import output

    if options.is_json:
        output.print_json(state)
        return
    if not state.get("is_draining"):
        print("takes on tasks")
        return
    left = f"{state.get('running', 0)} run, {state.get('waiting', 0)} claimed ones wait"
    print(f"{'drained: nothing runs' if state.get('is_drained') else 'draining: ' + left}")
    say(str(state.get("reason") or ""))


def _seconds(text: str) -> float:
    from remotegpu_schemas.quantities import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise Stop(Exit.USAGE, f"--timeout: {error}") from None
