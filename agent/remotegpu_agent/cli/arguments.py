"""From the signature of a verb to its arguments: `Annotated[type, Option(...)]` is an option, `Argument(...)` a place.

argparse does the work; typer's own start costs a quarter of a second, because it loads pydantic. Knows no verb.
"""

from __future__ import annotations

import argparse
import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

from remotegpu_agent.cli.context import Globals
from remotegpu_agent.cli.exits import Exit, Stop

Verb: TypeAlias = Callable[..., int | None]
"""A function of the global options and its own arguments; None and 0 are success."""

PROGRAM: Final = "remotegpu-agent"
_USAGE_WIDTH: Final = 100


class Option:
    """An option. `least` and `most` bound a number; a list means that the option may be repeated."""

    def __init__(
        self,
        *names: str,
        text: str,
        metavar: str | None = None,
        least: int | None = None,
        most: int | None = None,
        choices: Sequence[str] | None = None,
        is_hidden: bool = False,
    ) -> None:
        self.names = names
        self.text = argparse.SUPPRESS if is_hidden else text.replace("%", "%%")
        self.metavar = metavar
        self.least = least
        self.most = most
        self.choices = choices


@dataclass(frozen=True)
class Argument:
    """What stands by itself behind the verb; a list takes all that is left."""

    metavar: str
    text: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving: what to print and how to end is for `main`."""
        # "--run/--attempt: ..." names the option and its other spellings; the first is enough.
        message = re.sub(r"^argument ([^:\s/]+)(/[^:\s]+)?:", r"\1:", message)
        raise usage_error(self.prog, message)


def usage_error(prog: str, message: str) -> Stop:
    """What was typed makes no sense."""
    return Stop(Exit.USAGE, f"{message} (see `{prog} --help`)")


def call(verb: Verb, name: str, options: Globals, words: Sequence[str]) -> int:
    """Run the verb with these words behind its name. Raises Stop."""
    parser = parser_of(verb, name)
    found, unknown = parser.parse_known_intermixed_args(list(words))
    if unknown:
        raise usage_error(parser.prog, _unknown(parser, unknown[0]))
    return verb(options, **vars(found)) or Exit.DONE


def parser_of(verb: Verb, name: str) -> argparse.ArgumentParser:
    """The parser for what stands behind the verb's name."""
    parser = new_parser(f"{PROGRAM} {name}", inspect.cleandoc(verb.__doc__ or ""))
    hints = typing.get_type_hints(verb, include_extras=True)
    for parameter in list(inspect.signature(verb).parameters.values())[1:]:
        inner, spec = typing.get_args(hints[parameter.name])
        if isinstance(spec, Option):
            _add_option(parser, parameter.name, inner, parameter.default, spec)
        else:
            _add_argument(parser, parameter.name, inner, parameter.default, spec)
    return parser


def new_parser(prog: str, description: str, usage: str | None = None) -> argparse.ArgumentParser:
    """A parser that raises Stop for what it cannot read, and never guesses at half an option."""
    return _Parser(
        prog=prog,
        usage=usage,
        description=description.replace("%", "%%"),
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=_USAGE_WIDTH),
    )


def _add_option(parser: argparse.ArgumentParser, dest: str, inner: Any, default: Any, spec: Option) -> None:
    kind, is_list = _kind(inner)
    if kind is bool:
        parser.add_argument(*spec.names, dest=dest, action="store_true", help=spec.text)
        return
    parser.add_argument(
        *spec.names,
        dest=dest,
        action="append" if is_list else "store",
        type=_bounded(spec.least, spec.most) if kind is int else kind,
        default=default,
        choices=spec.choices,
        metavar=spec.metavar or kind.__name__.upper(),
        help=spec.text,
    )


def _add_argument(parser: argparse.ArgumentParser, dest: str, inner: Any, default: Any, spec: Argument) -> None:
    kind, is_list = _kind(inner)
    nargs = None if not is_list else "+" if default is inspect.Parameter.empty else "*"
    parser.add_argument(dest, type=kind, nargs=nargs, metavar=spec.metavar.removesuffix("..."), help=spec.text)


def _kind(inner: Any) -> tuple[type, bool]:
    """The type of one value, and whether there may be several: `list[str] | None` is text, several."""
    if typing.get_origin(inner) in {typing.Union, types.UnionType}:
        inner = next(part for part in typing.get_args(inner) if part is not types.NoneType)
    is_list = typing.get_origin(inner) is list
    kind = typing.get_args(inner)[0] if is_list else inner
    if kind not in {str, int, bool, Path}:
        raise TypeError(f"a verb cannot take {kind!r}")
    return kind, is_list


def _bounded(least: int | None, most: int | None) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text) if len(text) < 20 else None
        except ValueError:
            value = None
        is_small = value is not None and least is not None and value < least
        is_large = value is not None and most is not None and value > most
        if value is None or is_small or is_large:
            raise argparse.ArgumentTypeError(f"must be a whole number{_range(least, most)}, not {text[:40]!r}")
        return value

    return convert


def _range(least: int | None, most: int | None) -> str:
    if least is None:
        return ""
    return f" from {least} to {most}" if most is not None else f" from {least}"


def _unknown(parser: argparse.ArgumentParser, word: str) -> str:
    if not word.startswith("-"):
        return f"there is one argument too many: {word[:40]!r}"
    import difflib

    name = word.partition("=")[0]
    known = [name for action in parser._actions for name in action.option_strings]
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no option {name[:40]!r}" + (f"; did you mean '{near[0]}'?" if near else "")
