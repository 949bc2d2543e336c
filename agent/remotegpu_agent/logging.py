"""How the agent logs: one line an event, JSON or console, times in UTC, secrets hidden. Called once, by `run`.

The standard library's loggers (aiohttp, asyncio) go the same way. Knows no part of the agent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, Final, Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]

HIDDEN: Final = "[hidden]"
_SECRET_KEY: Final = re.compile(
    r"(?i)(?:^|[_.\s-]|(?<=[a-z0-9])(?-i:(?=[A-Z])))(?:tokens?|secrets?|passw(?:or)?ds?|passphrase|authorization|"
    r"cookies?|credentials?|api[_-]?keys?|private[_-]?key|env|environ|environment)$"
)
_SECRET_TEXT: Final = re.compile(
    r"""(?ix)
    ( \b bearer \s+
    | x-agent-token ["']? \s* [:=,]? \s* ["']?
    | authorization ["']? \s* [:=,] \s* ["']? (?: (?:bearer|basic) \s+ )?
    | (?:token|secret|passw(?:or)?d|api[_-]?key) ["']? \s* = \s* ["']?
    | (?:token|secret|passw(?:or)?d|api[_-]?key) ["'] \s* : \s* ["']?
    | [a-z][a-z0-9+.-]*:// (?= [^\s/@]* @ )
    )
    [^\s'",;@]+ """
)
"""What stands behind a header, an assignment, a key in quotes, or before the `@` of a URL."""
_DEPTH_MAX: Final = 6


class _Sink:
    """A stream that takes what it can: a full disk or a reader that is gone must not stop the agent's work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or count what could not be written as written."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # ValueError: the stream is closed
            return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def set_up(level: Level, format_: Format, stream: TextIO | None = None) -> None:
    """Send everything that is logged to `stream` (standard error); `auto` is console on a terminal, else JSON."""
    out = stream if stream is not None else sys.stderr
    sink = cast("TextIO", _Sink(out))  # the two calls that loggers make
    is_console = format_ == "console" or (format_ == "auto" and out.isatty())
    threshold = getattr(logging, level.upper())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=out.isatty())
        if is_console
        else structlog.processors.JSONRenderer(default=str)
    )
    # As text before any renderer sees it: the console's own tracebacks show the values of local variables.
    last: list[Processor] = [structlog.processors.format_exc_info, hide_secrets, renderer]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(sink),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sink)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries say at INFO what only their authors want to know.
    root.setLevel(threshold if level == "debug" else max(threshold, logging.WARNING))
    logging.captureWarnings(capture=True)


def hide_secrets(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """A processor: values of keys that name a secret or an environment never get through, at any depth."""
    return {key: _hidden(key, value, _DEPTH_MAX) for key, value in event.items()}


def _hidden(key: object, value: object, depth: int) -> Any:
    """The value as plain data, or as text where it is nothing plain: what a renderer would make of it may tell all."""
    if isinstance(key, str) and _SECRET_KEY.search(key) and value is not None:
        return HIDDEN
    match value:
        case None | bool() | int() | float():
            return value
        case str():
            return _SECRET_TEXT.sub(rf"\1{HIDDEN}", value)
        case bytes():
            return _hidden(None, value.decode("utf-8", "replace"), depth)
        case _:
            return _hidden_inside(value, depth) if depth > 0 else "..."


def _hidden_inside(value: object, depth: int) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif callable(fields := getattr(value, "model_dump", None)) and not isinstance(value, type):
        value = fields()  # pydantic, without importing it
    if isinstance(value, Mapping):
        return {str(inner): _hidden(inner, item, depth - 1) for inner, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_hidden(None, item, depth - 1) for item in value]
    return _hidden(None, str(value), depth)
