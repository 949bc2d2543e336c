"""`submit`: files, standard input and commands; what is sent, and how it ends."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from remotegpu_agent.cli.following import describe_end, exit_code_of, worst
from remotegpu_agent.task_user import Submitter
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.states import Cause, TaskState
from remotegpu_schemas.task import Task
from tests.agent.cli.program import Cli, Ended, ended, process, process_of_bytes, run
from tests.agent.cli.scripted_agent import LiveAgent, ScriptedOperations
from tests.agent.cli.test_app import Garbage

GOOD = "task: {id: t1, command: train}\n"


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A task file."""
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def only(agent: LiveAgent) -> Task:
    """The one task that was submitted."""
    (task,) = agent.operations.submitted
    return task


def real(agent: LiveAgent, *arguments: object, **options: object) -> Ended:
    """The program as a process that finds this agent."""
    return run(*arguments, environ={"REMOTEGPU_AGENT_SOCKET": str(agent.socket)}, **options)


# --- what is sent --------------------------------------------------------------------------------------------------


def test_files(agent: LiveAgent, local: Cli, tmp_path: Path, good: Path) -> None:
    """The tasks of all files are submitted, in order; standard output has their ids, a line each."""
    (tmp_path / "two.yaml").write_text("task: {id: t2, command: a}\n---\ntask: {id: t3, command: b}\n")
    found = local("submit", good, tmp_path / "two.yaml")
    assert (found.code, found.out, found.err) == (0, "t1\nt2\nt3\n", "")
    assert [task.id for task in agent.operations.submitted] == ["t1", "t2", "t3"]


def test_files_json(local: Cli, good: Path) -> None:
    """With --json the ids are one document."""
    assert local("submit", "--json", good).json() == {"task_ids": ["t1"]}


def test_options_between_files(agent: LiveAgent, local: Cli, tmp_path: Path, good: Path) -> None:
    """Options may stand between and behind the files."""
    (tmp_path / "two.yaml").write_text("task: {id: t2, command: a}\n")
    assert local("submit", good, "--priority", 1, tmp_path / "two.yaml", "--json").json()["task_ids"] == ["t1", "t2"]
    assert [task.priority for task in agent.operations.submitted] == [1, 1]


def test_standard_input(agent: LiveAgent) -> None:
    """`-` is standard input, YAML or JSON."""
    assert real(agent, "submit", "-", input=GOOD).out == "t1\n"
    assert real(agent, "submit", "-", "--priority", 2, input='{"task": {"id": "t9", "command": "x"}}').out == "t9\n"
    assert [task.priority for task in agent.operations.submitted] == [5, 2]


def test_empty_standard_input(agent: LiveAgent) -> None:
    """Nothing on standard input is an invalid file."""
    found = real(agent, "submit", "-", input="")
    assert found.code == 2
    assert "standard input: has no document" in found.err


def test_command(agent: LiveAgent, local: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command behind `--` is one task, with its arguments as they are and its options as they say."""
    monkeypatch.chdir(tmp_path)
    found = local(
        "submit", "--gpus", 2, "--name", "n 1", "--env", "A=b=c", "--env", "E=", "--timeout", "1.5h", "--workdir", ".",
        "--priority", 3, "--", "python", "-m", "x", "--json", "--wait", "--", "a b", "",
    )  # fmt: skip
    task = only(agent)
    assert (found.code, found.out, found.err) == (0, f"{task.id}\n", "")
    assert (task.command, list(task.args or ())) == ("python", ["-m", "x", "--json", "--wait", "--", "a b", ""])
    assert (task.name, task.priority, task.resources.gpus, task.timeout_s) == ("n 1", 3, 2, 5400.0)
    assert (dict(task.env), task.workdir) == ({"A": "b=c", "E": ""}, str(tmp_path))


def test_where_it_was_submitted_goes_along(
    agent: LiveAgent, local: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: Path
) -> None:
    """The caller's directory is sent with each file and command; one that is gone is left out."""
    here = tmp_path / "größe &c"
    here.mkdir()
    monkeypatch.chdir(here)
    assert local("submit", good).code == 0
    assert local("submit", "--", "true").code == 0
    here.rmdir()
    assert local("submit", "--", "true").code == 0
    uid = os.geteuid()
    assert agent.operations.submitters == [Submitter(uid, here), Submitter(uid, here), Submitter(uid, None)]


def test_text_is_not_interpreted(agent: LiveAgent, local: Cli) -> None:
    """What looks like a number or like YAML in a command stays what was typed."""
    local("submit", "--name", "007", "--env", "V=1.10", "--", "echo", "1.0", "null", "{a: b}", "größe", "\n\t")
    task = only(agent)
    assert (task.name, dict(task.env), list(task.args or ())) == (
        "007",
        {"V": "1.10"},
        ["1.0", "null", "{a: b}", "größe", "\n\t"],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit"], "nothing to submit: name task files (- is standard input), or write a command behind --"),
        (["submit", "--"], "there is no command behind --"),
        (["submit", "x.yaml", "--", "a"], "give task files, or a command behind --, not both"),
        (["submit", "--gpus", "1", "--env", "A=b", "x.yaml"], "--gpus, --env: for a command behind -- only"),
        (["submit", "--env", "A", "--", "a"], "--env: 'A' is not NAME=VALUE"),
        (["submit", "--env", "=x", "--", "a"], "--env: '=x' is not NAME=VALUE"),
        (["submit", "--gpus", "-1", "--", "a"], "--gpus: must be a whole number from 0 to 64, not '-1'"),
        (["submit", "--", "a\udcff"], "the command has bytes that are not UTF-8"),
        (["submit", "none.yaml"], "none.yaml: there is no such file"),
        (["submit", "ls"], "ls: there is no such file; to run the command, write: remotegpu-agent submit -- ls"),
        (["submit", "/"], "/: is a directory; name the files in it"),
        (["submit", "/proc/self/mem"], "/proc/self/mem: cannot be read: "),
        (["submit", "--follow", "--json", "--", "a"], "--json is one document, and --follow shows the"),
    ],
)  # fmt: skip
def test_wrong_usage(agent: LiveAgent, local: Cli, arguments: list[str], message: str) -> None:
    """What cannot be submitted is told in one line, before anything is sent."""
    found = local(*arguments)
    assert (found.code, found.out) == (125 if "--follow" in arguments else 2, "")
    assert message in found.err
    assert len(found.err.splitlines()) == 1
    assert agent.operations.submitted == []


@pytest.mark.parametrize("option", [["--timeout", "soon"], ["--timeout", "-5"]])
def test_wrong_values_of_a_command(agent: LiveAgent, local: Cli, option: list[str]) -> None:
    """Values that no task can have are refused without a line and column that nobody typed."""
    found = local("submit", *option, "--", "a")
    assert (found.code, found.out) == (2, "")
    assert "body:" not in found.err
    assert agent.operations.submitted == []


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b"task: {comand: x}", "bad.yaml:1:8: unknown key 'comand'"),
        (b"a: [1\n", "bad.yaml:1:4: this bracket is never closed"),
        (b"\x7fELF\x00\xff", "bad.yaml:1:"),
        (b"", "bad.yaml: has no document"),
        (b"x" * (1 << 21), "bad.yaml: is larger than 1048576 bytes"),
    ],
)
def test_invalid_files(
    agent: LiveAgent,
    local: Cli,
    tmp_path: Path,
    good: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    place: str,
) -> None:
    """A file with mistakes ends with 2 and its report, and no file is submitted."""
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_bytes(content)
    found = local("submit", good, "bad.yaml")
    assert (found.code, found.out) == (2, "")
    assert place in found.err
    assert found.err.endswith("nothing was submitted.\n")
    assert agent.operations.submitted == []
    assert local("submit", "--wait", "bad.yaml").code == 125


def test_dry_run(agent: LiveAgent, local: Cli, good: Path) -> None:
    """--dry-run shows what would be submitted, and submits nothing; it needs no agent."""
    found = local("submit", "--dry-run", "--priority", 2, good)
    assert json.loads(found.out) == {"id": "t1", "command": "train", "priority": 2}
    assert found.err == "1 task would be submitted; this was a dry run.\n"
    agent.stop()
    tasks = local("submit", "--dry-run", "--json", "--gpus", 1, "--", "a").json()["tasks"]
    assert (tasks[0]["command"], tasks[0]["resources"], tasks[0]["id"]) == ("a", {"gpus": 1}, None)
    assert agent.operations.submitted == []


def test_refused(agent: LiveAgent, local: Cli, good: Path) -> None:
    """A refusal ends with 5 and its code; with --wait with 125."""
    agent.operations.refuse["submit"] = Refused(Code.QUEUE_FULL)
    found = local("submit", good)
    assert (found.code, found.out, found.err) == (5, "", "remotegpu-agent: the queue is full (code 30013)\n")
    assert local("submit", "--wait", good).code == 125


def test_refused_after_the_first(agent: LiveAgent, local: Cli, good: Path, tmp_path: Path) -> None:
    """What was submitted before a refusal is not lost from sight, with --json neither."""
    (tmp_path / "other.yaml").write_text("task: {id: t2, command: a, machine_id: elsewhere}\n")
    found = local("submit", "--json", good, tmp_path / "other.yaml")
    assert (found.code, found.out) == (5, "")
    assert "submitted before that: t1\n" in found.err
    assert f"{tmp_path}/other.yaml:1: the task is for elsewhere" in found.err


def test_not_running(agent: LiveAgent, local: Cli, good: Path) -> None:
    """Without an agent the code is 3, with --wait 125."""
    agent.stop()
    assert local("submit", good).code == 3
    assert local("submit", "--wait", good).code == 125


def test_broken_while_submitting(cli: Cli, good: Path) -> None:
    """A connection that breaks after the task was sent leaves open whether it arrived, and says so."""
    with Garbage(b"") as server:
        found = cli("submit", "--url", server.url, good)
    assert (found.code, found.out) == (3, "")
    assert "look with remotegpu-agent list before you repeat it" in found.err


# --- how it ends ---------------------------------------------------------------------------------------------------


def end_when_waited_for(agent: LiveAgent, *arguments: object, state: TaskState, **changes: object) -> Ended:
    """Submit as a process, and end the task once somebody waits for it."""
    with process(*arguments, environ={"REMOTEGPU_AGENT_SOCKET": str(agent.socket)}) as child:
        agent.wait_called("show_task", wait_s=60.0)
        agent.do(lambda operations: operations.start_run("t1"))
        agent.do(lambda operations: operations.end("t1", state, **changes))
        return ended(child)


@pytest.mark.parametrize(
    ("state", "changes", "code"),
    [
        (TaskState.COMPLETED, {"cause": Cause.SUCCEEDED, "exit_code": 0}, 0),
        (TaskState.FAILED, {"cause": Cause.EXIT_CODE, "exit_code": 7}, 7),
        (TaskState.FAILED, {"cause": Cause.SIGNAL, "signal": 9}, 137),
    ],
)
def test_wait(agent: LiveAgent, good: Path, state: TaskState, changes: dict[str, object], code: int) -> None:
    """--wait ends as the task did: with its exit code, or 128 and its signal."""
    found = end_when_waited_for(agent, "submit", "--wait", good, state=state, **changes)
    assert (found.code, found.out) == (code, "t1\n")
    assert found.err.startswith(f"task t1 {state.value}")


def test_wait_json(agent: LiveAgent, good: Path) -> None:
    """With --json the tasks as they ended, and the exit code, are one document."""
    found = end_when_waited_for(
        agent, "submit", "--wait", "--json", good, state=TaskState.FAILED, cause=Cause.TIMED_OUT
    )
    document = found.json()
    assert found.code == document["exit_code"] == 124
    assert (document["task_ids"], document["tasks"][0]["state"]) == (["t1"], "failed")


def test_interrupted_wait(agent: LiveAgent, good: Path) -> None:
    """Ctrl-C ends the waiting and not the task, and says how to wait on."""
    with process("submit", "--wait", good, environ={"REMOTEGPU_AGENT_SOCKET": str(agent.socket)}) as child:
        agent.wait_called("show_task", wait_s=60.0)
        child.send_signal(signal.SIGINT)
        found = ended(child)
    assert (found.code, found.out) == (130, "t1\n")
    assert found.err == "interrupted; the task goes on: remotegpu-agent wait t1\n"
    assert "cancel_task" not in [name for name, _ in agent.operations.calls]


@pytest.mark.parametrize(
    ("detail", "code"),
    [
        ({"state": "completed", "exit_code": 0}, 0),
        ({"state": "failed", "cause": "exit_code", "exit_code": 255}, 255),
        ({"state": "failed", "cause": "timed_out", "exit_code": 143}, 124),
        ({"state": "failed", "cause": "signal", "runs": [{"signal": 15}, {"signal": 11}]}, 139),
        ({"state": "failed", "cause": "launch_failed", "exit_code": None}, 125),
        ({"state": "failed", "cause": "lease_lost", "runs": [{"signal": 9}]}, 125),
        ({"state": "cancelled", "cause": "cancelled", "exit_code": None, "runs": []}, 125),
        ({"state": "failed"}, 125),
        ({"state": "failed", "exit_code": 1000, "runs": "x"}, 125),
    ],
)
def test_exit_code(detail: dict[str, object], code: int) -> None:
    """The exit code is the task's own, 128 + n for a signal, 124 for a timeout, and 125 for what is not its doing."""
    assert exit_code_of(detail) == code


def test_worst_and_words() -> None:
    """Of several exit codes the highest counts; an end is one line."""
    assert (worst([0, 3, 1]), worst([])) == (3, 0)
    detail = {"id": "t1", "state": "failed", "cause": "exit_code", "exit_code": 3, "error": "boom"}
    assert describe_end(detail) == "task t1 failed: exit_code, exit code 3 (boom)"


# --- following -----------------------------------------------------------------------------------------------------


def test_follow(agent: LiveAgent, good: Path) -> None:
    """--follow shows both streams as they come, as they are, and ends as the task does."""
    environ = {"REMOTEGPU_AGENT_SOCKET": str(agent.socket)}
    with process_of_bytes("submit", "--follow", good, environ=environ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        agent.wait_called("show_task")
        agent.do(lambda operations: operations.start_run("t1"))
        for number in range(3):
            out, err = b"out %d\r" % number, b"err %d\n" % number
            agent.do(partial(ScriptedOperations.write, task_id="t1", data=out))
            assert child.stdout.read(6) == out
            agent.do(partial(ScriptedOperations.write, task_id="t1", data=err, stream="stderr"))
            line = child.stderr.readline()
            while line.startswith(b"task t1"):
                line = child.stderr.readline()
            assert line == err
        agent.do(lambda operations: operations.write("t1", "größe \x1b[31m no newline".encode()))
        agent.do(lambda operations: operations.end("t1", TaskState.FAILED, cause=Cause.EXIT_CODE, exit_code=4))
        assert child.stdout.read() == "größe \x1b[31m no newline".encode()
        assert child.stderr.read() == b"task t1 failed: exit_code, exit code 4\n"
        assert child.wait(10) == 4


def test_follow_over_runs(agent: LiveAgent, good: Path) -> None:
    """The output of a retry follows that of the first run."""
    with process("submit", "--follow", good, environ={"REMOTEGPU_AGENT_SOCKET": str(agent.socket)}) as child:
        agent.wait_called("show_task")

        def first(operations: ScriptedOperations) -> None:
            operations.start_run("t1")
            operations.write("t1", b"one\n")
            operations.end_run("t1", exit_code=1)

        def second(operations: ScriptedOperations) -> None:
            operations.start_run("t1")
            operations.write("t1", b"two\n", run_no=2)
            operations.end("t1", exit_code=0)

        agent.do(first)
        agent.wait_called("follow_log", 2)
        agent.do(second)
        found = ended(child)
    assert (found.code, found.out) == (0, "one\ntwo\n")


def test_follow_several(agent: LiveAgent, local: Cli, tmp_path: Path) -> None:
    """Several tasks at once cannot be followed, and nothing is submitted to find that out."""
    (tmp_path / "two.yaml").write_text("task: {id: t2, command: a}\n---\ntask: {id: t3, command: b}\n")
    found = local("submit", "--follow", tmp_path / "two.yaml")
    assert found.code == 125
    assert "--follow is for one task" in found.err
    assert agent.operations.submitted == []


def test_follow_into_a_closed_pipe(agent: LiveAgent, good: Path) -> None:
    """A reader that leaves ends --follow with 125 and quietly; the task goes on."""
    with process("submit", "--follow", good, environ={"REMOTEGPU_AGENT_SOCKET": str(agent.socket)}) as child:
        assert child.stdout is not None
        child.stdout.close()
        agent.wait_called("show_task")
        agent.do(lambda operations: operations.start_run("t1"))
        agent.do(lambda operations: operations.write("t1", b"x\n"))
        assert child.wait(20) == 125
        assert child.stderr is not None
        assert child.stderr.read() == "task t1\n"
