"""The spawner survives any message, hands on nothing, and imports nothing after a fork."""

from __future__ import annotations

import ast
import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from remotegpu_schemas.attempt import EndedBy, RunEnded, RunStarted
from remotegpu_sidecar import identity, record, spawner
from remotegpu_sidecar.launcher import Launcher
from remotegpu_sidecar.output import read_output
from tests.sidecar.support import (
    DEADLINE_S,
    identity_of,
    launched,
    make_spec,
    python,
    sh,
    unique,
    until,
    wait_until_dead,
)

# Runs the spawner with a watch on imports: whatever is imported, or read from a .py or .pyc, after a fork is noted.
_WATCHED = """
import os, runpy, sys
first = os.getpid()
def note(text):
    fd = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, text.encode() + b"\\n")
    os.close(fd)
def watch(event, args):
    if os.getpid() == first:
        return
    if event == "import" or (event == "open" and str(args[0]).endswith((".py", ".pyc"))):
        note(f"{{event}} {{args[0]}}")
    if event == "os.fork":
        note("forked")
sys.addaudithook(watch)
sys.argv = [{path!r}, sys.argv[1]]
runpy.run_path({path!r}, run_name="__main__")
"""


class Raw:
    """A spawner without a launcher; `inherited` descriptors are passed to it under their numbers."""

    def __init__(self, command: list[str], inherited: Sequence[int] = ()) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(DEADLINE_S)
        with contextlib.closing(theirs):
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno(), *inherited],
                stdin=subprocess.DEVNULL,
                env={},
            )

    def launch(self, message: bytes) -> socket.socket:
        """Send a message with a channel; returns our end of it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(DEADLINE_S)
        with contextlib.closing(theirs):
            socket.send_fds(self.socket, [message], [theirs.fileno()])
        return ours

    def close(self) -> None:
        """Go away as the agent does."""
        self.socket.close()
        assert self.process.wait(DEADLINE_S) == 0


_COMMAND = [sys.executable, "-I", "-S", "-X", "utf8", spawner.__file__]


@pytest.fixture
def raw() -> Iterator[Raw]:
    """A spawner of our own."""
    made = Raw(_COMMAND)
    yield made
    made.close()


def test_malformed_messages_are_answered_and_survived(raw: Raw, tmp_path: Path) -> None:
    """Each wrong message is answered on its channel, or dropped; the next one is served."""
    for message in (b"", b"{", b"[]", b"{}", b'{"dir": 1}', b'{"dir": "relative"}', b"\xff\xfe", b"[" * 9000):
        with contextlib.closing(raw.launch(message)) as channel:
            assert "error" in json.loads(channel.recv(10_000))
    raw.socket.send(b'{"dir": "/"}')
    raw.socket.send(b"")
    with contextlib.closing(raw.launch(json.dumps({"dir": str(tmp_path / "none")}).encode())) as channel:
        assert json.loads(channel.recv(10_000))["errno"] == 2
    assert raw.process.poll() is None


def test_two_descriptors_are_refused(raw: Raw) -> None:
    """They are closed, not kept."""
    with contextlib.ExitStack() as stack:
        ends = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        for pair in ends:
            for end in pair:
                stack.enter_context(contextlib.closing(end))
        socket.send_fds(raw.socket, [b'{"dir": "/"}'], [theirs.fileno() for _, theirs in ends])
        for ours, theirs in ends:
            ours.settimeout(DEADLINE_S)
            theirs.close()
        assert "one descriptor" in json.loads(ends[0][0].recv(10_000))["error"]
        assert ends[1][0].recv(10) == b""


def test_no_descriptor_but_the_standard_streams_reaches_a_task(attempts_dir: Path, tmp_path: Path) -> None:
    """What the spawner inherits, and what is its own or the shim's, is closed in the task: 0, 1 and 2 are all."""
    listing = (
        "import os; fds = map(int, os.listdir('/proc/self/fd'));"  # the listing's own is closed by the time it is read
        " print({fd: os.readlink(f'/proc/self/fd/{fd}') for fd in fds if os.path.lexists(f'/proc/self/fd/{fd}')})"
    )
    spec = make_spec(*python(listing))
    directory = attempts_dir / f"{spec.attempt_id}.1"
    directory.mkdir(parents=True)
    (directory / "record").write_bytes(record.encode("spec", spec.model_dump_json().encode()))
    secret = tmp_path / "secret"
    secret.touch()
    with secret.open() as file:
        # Low and high: a number that the shim happens to use itself would be closed by chance.
        high = fcntl.fcntl(file, fcntl.F_DUPFD, 200)
        try:
            heir = Raw(_COMMAND, [file.fileno(), high])
        finally:
            os.close(high)
    with contextlib.closing(heir), contextlib.closing(heir.launch(json.dumps({"dir": str(directory)}).encode())) as to:
        hello = json.loads(to.recv(10_000))["hello"]
        shim = identity_of(hello["pid"])
        to.send(b'{"go":{}}')
        assert "started" in json.loads(to.recv(10_000))
        wait_until_dead(shim)
    ended = RunEnded.model_validate(record.read(directory / "record")[0]["ended"])
    assert ended.exit_code == 0
    listed = read_output(directory, "stdout", 0, 10_000)[1].decode()
    assert set(ast.literal_eval(listed)) == {0, 1, 2}, listed


def test_nothing_is_imported_after_the_fork(attempts_dir: Path, tmp_path: Path) -> None:
    """An upgrade may replace every file of the program under a living shim: it has all it needs from the start."""
    log = tmp_path / "log"
    runs = {
        "exit": make_spec(
            *sh("echo out; sleep 0.01; (setsid sleep 1000 &) ; exit 3"), attempt="exit", grace_period_s=0.1
        ),
        "none": make_spec("no-such-program", attempt="none"),
        "time": make_spec(
            *sh("trap '' TERM; while :; do sleep 1; done"), attempt="time", timeout_s=0.2, grace_period_s=0.1
        ),
    }
    watched = Raw(
        [sys.executable, "-I", "-S", "-X", "utf8", "-c", _WATCHED.format(log=str(log), path=spawner.__file__)]
    )
    for name, spec in runs.items():
        directory = attempts_dir / f"{unique(name)}.1"
        directory.mkdir(parents=True)
        (directory / "record").write_bytes(record.encode("spec", spec.model_dump_json().encode()))
        with contextlib.closing(watched.launch(json.dumps({"dir": str(directory)}).encode())) as channel:
            hello = json.loads(channel.recv(10_000))["hello"]
            channel.send(b'{"go":{}}')
            channel.recv(10_000)
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(hello["pid"])
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                assert poll.poll(DEADLINE_S * 1000)
                os.close(fd)
        lines, complaints = record.read(directory / "record")
        assert complaints == []
        assert RunEnded.model_validate(lines["ended"]).ended_wall_ns > 0
    watched.close()
    noted = log.read_text().splitlines()
    assert set(noted) == {"forked"}, "the watch works in the shim, and saw no import"


def _start_damaged(raw: Raw, attempts_dir: Path, **damage: object) -> tuple[Path, int, dict[str, object]]:
    """Start a sleeper whose spec no agent would write: its directory, its shim's pid, the shim's answer."""
    spec = make_spec("sleep", "1000")
    directory = attempts_dir / f"{spec.attempt_id}.1"
    directory.mkdir(parents=True)
    data = {**json.loads(spec.model_dump_json()), **damage}
    (directory / "record").write_bytes(record.encode("spec", json.dumps(data).encode()))
    with contextlib.closing(raw.launch(json.dumps({"dir": str(directory)}).encode())) as channel:
        hello = json.loads(channel.recv(10_000))
        if "hello" not in hello:
            return directory, 0, hello
        channel.send(b'{"go":{}}')
        return directory, hello["hello"]["pid"], json.loads(channel.recv(10_000))


def test_fault_of_the_shim_kills_the_tree_and_is_on_record(raw: Raw, attempts_dir: Path) -> None:
    """Whatever goes wrong inside it while the task runs: nothing is left, and the record says what went wrong."""
    directory, shim_pid, answer = _start_damaged(raw, attempts_dir, stop_signal="nonsense")
    assert "started" in answer
    task = identity_of(RunStarted.model_validate(answer["started"]).process.pid)
    shim_identity = identity_of(shim_pid)
    os.kill(shim_pid, signal.SIGTERM)
    wait_until_dead(shim_identity)
    assert not identity.is_alive(task)
    ended = RunEnded.model_validate(record.read(directory / "record")[0]["ended"])
    assert "the shim failed and killed the task: TypeError" in (ended.error or "")
    assert ended.ended_by is EndedBy.STOP


@pytest.mark.parametrize(
    "damage", [{"timeout_s": "x"}, {"grace_period_s": None}, {"env": 3}, {"argv": []}, {"cwd": None}]
)
def test_spec_that_cannot_be_started_is_a_launch_error(raw: Raw, attempts_dir: Path, damage: dict[str, object]) -> None:
    """A damaged or foreign spec ends as `launch`, with a sentence."""
    directory, _, answer = _start_damaged(raw, attempts_dir, **damage)
    ended = RunEnded.model_validate(answer["ended"])
    assert ended.ended_by is EndedBy.LAUNCH
    assert ended.error
    assert record.read(directory / "record")[0]["ended"] == answer["ended"]


def test_spec_without_bounds_is_refused_before_the_hello(raw: Raw, attempts_dir: Path) -> None:
    """The shim says why it cannot work."""
    answer = _start_damaged(raw, attempts_dir, output_limit_bytes="much")[2]
    assert "not an integer" in str(answer["error"])


async def test_goes_when_the_agent_goes(launcher: Launcher) -> None:
    """End of file ends it, with status 0 and no noise."""
    pid = launcher.spawner_pid
    assert pid is not None
    await launcher.stop()
    assert not os.path.exists(f"/proc/{pid}")


async def test_is_out_of_reach_of_the_terminal(launcher: Launcher) -> None:
    """Spawner, shim and task each lead a session of their own: ^C at the agent's terminal reaches none of them."""
    run = await launched(launcher, make_spec("sleep", "1000"))
    assert run.started is not None
    pids = [launcher.spawner_pid or 0, run.shim.pid, run.started.process.pid]
    assert [os.getsid(pid) for pid in pids] == pids
    run.kill()
    await run.wait()
    run.close()


async def test_reaps_its_shims(launcher: Launcher) -> None:
    """An ended shim leaves no zombie."""
    runs = [await launched(launcher, make_spec("true", run_no=number)) for number in range(1, 6)]
    for run in runs:
        await run.wait()
        run.close()
    await until(lambda: not any(os.path.exists(f"/proc/{run.shim.pid}") for run in runs), "the shims to be reaped")


def test_imports_are_few() -> None:
    """No module of the agent's, and none of the heavy ones of the library."""
    program = f"import sys; __file__ = {spawner.__file__!r}; exec(open(__file__).read()); print(*sorted(sys.modules))"
    program = f"__name__ = 'spawner'; {program}"
    modules = subprocess.check_output([sys.executable, "-I", "-S", "-c", program], text=True).split()
    heavy = {"typing", "asyncio", "dataclasses", "inspect", "logging", "subprocess", "threading", "pathlib", "pydantic"}
    assert heavy & set(modules) == set()
    assert {name for name in modules if "remotegpu" in name} == {
        "remotegpu_sidecar",
        *(
            f"remotegpu_sidecar.{name}"
            for name in ("cgroups", "enforcement", "identity", "kernel", "output", "processes")
        ),
        *(f"remotegpu_sidecar.{name}" for name in ("record", "shim", "taskstart", "tree")),
    }
    assert len(modules) < 90


async def test_f08_spawner_killed(launcher: Launcher) -> None:
    """F08: running tasks are untouched, the next launch has a new spawner."""
    before = await launched(launcher, make_spec(*sh("read x; exit 5"), attempt="before"))
    sleeper = await launched(launcher, make_spec("sleep", "1000", attempt="sleeper"))
    old = launcher.spawner_pid
    assert old is not None
    os.kill(old, signal.SIGKILL)
    after = await launched(launcher, make_spec(*sh("exit 6"), attempt="after"))
    assert launcher.spawner_pid not in {None, old}
    ended = [(await run.wait()).ended for run in (before, after)]
    assert [each.exit_code if each else None for each in ended] == [5, 6]
    assert sleeper.started is not None
    assert sleeper.contains(sleeper.started.process.pid)
    sleeper.kill()
    await sleeper.wait()
    for run in (before, sleeper, after):
        run.close()
