"""`list`: the tasks that the agent knows."""

from __future__ import annotations

from typing import Annotated, Any

from remotegpu_agent.cli.arguments import Option
from remotegpu_agent.cli.context import Globals, say
from remotegpu_agent.cli.exits import Exit, Stop
from remotegpu_schemas import limits

STATES = ("pending", "assigned", "running", "suspended", "preempted", "completed", "failed", "cancelled")


def list_tasks(
    options: Globals,
    states: Annotated[
        list[str] | None, Option("--state", metavar="STATE", text=f"Only these states: {', '.join(STATES)}.")
    ] = None,
    labels: Annotated[list[str] | None, Option("--label", metavar="K=V", text="Only with this label.")] = None,
    limit: Annotated[int, Option("--limit", least=1, most=limits.API_LIST_MAX, text="At most so many.")] = 50,
    offset: Annotated[int, Option("--offset", least=0, text="Leave out so many of the newest.")] = 0,
) -> None:
    """List tasks, newest first.

    Example: remotegpu-agent list --state running --state pending --label team=vision
    """
    from remotegpu_agent.cli import output

    query: list[tuple[str, object]] = [("state", checked_state(state)) for state in states or []]
    query += [("label", checked_label(label)) for label in labels or []]
    query += [("limit", limit), ("offset", offset)]
    page = options.client().get("/tasks", query)
    if options.is_json:
        output.print_json(page)
        return
    rows = [_row(task) for task in page.get("tasks", [])]
    columns = (
        output.Column("id"),
        output.Column("name"),
        output.Column("state"),
        output.Column("prio", is_right=True),
        output.Column("age", is_right=True),
        output.Column("ran", is_right=True),
        output.Column("what", is_wide=True),
    )
    output.print_table(columns, rows, options)
    total = page.get("total", len(rows))
    if isinstance(total, int) and total > offset + len(rows):
        say(f"{len(rows)} of {total}; --limit and --offset show more")


def checked_state(text: str) -> str:
    """A state as the API spells it. Raises a usage error with the nearest one."""
    state = text.strip().lower()
    if state not in STATES:
        import difflib

        near = difflib.get_close_matches(state, STATES, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(STATES)}."
        raise Stop(Exit.USAGE, f"--state: there is no state {text[:40]!r}.{hint}")
    return state


def checked_label(text: str) -> str:
    """A label to look for. Raises a usage error."""
    name, has_value, _ = text.partition("=")
    if not name or not has_value:
        raise Stop(Exit.USAGE, f"--label: {text[:40]!r} is not NAME=VALUE (see `remotegpu-agent list --help`)")
    return text


def _row(task: dict[str, Any]) -> tuple[str, ...]:
    from remotegpu_agent.cli.output import age

    state = str(task.get("state", ""))
    if task.get("is_stopping"):
        state += " (stopping)"
    return (
        str(task.get("id", "")),
        str(task.get("name") or ""),
        state,
        str(task.get("priority", "")),
        age(task.get("submitted_at")),
        age(task.get("started_at"), task.get("ended_at")),
        _what(task),
    )


def _what(task: dict[str, Any]) -> str:
    """Why it waits, how far it is, or how it ended; else its command."""
    if task.get("reason"):
        return str(task["reason"])
    if task.get("state") in {"failed", "cancelled"}:
        code = task.get("exit_code")
        parts = [str(task.get("cause") or ""), f"exit {code}" if code is not None else "", str(task.get("error") or "")]
        return ", ".join(part for part in parts if part)
    if task.get("progress_percent") is not None and task.get("state") != "completed":
        return f"{task['progress_percent']:g} % {task.get('progress_message') or ''}".strip()
    return " ".join(str(task.get("command") or "").split())[:100]
