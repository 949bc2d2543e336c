"""Where the config comes from: file, environment and flags laid over each other, each mistake traced to its source.

Also the one table of the keys that later versions act on: they take their documented default only. Checks no value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from remotegpu_agent import VERSION
from remotegpu_schemas import problems as report
from remotegpu_schemas.problems import Finding, InvalidFile, Problem, dotted
from remotegpu_schemas.quantities import parse_duration
from remotegpu_schemas.strict_yaml import Document, load, parse_scalar

ENVIRONMENT_PREFIX: Final = "REMOTEGPU_AGENT__"

_TEXTS: Final = (("agent", "id"), ("agent", "machine_id"))
_NOTHING: Final = frozenset({"", "~", "null"})
_VARIABLES: Final = ("tasks", "env")
_TEXT_MAPPINGS: Final = (("agent", "labels"), _VARIABLES)

_LATER: Final[Mapping[str, Any]] = {
    "control_plane": {"allow_services": False},
    "capacity": {"prefetch": 0, "ageing": 0},
    "gpus": {
        "enabled": "auto",
        "exclude": [],
        "sample_interval": "1s",
        "check_command": None,
        "idle_action": "none",
        "idle_after": "30m",
    },
    "tasks": {
        "isolation": {"readonly_paths": [], "writable_paths": []},
        "on_reboot": "fail",
        "policy": {"allowed_commands": [], "blocked_patterns": [], "allowed_workdirs": []},
    },
    "spool": {"enabled": True, "dir": None, "run_as_owner": False},
    "services_dir": "/etc/remotegpu-agent/services.d",
    "results": {"s3": None},
    "webhooks": [],
    "host_operations": {},
}
"""Keys of interface.md that this version does not act on, each with its documented default, the one value it takes."""

_SECTIONS: Final = frozenset({("control_plane",), ("capacity",), ("tasks",), ("results",)})
"""Sections of which this version acts on other keys."""


def is_verbatim(path: report.Path) -> bool:
    """Whether the value is text even if it looks like a number."""
    return path in _TEXTS or (len(path) > 2 and path[:2] in _TEXT_MAPPINGS)


class Sources:
    """The data of all three sources laid over each other, and which of them each value is from."""

    def __init__(self, document: Document | None, data: dict[str, Any]) -> None:
        self._document = document
        self._labels: dict[report.Path, str] = {}
        self.data = data

    def override_by_environment(self, environ: Mapping[str, str]) -> Iterator[Problem]:
        """Lay `REMOTEGPU_AGENT__SECTION__KEY` over the file; names of tasks' variables keep their case."""
        for name in sorted(environ):
            if name.startswith(ENVIRONMENT_PREFIX):
                yield from self._override(_path_of(name), environ[name], f"environment variable {name}")

    def override_by_flags(self, sets: Sequence[str]) -> Iterator[Problem]:
        """Lay each `section.key=value` over the rest."""
        for text in sets:
            key, has_value, value = text.partition("=")
            if not has_value or not key:
                yield Problem(f"--set {text[:60]}", 0, 0, 0, "must be section.key=value, such as log.level=debug")
                continue
            first, _, rest = key.partition(".")
            middle, _, last = rest.partition(".")
            path = tuple(part for part in (first, middle) if part)
            path += (last,) if path in _TEXT_MAPPINGS and last else tuple(part for part in last.split(".") if part)
            yield from self._override(path, value, f"--set {key}")

    def _override(self, path: report.Path, text: str, label: str) -> Iterator[Problem]:
        try:
            value = self._value(path, text, label)
        except InvalidFile as error:
            yield from error.problems
            return
        target: dict[str, Any] = self.data
        for part in path[:-1]:
            child = target.setdefault(str(part), {})
            if child is None:
                child = target[str(part)] = {}
            if not isinstance(child, dict):
                return  # what stands there already is wrong, and is reported
            target = child
        target[str(path[-1])] = value
        self._labels[path] = label

    def _value(self, path: report.Path, text: str, label: str) -> object:
        if is_verbatim(path):
            return None if path in _TEXTS and text in _NOTHING else text
        if text.startswith(("[", "{")):
            documents = load(text.encode("utf-8", "surrogateescape"), label)
            return documents[0].data(lambda inner: is_verbatim((*path, *inner))) if documents else None
        return parse_scalar(text)

    def problem(self, finding: Finding) -> Problem:
        """The mistake at its place: the flag, the variable, or the line of the file."""
        for length in range(len(finding.path), 0, -1):
            label = self._labels.get(finding.path[:length])
            if label is not None:
                return Problem(label, 0, 0, 0, finding.message)
        for path, label in self._labels.items():
            if path[: len(finding.path)] == finding.path and finding.path:
                return Problem(label, 0, 0, 0, finding.message)
        if self._document is not None:
            return self._document.problem(finding)
        return Problem("config", 0, 0, 0, finding.message)

    def origins(self) -> dict[str, str]:
        """By dotted key: where the value came from."""
        found: dict[str, str] = {}
        for section, value in self.data.items():
            for key in value if isinstance(value, dict) else ():
                path = (section, key)
                found[dotted(path)] = self._origin(path)
        return found

    def _origin(self, path: report.Path) -> str:
        labels = [label for known, label in self._labels.items() if known[:2] == path]
        if labels:
            return ", ".join(labels)
        if self._document is None:
            return "default"
        return f"{self._document.file}:{self._document.key_mark(path).line}"


def _path_of(name: str) -> report.Path:
    """The key that an environment variable means; what follows `TASKS__ENV__` is a variable's name as it stands."""
    section, _, rest = name.removeprefix(ENVIRONMENT_PREFIX).partition("__")
    key, _, inner = rest.partition("__")
    path = tuple(part.lower() for part in (section, key) if part)
    if path == _VARIABLES and inner:
        return (*path, inner)
    if path in _TEXT_MAPPINGS and inner:
        return (*path, inner.lower())
    return (*path, *(part for part in inner.lower().split("__") if part)) or ("",)


def later_keys(path: report.Path) -> Mapping[str, Any]:
    """The keys of the section at `path` that later versions act on."""
    node: Any = _LATER
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def not_supported(path: report.Path) -> str:
    """The sentence that refuses a key of a later version."""
    return f"'{dotted(path)}' is not supported by this version ({VERSION})"


def take_out_later(data: dict[str, Any], later: Mapping[str, Any] = _LATER, at: report.Path = ()) -> Iterator[Finding]:
    """Remove the keys of later versions from `data`; those that are not at their default are findings."""
    for key in [key for key in data if key in later]:
        path, value, default = (*at, key), data[key], later[key]
        is_section = isinstance(default, dict) and default
        if is_section and isinstance(value, dict):
            yield from take_out_later(value, default, path)
            has_more = path in _SECTIONS
            if not has_more:
                yield from (_unknown_later(path, unknown, default) for unknown in value)
                del data[key]
        elif is_section and path in _SECTIONS:
            continue
        else:
            del data[key]
            if value is not None and not (is_section and value == default) and not _is_same(value, default):
                yield Finding(path, f"{not_supported(path)}; leave it out, or at {_written(default)}", at_key=True)


def _unknown_later(path: report.Path, key: str, known: Mapping[str, Any]) -> Finding:
    message = f"unknown key {key[:40]!r} in '{dotted(path)}'{report.did_you_mean(key, list(known))}"
    return Finding((*path, key), message, at_key=True)


def _is_same(value: object, default: object) -> bool:
    if isinstance(default, str):
        try:
            return value == default or parse_duration(value) == parse_duration(default)
        except ValueError:
            return False
    return value == default and isinstance(value, bool) == isinstance(default, bool)


def _written(default: object) -> str:
    match default:
        case None:
            return "null"
        case bool():
            return "true" if default else "false"
        case dict():
            return "its defaults"
        case _:
            return f"{default}"
