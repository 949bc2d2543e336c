"""Logs of the agent: one line an event, secrets hidden, and never a reason to stop."""

from __future__ import annotations

import dataclasses
import io
import json
import logging as stdlib_logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from pydantic import BaseModel

from remotegpu_agent import logging


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Logging is global; leave it as it was."""
    root = stdlib_logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    stdlib_logging.captureWarnings(capture=False)
    structlog.reset_defaults()


class Terminal(io.StringIO):
    """Text that claims to be a terminal."""

    def isatty(self) -> bool:
        """It does."""
        return True


def logged(event: str = "event", *, level: logging.Level = "info", **values: Any) -> dict[str, Any]:
    """What one structlog call writes, read back from JSON."""
    out = io.StringIO()
    logging.set_up(level, "json", out)
    structlog.get_logger("test").info(event, **values)
    (line,) = out.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_json_line() -> None:
    """An event is one line of JSON with its level, its values, and the time in UTC."""
    found = logged("task_started", task_id="t1", run_no=2)
    assert found.pop("timestamp").endswith("Z")
    assert found == {"event": "task_started", "level": "info", "task_id": "t1", "run_no": 2}


def test_auto_format() -> None:
    """`auto` is console on a terminal, and JSON elsewhere."""
    pipe, terminal = io.StringIO(), Terminal()
    logging.set_up("info", "auto", pipe)
    structlog.get_logger("test").info("hello")
    logging.set_up("info", "auto", terminal)
    structlog.get_logger("test").info("hello")
    assert json.loads(pipe.getvalue())["event"] == "hello"
    assert "hello" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")


@pytest.mark.parametrize("format_", ["json", "console"])
def test_one_line_of_console_and_json_hides_secrets(format_: logging.Format) -> None:
    """Neither format lets the value of a key through that names a secret."""
    out = io.StringIO()
    logging.set_up("info", format_, out)
    structlog.get_logger("test").info("event", token="hush", nested={"api_key": "hush"})
    assert "hush" not in out.getvalue()
    assert logging.HIDDEN in out.getvalue()


def test_level() -> None:
    """Events below the level are not written, of structlog and of the standard library alike."""
    out = io.StringIO()
    logging.set_up("warning", "json", out)
    structlog.get_logger("test").info("quiet")
    stdlib_logging.getLogger("aiohttp.server").info("quiet")
    structlog.get_logger("test").warning("loud")
    stdlib_logging.getLogger("aiohttp.server").warning("loud")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["loud", "loud"]


def test_third_party_loggers() -> None:
    """A library's record becomes a line like ours, under its name, with its arguments and without its secrets."""
    out = io.StringIO()
    logging.set_up("info", "json", out)
    stdlib_logging.getLogger("aiohttp.client").error("sent %s to %s", "Authorization: Bearer hush", "host")
    found = json.loads(out.getvalue())
    assert (found["logger"], found["level"]) == ("aiohttp.client", "error")
    assert found["event"] == f"sent Authorization: Bearer {logging.HIDDEN} to host"


def test_third_party_info_is_for_debug() -> None:
    """What libraries say at INFO is written at level debug only."""
    out = io.StringIO()
    logging.set_up("info", "json", out)
    stdlib_logging.getLogger("asyncio").info("detail")
    assert out.getvalue() == ""
    logging.set_up("debug", "json", out)
    stdlib_logging.getLogger("asyncio").info("detail")
    assert json.loads(out.getvalue())["event"] == "detail"


def test_warnings_are_logged() -> None:
    """Python's warnings go the same way."""
    out = io.StringIO()
    logging.set_up("info", "json", out)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # catch_warnings restores the hook that captureWarnings replaced.
        stdlib_logging.captureWarnings(capture=False)
        stdlib_logging.captureWarnings(capture=True)
        warnings.warn("odd", UserWarning, stacklevel=1)
    assert "odd" in json.loads(out.getvalue())["event"]


def test_traceback_is_text() -> None:
    """A traceback is part of the event, without the values of local variables."""
    out = io.StringIO()
    logging.set_up("info", "console", out)
    local = "hush"
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger("test").exception("failed")
    assert "ValueError: broken" in out.getvalue()
    assert local not in out.getvalue()


def test_stdlib_traceback() -> None:
    """A library's exception comes with its traceback, in the same JSON line."""
    out = io.StringIO()
    logging.set_up("info", "json", out)
    try:
        raise ValueError("broken, token=hush")
    except ValueError:
        stdlib_logging.getLogger("asyncio").exception("failed")
    found = json.loads(out.getvalue())
    assert f"ValueError: broken, token={logging.HIDDEN}" in found["exception"]


@pytest.mark.parametrize(
    "key",
    [
        "token", "Token", "tokens", "agent_token", "X-Agent-Token", "accessToken", "password", "db.passwd", "secret",
        "client secret", "Authorization", "cookie", "Set-Cookie", "api_key", "apikey", "api-keys", "private_key", "env",
        "environ", "credentials", "passphrase",
    ],
)  # fmt: skip
def test_secret_keys(key: str) -> None:
    """The value of a key that names a secret or an environment is hidden."""
    assert logging.hide_secrets(None, "info", {key: "hush"})[key] == logging.HIDDEN


@pytest.mark.parametrize("key", ["token_file", "tokens_file", "envelope", "keys", "task_id", "secretary", "monkey"])
def test_harmless_keys(key: str) -> None:
    """Keys that only look like a secret's are shown: paths and ids are what an operator needs."""
    assert logging.hide_secrets(None, "info", {key: "shown"})[key] == "shown"


def test_no_secret_is_no_secret() -> None:
    """That there is no token is worth saying."""
    assert logging.hide_secrets(None, "info", {"token": None}) == {"token": None}


def test_secrets_at_depth() -> None:
    """Secrets are hidden in mappings, lists, tuples and sets, however they are nested."""
    value = [{"a": ({"b": {"token": "hush"}},)}, {"Bearer hush"}]
    found = logged(value=value)["value"]
    assert "hush" not in json.dumps(found)
    assert found[0]["a"][0]["b"] == {"token": logging.HIDDEN}


def test_depth_is_bounded() -> None:
    """Data that is nested without end is cut, not followed."""
    endless: list[object] = []
    endless.append(endless)
    assert "..." in json.dumps(logged(value=endless))


@dataclasses.dataclass
class _Spec:
    command: str
    env: dict[str, str]


class _Model(BaseModel):
    command: str
    env: dict[str, str]


@pytest.mark.parametrize("kind", [_Spec, _Model])
def test_secrets_in_objects(kind: type[_Spec | _Model]) -> None:
    """A dataclass and a model are written field by field, without their environment."""
    found = logged(spec=kind(command="train", env={"KEY": "hush"}))
    assert found["spec"] == {"command": "train", "env": logging.HIDDEN}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Bearer hush", "Authorization: Bearer [hidden]"),
        ("{'Authorization': 'Basic hush'}", "{'Authorization': 'Basic [hidden]'}"),
        ("X-Agent-Token: hush, next", "X-Agent-Token: [hidden], next"),
        ("{'X-Agent-Token': 'hush'}", "{'X-Agent-Token': '[hidden]'}"),
        ("(b'X-Agent-Token', b'x')", None),
        ("GET /x?token=hush HTTP/1.1", "GET /x?token=[hidden] HTTP/1.1"),
        ('{"password": "hush"}', '{"password": "[hidden]"}'),
        ("http://user:hush@plane/x", "http://[hidden]@plane/x"),
        ("http://plane.example:8443/api", "http://plane.example:8443/api"),
        ("control_plane.token_file: cannot read /x", "control_plane.token_file: cannot read /x"),
        ("no token; send one", "no token; send one"),
    ],
)
def test_secrets_in_text(text: str, shown: str | None) -> None:
    """Headers, assignments and URLs inside of a text lose their secret, and nothing else."""
    found = logging.hide_secrets(None, "info", {"event": text})["event"]
    assert "hush" not in found
    assert shown is None or found == shown


def test_anything_can_be_logged() -> None:
    """Bytes, paths, exceptions, odd keys and lone surrogates are written somehow."""
    found = logged(
        raw=b"Bearer hush\xff", path=Path("/x"), error=ValueError("token=hush"), odd={(1, 2): 3}, lone="\udcff"
    )
    assert "hush" not in json.dumps(found)
    assert found["path"] == "/x"
    assert found["odd"] == {"(1, 2)": 3}


def test_full_disk() -> None:
    """A log that cannot be written is lost; the call returns as ever."""
    with io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True) as full:
        with pytest.raises(OSError, match="No space"):
            full.write("x")
        logging.set_up("info", "json", full)
        structlog.get_logger("test").info("event")
        stdlib_logging.getLogger("aiohttp").error("event")


def test_closed_stream() -> None:
    """A stream that was closed is no reason to fail either."""
    out = io.StringIO()
    logging.set_up("info", "json", out)
    out.close()
    structlog.get_logger("test").info("event")


def test_colours_on_a_terminal_only() -> None:
    """The console format has no escape sequences in a file."""
    plain, terminal = io.StringIO(), Terminal()
    for out in (plain, terminal):
        logging.set_up("info", "console", out)
        structlog.get_logger("test").info("hello")
    assert not re.search("\x1b", plain.getvalue())
    assert "\x1b" in terminal.getvalue()
