"""YAML as configuration and task files need it: plain data, and where each key and value stands.

Reads the events of PyYAML's C parser (libyaml) and builds its own nodes: one walk with bounds on bytes, depth, nodes
and aliases; duplicate keys, keys that are no text, tags and merge keys are refused. JSON is read as the YAML it is.

Plain scalars mean what they look like, without the traps of YAML 1.1: numbers are decimal (`12`, `-1.5`, `1e3`,
`.inf`), `true`/`false` in lower, upper or title case are booleans, `null`, `~` and nothing are null, and everything
else is text: `yes`, `no`, `on`, `off`, `010`, `0x1F`, `0o17`, `1_000`, `12:30`, dates. What is quoted is always text.
Knows nothing of models.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import yaml

from remotegpu_schemas import limits
from remotegpu_schemas.problems import Finding, InvalidFile, Path, Problem

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""What a document may hold."""

_LINE_BREAK: Final = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
"""As libyaml counts lines (YAML 1.1, section 4.1.3)."""
_UNPRINTABLE: Final = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
"""What YAML does not allow as such (YAML 1.1, section 4.1.1)."""
_INT: Final = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,29})", re.ASCII)
_FLOAT: Final = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", re.ASCII)
_SPECIAL: Final[dict[str, bool | float | None]] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    ".inf": float("inf"), "+.inf": float("inf"), "-.inf": float("-inf"), ".nan": float("nan"),
}  # fmt: skip
_SURROGATE_PAIR: Final = re.compile(r"(?<!\\)((?:\\\\)*)\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})")


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the text: line and column from 1, and how many characters of that line are meant."""

    line: int
    column: int
    length: int


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value; `text` is how it was written, `value` what it means."""

    mark: Mark
    text: str
    value: bool | int | float | str | None
    size: int = 1


@dataclass(frozen=True, slots=True)
class Sequence:
    """A list."""

    mark: Mark
    items: tuple[Node, ...]
    is_flow: bool
    size: int


@dataclass(frozen=True, slots=True)
class Mapping:
    """Keys in the order of the text, each with its own place."""

    mark: Mark
    entries: dict[str, tuple[Mark, Node]]
    is_flow: bool
    size: int


Node: TypeAlias = Scalar | Sequence | Mapping


@dataclass(frozen=True)
class Document:
    """One document of a file: its nodes, and the lines for error messages."""

    file: str
    lines: tuple[str, ...]
    root: Node

    def data(self, as_text: Callable[[Path], bool] = lambda _path: False) -> Plain:
        """The document as plain data. Numbers at paths that `as_text` names stay as they are written (`1.10`)."""
        return _plain(self.root, (), as_text)

    def key_mark(self, path: Path) -> Mark:
        """Where the last key of `path` stands; of what is not in the text, the nearest thing around it."""
        return self._place(path, at_key=True)

    def value_mark(self, path: Path) -> Mark:
        """Where the value stands; for a block of several lines, and for nothing, the key in front of it."""
        return self._place(path, at_key=False)

    def problem(self, finding: Finding) -> Problem:
        """The mistake with its place and line."""
        return self.problem_at(self._place(finding.path, at_key=finding.at_key), finding.message)

    def problem_at(self, mark: Mark, message: str) -> Problem:
        """A mistake at a place of this document."""
        return _problem(self.file, self.lines, mark, message)

    def _place(self, path: Path, *, at_key: bool) -> Mark:
        key_mark, node = self.root.mark, self.root
        is_found = True
        for part in path:
            step = _step(node, part)
            if step is None:
                is_found = False
                break
            key_mark, node = step
        is_block = not isinstance(node, Scalar) and not node.is_flow
        if at_key or not is_found or is_block or node.mark.length == 0:
            return key_mark
        return node.mark


def _step(node: Node, part: str | int) -> tuple[Mark, Node] | None:
    if isinstance(node, Mapping) and isinstance(part, str):
        return node.entries.get(part)
    if isinstance(node, Sequence) and isinstance(part, int) and part < len(node.items):
        item = node.items[part]
        return item.mark, item
    return None


def _plain(node: Node, path: Path, as_text: Callable[[Path], bool]) -> Plain:
    match node:
        case Scalar():
            is_number = isinstance(node.value, int | float) and not isinstance(node.value, bool)
            return node.text if is_number and as_text(path) else node.value
        case Sequence():
            return [_plain(item, (*path, index), as_text) for index, item in enumerate(node.items)]
        case Mapping():
            return {key: _plain(value, (*path, key), as_text) for key, (_, value) in node.entries.items()}


def load(text: bytes, file: str, *, max_bytes: int = limits.TASK_FILE_MAX_BYTES) -> list[Document]:
    """All documents of a file; none for a file without content. `file` is its name in messages.

    Raises InvalidFile, with all problems that can be told at once, and nothing else whatever the bytes are.
    """
    if len(text) > max_bytes:
        message = f"is larger than {max_bytes} bytes ({len(text)}); is it the right file?"
        raise InvalidFile([Problem(file, 0, 0, 0, message)])
    decoded = _decode(text, file)
    return _Composer(decoded, file).documents()


def parse_scalar(text: str) -> bool | int | float | str | None:
    """What a plain scalar means; for settings given outside of files. Text in quotes loses them."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return _meaning(text)


def _meaning(text: str) -> bool | int | float | str | None:
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _decode(text: bytes, file: str) -> str:
    text = text.removeprefix(codecs.BOM_UTF8)
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        before = text[: error.start].decode()
        lines = _LINE_BREAK.split(before)
        mark = Mark(len(lines), len(lines[-1]) + 1, 1)
        raise InvalidFile(
            [_problem(file, (), mark, f"byte 0x{text[error.start]:02x} is not UTF-8; save the file as UTF-8")]
        ) from error
    unprintable = _UNPRINTABLE.search(decoded)
    if unprintable is not None and _is_json(decoded):
        # JSON allows in its strings as they are what YAML allows as escapes only (RFC 8259, section 7).
        return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", decoded)
    if unprintable is not None:
        before_lines = _LINE_BREAK.split(decoded[: unprintable.start()])
        mark = Mark(len(before_lines), len(before_lines[-1]) + 1, 1)
        message = f"the character U+{ord(unprintable[0]):04X} is not allowed; remove it, or write it as \\x.. in quotes"
        raise InvalidFile([_problem(file, tuple(_LINE_BREAK.split(decoded)), mark, message)])
    return decoded


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class _Stopped(Exception):
    """The rest of the text cannot be read; the problem is already noted."""


class _Composer:
    """From events to nodes, in one pass over one file."""

    def __init__(self, text: str, file: str) -> None:
        self._file = file
        self._lines = tuple(_LINE_BREAK.split(text))
        self._parser = yaml.CBaseLoader(_join_surrogates(text))
        self._anchors: dict[str, Node] = {}
        self._open_anchors: set[str] = set()
        self._nodes = 0
        self._aliases = 0
        self._problems: list[Problem] = []

    def documents(self) -> list[Document]:
        roots: list[Node] = []
        try:
            roots.extend(self._roots())
        except yaml.MarkedYAMLError as error:
            self._problems.append(self._syntax_problem(error))
        except _Stopped:
            pass
        if self._problems:
            raise InvalidFile(self._problems)
        return [Document(self._file, self._lines, root) for root in roots]

    def _roots(self) -> Iterator[Node]:
        while not isinstance(event := self._next(), yaml.StreamEndEvent):
            if isinstance(event, yaml.DocumentStartEvent):
                self._anchors.clear()
                root = self._node(self._next(), 1)
                if not (isinstance(root, Scalar) and root.mark.length == 0):
                    yield root

    def _next(self) -> yaml.Event:
        event = self._parser.get_event()
        if event is None:
            raise _Stopped
        return event

    def _node(self, event: yaml.Event, depth: int) -> Node:
        mark = self._mark(event, event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event.anchor or "", mark)
        self._count(1, mark)
        if depth > limits.YAML_MAX_DEPTH:
            raise self._stop(mark, f"nested deeper than {limits.YAML_MAX_DEPTH} levels")
        anchor = event.anchor if isinstance(event, yaml.NodeEvent) else None
        if anchor is not None:
            self._open_anchors.add(anchor)
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event, mark)
        elif isinstance(event, yaml.SequenceStartEvent):
            self._check_tag(event.tag, mark)
            node = self._sequence(event, depth)
        elif isinstance(event, yaml.MappingStartEvent):
            self._check_tag(event.tag, mark)
            node = self._mapping(event, depth)
        else:
            raise self._stop(mark, "this is not valid YAML: a value is missing here")
        if anchor is not None:
            self._open_anchors.discard(anchor)
            self._anchors[anchor] = node
        return node

    def _alias(self, anchor: str, mark: Mark) -> Node:
        self._aliases += 1
        if self._aliases > limits.YAML_MAX_ALIASES:
            raise self._stop(mark, f"more than {limits.YAML_MAX_ALIASES} aliases")
        if anchor in self._open_anchors:
            raise self._stop(mark, f"alias '*{anchor}' stands inside of what it names")
        node = self._anchors.get(anchor)
        if node is None:
            raise self._stop(mark, f"alias '*{anchor}' names nothing; '&{anchor}' must stand before it")
        self._count(node.size, mark)
        return node

    def _scalar(self, event: yaml.ScalarEvent, mark: Mark) -> Scalar:
        self._check_tag(event.tag, mark, allowed=("!", "tag:yaml.org,2002:str"))
        is_plain = event.tag is None and event.implicit[0]
        return Scalar(mark, event.value, _meaning(event.value) if is_plain else event.value)

    def _sequence(self, start: yaml.SequenceStartEvent, depth: int) -> Sequence:
        items: list[Node] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        mark = self._mark(start, event)
        return Sequence(mark, tuple(items), bool(start.flow_style), 1 + sum(item.size for item in items))

    def _mapping(self, start: yaml.MappingStartEvent, depth: int) -> Mapping:
        entries: dict[str, tuple[Mark, Node]] = {}
        size = 1
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = self._node(event, depth + 1)
            value = self._node(self._next(), depth + 1)
            size += key.size + value.size
            name = self._key_text(key)
            if name is not None and name in entries:
                first = entries[name][0].line
                self._note(key.mark, f"duplicate key {name[:40]!r}; it stands in line {first} already")
            elif name is not None:
                entries[name] = key.mark, value
        return Mapping(self._mark(start, event), entries, bool(start.flow_style), size)

    def _key_text(self, key: Node) -> str | None:
        if not isinstance(key, Scalar):
            self._note(key.mark, "a key must be text, not a list or a mapping")
            return None
        if not isinstance(key.value, str):
            mend = f"put it in quotes: '{key.text}'" if key.text else "write one"
            self._note(key.mark, f"a key must be text; {mend}")
            return None
        if key.value == "<<":
            self._note(key.mark, "merge keys ('<<') are not supported; write the keys out")
            return None
        return key.value

    def _check_tag(self, tag: str | None, mark: Mark, allowed: tuple[str, ...] = ()) -> None:
        if tag is not None and tag not in allowed:
            short = tag.replace("tag:yaml.org,2002:", "!!")[:40]
            self._note(mark, f"the tag {short} is not supported; remove it")

    def _count(self, nodes: int, mark: Mark) -> None:
        self._nodes += nodes
        if self._nodes > limits.YAML_MAX_NODES:
            raise self._stop(mark, f"more than {limits.YAML_MAX_NODES} values in one file")

    def _mark(self, first: yaml.Event, last: yaml.Event) -> Mark:
        """The first line of what lies between two events; libyaml counts from 0."""
        start, end = first.start_mark, last.end_mark
        if start is None or end is None:
            return Mark(1, 1, 0)
        line = self._lines[start.line] if start.line < len(self._lines) else ""
        if end.line == start.line:
            length = end.column - start.column
        else:
            length = len(line.rstrip()) - start.column
        return Mark(start.line + 1, start.column + 1, max(length, 0))

    def _note(self, mark: Mark, message: str) -> None:
        self._problems.append(_problem(self._file, self._lines, mark, message))

    def _stop(self, mark: Mark, message: str) -> _Stopped:
        self._note(mark, message)
        return _Stopped()

    def _syntax_problem(self, error: yaml.MarkedYAMLError) -> Problem:
        place = error.problem_mark or error.context_mark
        line, column = (place.line, place.column) if place is not None else (0, 0)
        problem, context = str(error.problem or "cannot be read"), str(error.context or "")
        source = self._lines[line] if line < len(self._lines) else ""
        char = source[column : column + 1]
        begun = error.context_mark
        if "\t" in source[: len(source) - len(source.lstrip())] and problem.startswith("found"):
            column = source.index("\t")
            message = "a tab cannot indent; use spaces"
        elif problem == "mapping values are not allowed in this context":
            message = "a ':' is not possible here; put the text in quotes, or check the indentation"
        elif problem == "found character that cannot start any token":
            message = f"a text cannot begin with {char!r}; put it in quotes"
        elif begun is not None and "quoted scalar" in context and "end of stream" in problem:
            line, column, message = begun.line, begun.column, "this quote is never closed"
        elif begun is not None and "a flow " in context and place is not None and self._is_end(line, column):
            line, column, message = begun.line, begun.column, "this bracket is never closed"
        else:
            message = f"this is not valid YAML: {problem}{', ' + context if context else ''}"
        return _problem(self._file, self._lines, Mark(line + 1, column + 1, 1), message)

    def _is_end(self, line: int, column: int) -> bool:
        rest = [*self._lines[line : line + 1]]
        return line >= len(self._lines) - 1 and not "".join(rest)[column:].strip()


def _join_surrogates(text: str) -> str:
    r"""JSON writes what lies outside of the BMP as two `\u`; libyaml wants one `\U`."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    return _SURROGATE_PAIR.sub(_joined, text)


def _joined(match: re.Match[str]) -> str:
    high, low = int(match[2], 16) - 0xD800, int(match[3], 16) - 0xDC00
    return f"{match[1]}\\U{0x10000 + (high << 10) + low:08X}"


def _problem(file: str, lines: tuple[str, ...], mark: Mark, message: str) -> Problem:
    source = lines[mark.line - 1] if mark.line <= len(lines) else ""
    return Problem(file, mark.line, mark.column, mark.length, message, source)
