"""The documents name what exists: links, paths, make targets, commands and names; and nothing of one machine."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from remotegpu_agent.cli.app import VERBS, separate, split_command
from remotegpu_agent.cli.arguments import PROGRAM, parser_of
from remotegpu_agent.cli.exits import Stop

ROOT: Final = Path(__file__).resolve().parents[2]
DOCUMENTS: Final = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
CODE_FOLDERS: Final = ("agent", "queue", "sidecar", "schemas", "examples")

HOSTS: Final = {"127.0.0.1", "localhost", "plane.example"}
ABSOLUTE_PATHS: Final = (
    "/etc/remotegpu-agent",
    "/var/lib/remotegpu-agent",
    "/run/remotegpu-agent",
    "/proc",
    "/process/stop",  # calls of the API
    "/openapi.json",
)

_FENCED: Final = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_INDENTED: Final = re.compile(r"(?<=\n\n) {4}.*(?:\n| {4}.*)*")
_SPAN: Final = re.compile(r"`([^`]+)`")
_LINK: Final = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH: Final = re.compile(r"[\w.-]+\.py|[\w.-]+(?:/[\w.-]+)+/?|[\w.-]+/")
_CALL: Final = re.compile(r"(?:(\w+)\.)?(\w+)\(\)")
_NAME: Final = re.compile(r"_?[A-Z][A-Za-z_]+")
_COMMAND: Final = re.compile(rf"(?<![\w-]){PROGRAM} ([^#&)\n]*)")
_TARGET: Final = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)
_URL: Final = re.compile(r"\w+://([^/\s:`\"')]+)[^\s`\"')]*")
_ABSOLUTE: Final = re.compile(r"(?<![\w.$~}>*/-])/\w[\w./-]*")
_IPV4: Final = re.compile(r"(?<![\w.])(?:\d+\.){3}\d+(?![\w.])")


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def _prose(document: Path) -> str:
    """The text without its blocks of code."""
    return _INDENTED.sub("", _FENCED.sub("", document.read_text("utf-8")))


def _spans(document: Path) -> list[str]:
    return _SPAN.findall(_prose(document))


def _blocks(document: Path) -> str:
    return "\n".join(_FENCED.findall(document.read_text("utf-8")))


def _tree() -> Iterator[str]:
    """Every file and folder of the repository, relative to its root; folders end with a slash."""
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        for name in [*files, *(f"{name}/" for name in folders)]:
            yield str(Path(folder, name).relative_to(ROOT)) + ("/" if name.endswith("/") else "")


def _anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _sources() -> dict[str, list[str]]:
    """By module name, the texts of the modules that are called so."""
    found: dict[str, list[str]] = {}
    for folder in CODE_FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            found.setdefault(path.stem, []).append(path.read_text("utf-8"))
    return found


def _defines(text: str, name: str, within: str | None = None) -> bool:
    """Whether a module defines the name: of a function, class or constant, or of a method of a class."""
    if within is None:
        return re.search(rf"^\s*(?:async )?(?:def|class) {name}\b|^{name}\b[^\n]*=", text, re.MULTILINE) is not None
    body = re.search(rf"^class {within}\b.*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    return body is not None and _defines(body[0], name)


def _problem_of_command(words: list[str]) -> str | None:
    """Why the program would not take these arguments, or None."""
    front, _ = split_command(words)
    _, rest = separate(front)
    name = next((name for name in (" ".join(rest[:2]), rest[0] if rest else "") if name in VERBS), None)
    if name is None:
        return f"no such verb: {' '.join(rest)}"
    try:
        _, unknown = parser_of(VERBS[name], name).parse_known_intermixed_args(rest[len(name.split()) :])
    except Stop as error:
        return str(error)
    return f"unknown: {unknown}" if unknown else None


@each_document
def test_links_resolve(document: Path) -> None:
    """A relative link leads to a file or folder that exists, and to a heading that it has."""
    broken = []
    for link in _LINK.findall(_prose(document)):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (document.parent / target).resolve() if target else document
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            broken.append(link)
    assert broken == []


@each_document
def test_paths_exist(document: Path) -> None:
    """What looks like a file or folder of the repository is one, by its path or the end of it."""
    tree = [f"/{path}" for path in _tree()]
    named = [span for span in _spans(document) if _PATH.fullmatch(span)]
    assert [span for span in named if not any(path.endswith(f"/{span}") for path in tree)] == []


@each_document
def test_make_targets_exist(document: Path) -> None:
    """Each `make` target that is mentioned is one of the Makefile."""
    targets = set(_TARGET.findall((ROOT / "Makefile").read_text("utf-8")))
    lines = [*_spans(document), *_blocks(document).splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("make ")]
    named = {word for words in commands for word in words if "=" not in word and not word.startswith("-")}
    assert named - targets == set()


@each_document
def test_commands_parse(document: Path) -> None:
    """Each command line of the program has a verb and options that exist, with values that they take."""
    text = "\n".join([*_spans(document), _blocks(document)])
    commands = [match[1].strip() for match in _COMMAND.finditer(text)]
    problems = {command: _problem_of_command(shlex.split(command)) for command in commands}
    assert {command: problem for command, problem in problems.items() if problem} == {}


def test_readme_shows_the_way() -> None:
    """The commands of a first hour are in the README, so that the test above has something to check."""
    verbs = {match[1].split()[0] for match in _COMMAND.finditer(_blocks(ROOT / "README.md")) if match[1][0] != "-"}
    assert {"submit", "logs", "status", "setup", "doctor", "run"} <= verbs


@pytest.mark.parametrize("command", ["sumbit x.yaml", "submit --wiat x.yaml", "list --limit none", "logs"])
def test_wrong_commands_are_found(command: str) -> None:
    """A verb, an option or a value that does not exist, and an argument that is missing, are problems."""
    assert _problem_of_command(shlex.split(command)) is not None


@each_document
def test_functions_exist(document: Path) -> None:
    """A function named `name()`, `module.name()` or `Class.name()` is defined in the code, there."""
    sources = _sources()
    texts = [text for found in sources.values() for text in found]
    missing = []
    for span in _spans(document):
        call = _CALL.fullmatch(span)
        if call is None:
            continue
        owner, name = call[1], call[2]
        if owner is None or owner in sources:
            is_there = any(_defines(text, name) for text in (sources[owner] if owner else texts))
        else:
            is_there = any(_defines(text, name, within=owner) for text in texts)
        if not is_there:
            missing.append(span)
    assert missing == []


def test_architecture_names_exist() -> None:
    """A class or constant that the tour names is defined in the code."""
    texts = [text for found in _sources().values() for text in found]
    named = [span for span in _spans(ROOT / "ARCHITECTURE.md") if _NAME.fullmatch(span)]
    assert [span for span in named if not any(_defines(text, span) for text in texts)] == []


@each_document
def test_nothing_of_one_machine(document: Path) -> None:
    """No path but those of an installed agent, no address but examples: no index, no build machine."""
    text = document.read_text("utf-8")
    hosts = {match[1] for match in _URL.finditer(text)} | set(_IPV4.findall(text))
    paths = _ABSOLUTE.findall(_URL.sub("", text))
    assert hosts - HOSTS == set()
    assert [path for path in paths if not path.startswith(ABSOLUTE_PATHS)] == []
