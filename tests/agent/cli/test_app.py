"""The program around the verbs: options, help, exit codes, streams, and no traceback whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Self

import pytest

from remotegpu_agent.cli.app import VERBS, is_waiting, separate, split_command
from tests.agent.cli.program import PROGRAM, Cli, ended, environment, process, run
from tests.agent.cli.scripted_agent import DEADLINE_S, LiveAgent

READING_VERBS = ("version", "list", "show task-1", "logs task-1", "status", "cancel task-1", "wait task-1")


# --- usage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help(cli: Cli, name: str) -> None:
    """Each verb explains itself with an example, and ends with 0."""
    found = cli(*name.split(), "--help")
    assert (found.code, found.err) == (0, "")
    assert found.out.startswith(f"usage: remotegpu-agent {name} [-h]")
    assert f"remotegpu-agent {'' if name.startswith(('run', 'doctor', 'config check')) else name}" in found.out
    assert "Example" in found.out


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help(cli: Cli, arguments: list[str]) -> None:
    """The program's help lists all verbs."""
    found = cli(*arguments)
    assert found.code == 0
    assert all(f"\n  {name} " in found.out for name in VERBS)


def test_no_verb(cli: Cli) -> None:
    """Without a verb the help goes to standard error, and the usage was wrong."""
    found = cli()
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("usage: remotegpu-agent")


def test_group_help(cli: Cli) -> None:
    """A group of verbs lists its own."""
    found = cli("config", "--help")
    assert found.code == 0
    assert "config check" in found.out
    assert "submit" not in found.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "there is no verb 'lst' in this version; did you mean 'list'?"),
        (["top"], "there is no verb 'top' in this version"),
        (["config"], "'config' needs one of: show, check, path"),
        (["config", "chek"], "did you mean 'check'?"),
        (["token"], "'token' needs one of: new"),
        (["--wat", "list"], "there is no option '--wat' before the verb"),
        (["--config"], "--config: expected one argument"),
        (["list", "--watch"], "there is no option '--watch' (see `remotegpu-agent list --help`)"),
        (["list", "--labl", "a=b"], "there is no option '--labl'; did you mean '--label'?"),
        (["submit", "--var", "a=b", "x.yaml"], "there is no option '--var'"),
        (["list", "--limit", "0"], "--limit: must be a whole number from 1 to 1000, not '0'"),
        (["list", "--limit", "many"], "--limit: must be a whole number from 1 to 1000, not 'many'"),
        (["list", "--limit", "9" * 5000], "--limit: must be a whole number from 1 to 1000"),
        (["list", "--state", "runing"], "--state: there is no state 'runing'. Did you mean 'running'?"),
        (["list", "--state", "zzz"], "Known: pending, assigned, running"),
        (["list", "surplus"], "there is one argument too many: 'surplus'"),
        (["list", "--lim", "5"], "there is no option '--lim'; did you mean '--limit'?"),
        (["list", "--label", "x"], "--label: 'x' is not NAME=VALUE"),
        (["show"], "the following arguments are required: ID"),
        (["show", "a", "b"], "there is one argument too many: 'b'"),
        (["show", "a/b"], "'a/b' is no id of a task"),
        (["show", ""], "'' is no id of a task"),
        (["show", "..\udcff"], "is no id of a task"),
        (["logs", "--run", "0", "a"], "--run: must be a whole number from 1, not '0'"),
        (["logs", "--since-offset", "x", "a"], "--since-offset: must be a whole number, not 'x'"),
        (["cancel"], "the following arguments are required: ID"),
        (["submit", "--priority", "11", "x.yaml"], "--priority: must be a whole number from 1 to 10, not '11'"),
        (["token", "new", "--role", "admin"], "--role: invalid choice: 'admin' (choose from"),
        (["token", "new", "--name", "a b"], "--name: 'a b' is no name"),
    ],
)
def test_wrong_usage(cli: Cli, arguments: list[str], message: str) -> None:
    """Wrong usage ends with 2, one message on standard error and nothing on standard output."""
    found = cli(*arguments)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("remotegpu-agent: ")
    assert message in found.err
    assert len(found.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["wait"], ["submit", "--wait", "--nope"], ["submit", "--follow", "none.yaml"]])
def test_wrong_usage_of_a_wait(cli: Cli, arguments: list[str]) -> None:
    """Where the exit code is the task's own, even wrong usage is 125."""
    assert cli(*arguments).code == 125


@pytest.mark.parametrize(
    ("given", "before", "rest"),
    [
        (["list", "--json"], ["--json"], ["list"]),
        (["--json", "list"], ["--json"], ["list"]),
        (["list", "--config", "x", "--limit", "3"], ["--config", "x"], ["list", "--limit", "3"]),
        (["run", "--config=x", "--set", "a.b=c"], ["--config=x"], ["run", "--set", "a.b=c"]),
        (["show", "--url", "u", "a", "--token-file", "t"], ["--url", "u", "--token-file", "t"], ["show", "a"]),
        (["setup", "--url", "u", "--config", "x"], ["--config", "x"], ["setup", "--url", "u"]),
        (["--url", "u", "setup"], ["--url", "u"], ["setup"]),
        (["list", "--config"], ["--config"], ["list"]),
    ],
)
def test_separate(given: list[str], before: list[str], rest: list[str]) -> None:
    """Global options may stand before or behind the verb; `setup` has a meaning of its own for two of them."""
    assert separate(given) == (before, rest)


def test_split_command() -> None:
    """Behind `--` of `submit` stands a command, whatever its arguments look like."""
    assert split_command(["submit", "--wait", "--", "list", "--json", "--"]) == (
        ["submit", "--wait"],
        ["list", "--json", "--"],
    )
    assert split_command(["show", "--", "x"]) == (["show", "--", "x"], None)
    assert split_command(["--config", "submit", "show", "--", "x"])[1] is None


def test_is_waiting() -> None:
    """What a submitted command calls its own options is no option of ours."""
    assert is_waiting(["wait", "x"])
    assert is_waiting(["--url", "u", "submit", "x.yaml", "--wait"])
    assert not is_waiting(["submit", "--", "cmd", "--wait"])
    assert not is_waiting(["--config", "wait", "list"])


def test_options_on_both_sides(agent: LiveAgent, cli: Cli) -> None:
    """Global options mean the same before and behind the verb."""
    for arguments in (
        ["--url", agent.url, "--token-file", agent.token_file, "--json", "list"],
        ["list", "--json", "--url", agent.url, f"--token-file={agent.token_file}"],
    ):
        assert cli(*arguments).json() == {"tasks": [], "total": 0, "limit": 50, "offset": 0}


# --- streams -------------------------------------------------------------------------------------------------------


def test_broken_pipe(agent: LiveAgent) -> None:
    """A reader that leaves early ends the program quietly with 1."""
    for number in range(300):
        agent.operations.add(f"task-{number}", name="x" * 200)
    child = process("list", "--limit", 300, environ={"REMOTEGPU_AGENT_SOCKET": str(agent.socket)})
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    with child:
        assert (child.wait(DEADLINE_S), child.stderr.read()) == (1, "")


def test_full_disk() -> None:
    """Output that cannot be written is an error that says so."""
    with open("/dev/full", "w", encoding="utf-8") as full:
        found = run("version", stdout=full)
    assert (found.code, found.err) == (1, "remotegpu-agent: cannot write the output: No space left on device\n")


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closing: str) -> None:
    """A program whose streams were closed by its caller ends as ever, and what is for people never lands in JSON."""
    command = f"{' '.join(PROGRAM)} --json status {closing}"
    environ = environment(REMOTEGPU_AGENT_SOCKET="/nowhere/agent.sock")
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_in_any_encoding(agent: LiveAgent, encoding: str) -> None:
    """JSON stays JSON where standard output cannot hold its characters."""
    agent.operations.add("task-1", name="größe 训练 \U0001f600")
    environ = {"REMOTEGPU_AGENT_SOCKET": str(agent.socket), "PYTHONIOENCODING": encoding}
    found = run("list", "--json", environ=environ, encoding="utf-8")
    assert found.json()["tasks"][0]["name"] == "größe 训练 \U0001f600"


def test_text_in_ascii(agent: LiveAgent) -> None:
    """Where characters cannot be shown, they are written as escapes."""
    agent.operations.add("task-1", name="größe")
    environ = {"REMOTEGPU_AGENT_SOCKET": str(agent.socket), "PYTHONIOENCODING": "ascii"}
    assert "gr\\xf6\\xdfe" in run("list", environ=environ).out


def test_terminal_obeys_nothing(agent: LiveAgent, local: Cli) -> None:
    """Control characters of a task's name do not reach the terminal."""
    agent.do(lambda operations: operations.add("task-1", name="a\x1b[31mb\nc"))
    found = local("list").out
    assert "\x1b" not in found
    assert len(found.splitlines()) == 2


# --- endings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("wait", "task-1"), ("logs", "-f", "task-1")])
def test_interrupt(agent: LiveAgent, arguments: tuple[str, ...]) -> None:
    """Ctrl-C ends with 130 and one word."""
    agent.do(lambda operations: operations.add("task-1"))
    with process(*arguments, environ={"REMOTEGPU_AGENT_SOCKET": str(agent.socket)}) as child:
        agent.wait_called("follow_log") if arguments[0] == "logs" else agent.wait_called("show_task", wait_s=60.0)
        child.send_signal(signal.SIGINT)
        found = ended(child)
    assert (found.code, found.out, found.err) == (130, "", "interrupted\n")


def test_interrupt_while_loading() -> None:
    """Ctrl-C before the program is there ends with 130, too."""
    code = (
        "import sys, builtins, signal\n"
        "import remotegpu_agent.cli as cli\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'remotegpu_agent.cli.app':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "cli.main(['version'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_mistake_in_the_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever nobody foresaw is one line, and says how to report it."""
    from remotegpu_agent.cli import main
    from remotegpu_agent.cli.context import Globals

    def fail(_options: Globals) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(Globals, "client", fail)
    with pytest.raises(SystemExit) as exited:
        main(["list"])
    assert exited.value.code == 1
    assert capsys.readouterr().err == (
        "remotegpu-agent: a mistake in this program: ZeroDivisionError: by zero. Please report it with what "
        "REMOTEGPU_AGENT_DEBUG=1 shows\n"
    )
    with pytest.raises(SystemExit) as exited:
        main(["wait", "x"])
    assert exited.value.code == 125
    monkeypatch.setenv("REMOTEGPU_AGENT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["list"])


# --- a server that is none ------------------------------------------------------------------------------------------


class Garbage:
    """A server that sends the same bytes to everybody, and closes."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE_S)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(self._answer)


def http(body: bytes, content_type: str = "application/json", status: str = "200 OK") -> bytes:
    """An answer with this body."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        (b"", 3, "the connection to the agent at"),
        (b"\x00\xff" * 100, 3, "the connection to the agent at"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", 3, "the connection to the agent at"),
        (http(b"<html>hello</html>", "text/html"), 1, "something that is no answer of a remotegpu-agent: '<html>"),
        (http(b"\xff\x00\x1b[31m"), 1, "something that is no answer"),
        (http(b"[" * 100000), 1, "something that is no answer"),
        (http(b"[]"), 1, "something that is no answer"),
        (http(b'{"code": "x"}'), 1, "something that is no answer"),
        (http(b"", status="502 Bad Gateway"), 1, "answered HTTP 502"),
        (http(b'{"code": 30023, "message": "starting"}'), 5, "starting (code 30023)"),
        (http(b'{"code": 30004, "message": "task not found"}'), 4, "task not found (code 30004)"),
        (http(b'{"code": 30016, "message": "no token"}'), 5, "give a token of the agent's api.tokens_file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["status", "show x", "cancel x", "list"])
def test_garbage_from_the_other_side(cli: Cli, verb: str, answer: bytes, code: int, message: str) -> None:
    """Whatever comes back, the message says what it was, and the code what kind of trouble it is."""
    with Garbage(answer) as server:
        found = cli("--url", server.url, "--json", *verb.split())
    assert found.code == code
    assert message in found.err
    assert "\x1b" not in found.err
    if verb != "cancel x" or code in {1, 3}:
        assert found.out == ""


@pytest.mark.parametrize("data", [b'{"code": 0, "success": true, "data": null}', b'{"code": 0, "data": {}}'])
@pytest.mark.parametrize("verb", ["status", "show x", "list", "cancel x"])
def test_empty_answers(cli: Cli, verb: str, data: bytes) -> None:
    """An answer without what is expected in it is shown as empty; an older agent may not know a field."""
    with Garbage(http(data)) as server:
        assert cli("--url", server.url, *verb.split()).code == 0


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (b"data: {nonsense\n\n", "sent an event that is not JSON"),
        (b'event: error\ndata: {"code": 30019, "message": "too many"}\n\n', "too many (code 30019)"),
    ],
)
def test_garbage_in_a_stream(agent: LiveAgent, cli: Cli, events: bytes, message: str) -> None:
    """An event that is none ends `logs -f` with a message."""
    from remotegpu_agent.cli.client import Client
    from remotegpu_agent.cli.endpoints import Endpoint
    from remotegpu_agent.cli.exits import Stop

    with Garbage(http(events, "text/event-stream")) as server:
        client = Client([Endpoint("test", url=server.url)])
        with pytest.raises(Stop, match=message.replace("(", r"\(").replace(")", r"\)")):  # noqa: SIM117 - two subjects
            with client.follow("/tasks/x/logs", ()) as chunks:
                list(chunks)


# --- speed ---------------------------------------------------------------------------------------------------------


def test_reading_verbs_load_little(agent: LiveAgent) -> None:
    """Reading verbs start fast: they load neither pydantic nor aiohttp, nor what draws tables on terminals."""
    agent.operations.add("task-1")
    agent.operations.end("task-1")
    code = (
        "import sys\n"
        "from remotegpu_agent.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    heavy = {'pydantic', 'pydantic_core', 'aiohttp', 'rich', 'typer', 'structlog', 'asyncio', 'yaml'}\n"
        "    print(end.code, sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    environ = environment(REMOTEGPU_AGENT_SOCKET=str(agent.socket))
    for verb in READING_VERBS:
        done = subprocess.run(
            [sys.executable, "-c", code, *verb.split()], capture_output=True, text=True, env=environ, check=False
        )
        expected = "5 []" if verb.startswith("cancel") else "0 []"
        assert done.stderr.splitlines()[-1] == expected, verb


def test_console_script() -> None:
    """The installed program is this one."""
    path = Path(sys.executable).with_name("remotegpu-agent")
    done = subprocess.run([path, "version"], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.startswith("remotegpu-agent 0.")


def test_openapi_needs_no_agent(cli: Cli) -> None:
    """`openapi` prints the document that a running agent serves."""
    from remotegpu_agent.api.openapi import text
    from remotegpu_agent.api.routes import ROUTES

    found = cli("openapi")
    assert (found.code, found.err, found.out) == (0, "", text(ROUTES))
