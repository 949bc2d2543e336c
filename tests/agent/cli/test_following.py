"""`logs` and `wait`: output as it is, by offset, and over restarts of the agent."""

from __future__ import annotations

import contextlib

import pytest

from remotegpu_agent.cli import following
from remotegpu_agent.cli.exits import Unreachable
from remotegpu_agent.cli.following import Patience
from remotegpu_schemas.states import Cause, TaskState
from tests.agent.cli.program import Cli, Ended, ended, process
from tests.agent.cli.scripted_agent import LiveAgent, ScriptedOperations


@pytest.fixture
def written(agent: LiveAgent) -> LiveAgent:
    """A task that runs and has written to both streams."""
    agent.do(lambda operations: operations.add("task-1"))
    agent.do(lambda operations: operations.write("task-1", b"hello\nworld"))
    agent.do(lambda operations: operations.write("task-1", b"oops\n", "stderr"))
    return agent


def environ_of(agent: LiveAgent) -> dict[str, str]:
    """Where a real process finds it."""
    return {"REMOTEGPU_AGENT_SOCKET": str(agent.socket)}


# --- logs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "hello\nworld"),
        (["--stderr"], "oops\n"),
        (["--since-offset", "6"], "world"),
        (["--since-offset", "-3"], "rld"),
        (["--since-offset=-100"], "hello\nworld"),
        (["--since-offset", "999"], ""),
        (["--attempt", "1"], "hello\nworld"),
        (["--run", "1"], "hello\nworld"),
    ],
)
def test_logs(written: LiveAgent, local: Cli, options: list[str], text: str) -> None:
    """The output of a run, from an offset on, byte for byte and nothing else."""
    assert local("logs", *options, "task") == Ended(0, text, "")


def test_logs_json(written: LiveAgent, local: Cli) -> None:
    """With --json the text and its offsets are one document."""
    document = local("logs", "--json", "--since-offset", 6, "task-1").json()
    assert document == {
        "stream": "stdout", "run_no": 1, "offset": 6, "next_offset": 11, "text": "world", "is_end": False,
    }  # fmt: skip


def test_logs_of_several_pieces(written: LiveAgent, local: Cli) -> None:
    """Output above what one answer holds comes whole."""
    written.do(lambda operations: operations.write("task-1", b"x" * (3 << 20)))
    assert len(local("logs", "task-1").out) == (3 << 20) + 11
    assert len(local("logs", "--json", "task-1").json()["text"]) == (3 << 20) + 11


def test_logs_follow_json(written: LiveAgent, local: Cli) -> None:
    """A stream without end is no document."""
    found = local("logs", "-f", "--json", "task-1")
    assert (found.code, found.out) == (2, "")


def test_follow(written: LiveAgent) -> None:
    """`logs -f` shows what is there, what comes, and ends with the run."""
    with process("logs", "-f", "task", environ=environ_of(written)) as child:
        assert child.stdout is not None
        assert child.stdout.read(11) == "hello\nworld"
        written.do(lambda operations: operations.write("task-1", b"!\n"))
        assert child.stdout.read(2) == "!\n"
        written.do(lambda operations: operations.end("task-1"))
        assert ended(child) == Ended(0, "", "")


def test_follow_from_an_offset(written: LiveAgent) -> None:
    """`-f`, `--stderr` and `--since-offset` go together."""
    written.do(lambda operations: operations.end("task-1"))
    with process("logs", "-f", "--stderr", "--since-offset", "-2", "task-1", environ=environ_of(written)) as child:
        assert ended(child) == Ended(0, "s\n", "")


def test_follow_before_the_run(agent: LiveAgent) -> None:
    """Of a task that still waits the output is followed as soon as it runs."""
    agent.do(lambda operations: operations.add("task-1", TaskState.PENDING, runs=0))
    with process("logs", "-f", "task-1", environ=environ_of(agent)) as child:
        agent.wait_called("show_task", 2)

        def go(operations: ScriptedOperations) -> None:
            operations.start_run("task-1")
            operations.write("task-1", b"first\n")
            operations.end("task-1")

        agent.do(go)
        assert ended(child) == Ended(0, "first\n", "")


def test_follow_over_restarts(written: LiveAgent) -> None:
    """An agent that goes and comes back costs a message each time, and no byte twice or never."""
    with process("logs", "-f", "task-1", environ=environ_of(written)) as child:
        assert child.stdout is not None
        assert child.stdout.read(11) == "hello\nworld"
        for number in (2, 3):
            written.stop()
            written.do(lambda operations: operations.write("task-1", b"+more\n"))
            written.start()
            written.wait_called("follow_log", number)
            assert child.stdout.read(6) == "+more\n"
        written.do(lambda operations: operations.end("task-1"))
        found = ended(child)
    assert (found.code, found.out) == (0, "")
    assert found.err.count("Trying again for 120 s; the task goes on meanwhile.") == 2


def test_submit_follow_over_a_restart(agent: LiveAgent) -> None:
    """Both streams of a task are followed on, and the absence is told once."""
    with process("submit", "--follow", "--", "train", environ=environ_of(agent)) as child:
        agent.wait_called("show_task")
        (task_id,) = agent.operations.details
        agent.do(lambda operations: operations.start_run(task_id))
        agent.wait_called("follow_log", 2)
        agent.stop()

        def go(operations: ScriptedOperations) -> None:
            operations.write(task_id, b"out\n")
            operations.write(task_id, b"err\n", "stderr")
            operations.end(task_id, TaskState.FAILED, cause=Cause.EXIT_CODE, exit_code=3)

        agent.do(go)
        agent.start()
        found = ended(child)
    assert (found.code, found.out) == (3, "out\n")
    assert "err\n" in found.err
    assert found.err.count("Trying again") == 1


# --- wait ----------------------------------------------------------------------------------------------------------


def test_wait(agent: LiveAgent, local: Cli) -> None:
    """`wait` ends with the highest exit code, and tells how each task ended."""
    agent.do(lambda operations: operations.add("a1"))
    agent.do(lambda operations: operations.add("b2"))
    agent.do(lambda operations: operations.end("a1"))
    agent.do(lambda operations: operations.end("b2", TaskState.FAILED, cause=Cause.EXIT_CODE, exit_code=9))
    assert local("wait", "a", "b2") == Ended(9, "", "task a1 completed\ntask b2 failed: exit_code, exit code 9\n")
    document = local("wait", "--json", "a1", "b").json()
    assert (document["exit_code"], [task["id"] for task in document["tasks"]]) == (9, ["a1", "b2"])


def test_wait_tells_at_once_what_is_not_there(agent: LiveAgent, local: Cli) -> None:
    """An id that fits nothing is told before anybody waits for the task in front of it."""
    agent.do(lambda operations: operations.add("a1"))
    assert local("wait", "a1", "zz").code == 125


def test_prefix_keeps_its_meaning(agent: LiveAgent) -> None:
    """A prefix means the task that it fitted at the start, whatever comes later."""
    agent.do(lambda operations: operations.add("a1"))
    with process("wait", "a", environ=environ_of(agent)) as child:
        agent.wait_called("show_task", wait_s=60.0)
        agent.do(lambda operations: operations.add("a2"))
        agent.stop()
        agent.start()
        agent.wait_called("show_task", 2, wait_s=60.0)
        agent.do(lambda operations: operations.end("a1"))
        assert ended(child).code == 0


def test_wait_over_a_restart(agent: LiveAgent) -> None:
    """An agent that is restarted does not end the waiting; what ended meanwhile is told by the next one."""
    agent.do(lambda operations: operations.add("a1"))
    with process("wait", "a1", environ=environ_of(agent)) as child:
        agent.wait_called("show_task", wait_s=60.0)
        agent.stop()
        agent.do(lambda operations: operations.end("a1", TaskState.FAILED, cause=Cause.EXIT_CODE, exit_code=6))
        assert child.stderr is not None
        assert "Trying again for 120 s; the task goes on meanwhile." in child.stderr.readline()
        agent.start()
        found = ended(child)
    assert (found.code, found.out, found.err) == (6, "", "task a1 failed: exit_code, exit code 6\n")


# --- patience ------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """Now."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Later."""
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time of `following`."""
    clock = Clock()
    monkeypatch.setattr(following, "time", clock)
    return clock


def absences(patience: Patience, clock: Clock) -> float:
    """How long the patience lasts from now on."""
    began = clock.now
    with contextlib.suppress(Unreachable):
        while True:
            with patience.for_absence():
                raise Unreachable("away")
    return clock.now - began


def test_patience_ends(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """An agent that stays away is given up after two minutes, and announced once."""
    assert 120.0 <= absences(Patience(), clock) <= 121.0
    assert capsys.readouterr().err.count("\n") == 1


def test_patience_begins_anew(clock: Clock) -> None:
    """A stream that ran for hours between two absences has its whole patience again."""
    patience = Patience()
    with patience.for_absence():
        raise Unreachable("away")
    with patience.for_absence():
        patience.is_back()  # as a stream that opens
        clock.sleep(7200.0)
        raise Unreachable("away again")
    assert absences(patience, clock) >= 119.0
