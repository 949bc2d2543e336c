"""`dead-letters`: reports that the control plane has refused for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from remotegpu_agent.cli.arguments import Argument, Option
from remotegpu_agent.cli.asking import View, call_each
from remotegpu_agent.cli.context import Globals, say
from remotegpu_agent.cli.exits import Exit, Stop
from remotegpu_schemas import limits

if TYPE_CHECKING:
    from remotegpu_agent.cli.client import Client

_Numbers = Annotated[list[str], Argument(metavar="NUMBER...", text="Dead letters, by the number that list shows.")]


def list_letters(
    options: Globals,
    limit: Annotated[int, Option("--limit", least=1, most=limits.API_LIST_MAX, text="At most so many.")] = 50,
    offset: Annotated[int, Option("--offset", least=0, text="Leave out so many of the oldest.")] = 0,
) -> None:
    """List them, oldest first, each with the control plane's answer.

    Example: remotegpu-agent dead-letters list
    """
    from remotegpu_agent.cli import output

    page = options.client().get("/dead-letters", (("limit", limit), ("offset", offset)))
    if options.is_json:
        output.print_json(page)
        return
    letters = page.get("dead_letters") or []
    columns = (
        output.Column("number", is_right=True),
        output.Column("kind"),
        output.Column("task"),
        output.Column("age", is_right=True),
        output.Column("tries", is_right=True),
        output.Column("answer", is_wide=True),
    )
    output.print_table(columns, [_row(letter) for letter in letters], options)
    total = page.get("total", 0)
    if total > offset + len(letters):
        say(f"{len(letters)} of {total}; --limit and --offset show more")


def show(options: Globals, number: Annotated[str, Argument(metavar="NUMBER", text="Its number.")]) -> None:
    """Show one with all that it says.

    Example: remotegpu-agent dead-letters show 17
    """
    from remotegpu_agent.cli import output

    output.print_json(options.client().get(_path(number)))


def resend(options: Globals, numbers: _Numbers) -> int:
    """Put them up for delivery again, as if they had never been tried.

    Example: remotegpu-agent dead-letters resend 17 18
    """
    return _each(options, numbers, lambda client, path: client.post(f"{path}/resend"), "is sent again")


def drop(options: Globals, numbers: _Numbers) -> int:
    """Forget them for good; the control plane never learns what they say.

    Example: remotegpu-agent dead-letters drop 17
    """
    return _each(options, numbers, lambda client, path: client.delete(path), "is dropped")


def _each(options: Globals, numbers: list[str], call: Callable[[Client, str], View], word: str) -> int:
    def sentence(letter: View) -> str:
        return f"dead letter {letter.get('id')} ({letter.get('kind')} of task {letter.get('task_id')}) {word}"

    return call_each(options, [(number, _path(number)) for number in numbers], call, "dead_letters", sentence)


def _path(number: str) -> str:
    if not number.isascii() or not number.isdecimal():
        raise Stop(Exit.USAGE, f"{number[:40]!r} is no number of a dead letter; see remotegpu-agent dead-letters list")
    return f"/dead-letters/{number}"


def _row(letter: dict[str, Any]) -> tuple[str, ...]:
    from remotegpu_agent.cli.output import age

    return (
        str(letter.get("id")),
        str(letter.get("kind")),
        str(letter.get("task_id")),
        age(letter.get("created_at")),
        str(letter.get("tries")),
        " ".join(str(letter.get("error") or "").split()),
    )
