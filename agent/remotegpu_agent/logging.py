"""How the agent logs: one line an event, JSON or console, times in UTC, secrets hidden. Called once, by `run`.

The standard library's loggers (aiohttp, asyncio) go the same way. Knows no part of the agent.
"""

from __future__ import annotations

import logging
import logging.config
import re
import sys
from collections.abc import Mapping
from typing import Any, Final, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "console"]

HIDDEN: Final = "[hidden]"
_SECRET_KEY: Final = re.compile(
    r"(?i)(?:^|[_.\s-])(?:tokens?|secrets?|passw(?:or)?ds?|passphrase|authorization|cookies?|credentials?|api[_-]?keys?|"
    r"private[_-]?key|env|environ|environment)$"
)
_SECRET_TEXT: Final = re.compile(r"(?i)\b(bearer|x-agent-token:?)\s+[^\s'\",;]+")
_DEPTH_MAX: Final = 6


def set_up(level: Level, format_: Format, stream: TextIO | None = None) -> None:
    """Send everything that is logged to `stream` (standard error); `auto` is console on a terminal, else JSON."""
    out = stream if stream is not None else sys.stderr
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
        logger_factory=structlog.WriteLoggerFactory(out),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(out)
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
    if isinstance(key, str) and _SECRET_KEY.search(key) and value is not None:
        return HIDDEN
    if isinstance(value, str):
        return _SECRET_TEXT.sub(rf"\1 {HIDDEN}", value)
    if depth == 0:
        return value if isinstance(value, int | float | None) else "..."
    if isinstance(value, Mapping):
        return {inner: _hidden(inner, item, depth - 1) for inner, item in value.items()}
    if type(value) in {list, tuple, set, frozenset}:
        return [_hidden(None, item, depth - 1) for item in value]  # type: ignore[attr-defined]  # one of the four
    return value
