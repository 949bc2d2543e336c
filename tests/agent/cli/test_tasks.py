"""`list`, `show`, `cancel` and `status`: what people and programs read."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess

import pytest

from remotegpu_agent.cli import output
from remotegpu_schemas.api import ControlPlaneStatus, QueueStatus
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.states import Cause, TaskState
from tests.agent.cli.program import PROGRAM, Cli, environment
from tests.agent.cli.scripted_agent import DEADLINE_S, LiveAgent


@pytest.fixture
def tasks(agent: LiveAgent) -> LiveAgent:
    """Three tasks: one runs, one waits, one failed."""
    agent.do(lambda ops: ops.add("aa11", name="train", progress_percent=12.5, progress_message="epoch 3"))
    agent.do(lambda ops: ops.add("aa22", TaskState.PENDING, runs=0, name="eval", reason="waits for 2 GPUs"))
    agent.do(lambda ops: ops.add("bb33", name="prep"))
    agent.do(lambda ops: ops.write("bb33", b"".join(b"line %d\n" % number for number in range(30)), "stderr"))
    agent.do(lambda ops: ops.end("bb33", TaskState.FAILED, cause=Cause.EXIT_CODE, exit_code=3, error="boom"))
    return agent


def test_list(tasks: LiveAgent, local: Cli) -> None:
    """A table, aligned and plain where no terminal is: why a task waits, how far it is, how it ended."""
    found = local("list")
    assert (found.code, found.err) == (0, "")
    head, *rows = found.out.splitlines()
    assert head.split() == ["ID", "NAME", "STATE", "PRIO", "AGE", "RAN", "WHAT"]
    assert [row.split()[:3] for row in rows] == [
        ["aa11", "train", "running"],
        ["aa22", "eval", "pending"],
        ["bb33", "prep", "failed"],
    ]
    assert rows[0].endswith("12.5 % epoch 3")
    assert rows[1].endswith("waits for 2 GPUs")
    assert rows[2].endswith("exit_code, exit 3, boom")


def test_list_filters(tasks: LiveAgent, local: Cli) -> None:
    """States, labels, limit and offset reach the agent."""
    found = local("list", "--state", "Running", "--state=pending", "--label", "a=b=c", "--limit", 1, "--offset", 1)
    tasks.wait_called(
        "list_tasks",
        states=[TaskState.RUNNING, TaskState.PENDING],
        labels={"a": "b=c"},
        limit=1,
        offset=1,
    )
    assert found.out.splitlines()[1].startswith("aa22")


def test_list_tells_of_more(tasks: LiveAgent, local: Cli) -> None:
    """That there are more is said on standard error."""
    assert local("list", "--limit", 2).err == "2 of 3; --limit and --offset show more\n"


def test_list_json(tasks: LiveAgent, local: Cli) -> None:
    """With --json the page is one document, and nothing else is on standard output."""
    page = local("--json", "list", "--limit", 2).json()
    assert [task["id"] for task in page["tasks"]] == ["aa11", "aa22"]
    assert page["total"] == 3


def test_empty_list(local: Cli) -> None:
    """No tasks are a heading."""
    assert local("list").out.split() == ["ID", "NAME", "STATE", "PRIO", "AGE", "RAN", "WHAT"]


def test_show(tasks: LiveAgent, local: Cli) -> None:
    """A task that failed is shown with its runs and the last 20 lines of standard error; a prefix is enough."""
    found = local("show", "b")
    assert (found.code, found.err) == (0, "")
    lines = found.out.splitlines()
    assert lines[0].split() == ["id", "bb33"]
    assert "cause      exit_code" in lines
    at = lines.index("last lines of standard error:")
    assert lines[at + 1 :] == [f"  line {number}" for number in range(10, 30)]


def test_show_tells_what_a_run_used(tasks: LiveAgent, local: Cli) -> None:
    """The last run that has been measured says what it used; what it used none of is left out, and so is the line."""
    usage = {"wall_s": 9.0, "cpu_s": 2.5, "memory_peak_mb": 96.0, "io_read_mb": 0.0, "io_write_mb": 12.3}
    tasks.do(lambda ops: ops.end_run("aa11", usage=usage))
    tasks.do(lambda ops: ops.start_run("aa11"))
    used = [line for line in local("show", "aa11").out.splitlines() if line.startswith("used")]
    assert used == ["used       2.5 s of CPU, 96 MiB of memory, 12.3 MiB written"]
    assert "used" not in {line.split()[0] for line in local("show", "bb33").out.splitlines() if line}


def test_show_writes_large_use_out(tasks: LiveAgent, local: Cli) -> None:
    """A day on many CPUs with more than a TiB of memory is in figures, not in powers of ten."""
    usage = {"cpu_s": 5529600.125, "memory_peak_mb": 1536000.0, "io_write_mb": 2097152.5}
    tasks.do(lambda ops: ops.end_run("aa11", usage=usage))
    [used] = [line for line in local("show", "aa11").out.splitlines() if line.startswith("used")]
    assert used == "used       5529600.125 s of CPU, 1536000 MiB of memory, 2097152.5 MiB written"


def test_show_json(tasks: LiveAgent, local: Cli) -> None:
    """The document has the task as the API tells it, and the lines."""
    found = local("show", "bb33", "--json").json()
    assert (found["id"], found["exit_code"], len(found["runs"]), len(found["stderr_tail"])) == ("bb33", 3, 1, 20)


def test_show_running(tasks: LiveAgent, local: Cli) -> None:
    """Of a task that runs no output is asked for."""
    assert "last lines" not in local("show", "aa11").out
    assert local("show", "aa22", "--json").json()["stderr_tail"] == []


@pytest.mark.parametrize(
    ("verb", "code", "message"),
    [
        ("show zz", 4, "there is no task zz (code 30004)"),
        ("logs zz", 4, "there is no task zz (code 30004)"),
        ("logs -f zz", 4, "there is no task zz (code 30004)"),
        ("cancel zz", 4, "zz: there is no task zz (code 30004)"),
        ("wait zz", 125, "there is no task zz (code 30004)"),
        ("show a", 5, "a fits several tasks (code 30005)"),
        ("cancel a", 5, "a: a fits several tasks (code 30005)"),
        ("wait a", 125, "a fits several tasks (code 30005)"),
        ("cancel bb33", 5, "bb33: task already finished (code 30002)"),
        ("logs aa22", 5, "task aa22 has no run"),
        ("logs --run 7 aa11", 5, "task aa11 has no run 7"),
        ("logs -f --run 7 aa11", 5, "task aa11 has no run 7"),
    ],
)
def test_refusals(tasks: LiveAgent, local: Cli, verb: str, code: int, message: str) -> None:
    """What is not there ends with 4, another refusal with 5 and its business code; `wait` keeps to 125."""
    found = local(*verb.split())
    assert (found.code, found.out) == (code, "")
    assert message in found.err
    assert len(found.err.splitlines()) == 1


@pytest.mark.parametrize("code", [Code.DRAINING, Code.INTERNAL, Code.RATE_LIMITED])
def test_other_refusals(tasks: LiveAgent, local: Cli, code: Code) -> None:
    """Every business code is told."""
    tasks.operations.refuse["queue_status"] = Refused(code, "no")
    found = local("status")
    assert (found.code, found.err) == (5, f"remotegpu-agent: no (code {code.value})\n")


def test_suspend_and_resume(tasks: LiveAgent, local: Cli) -> None:
    """Each says what became of each task, `list` shows it, and what is in the wrong state is named."""
    found = local("suspend", "aa1", "bb33")
    assert (found.code, found.out) == (5, "task aa11 suspended\n")
    assert found.err == "remotegpu-agent: bb33: task bb33 is failed (code 30020)\n"
    assert "suspended" in local("list", "--state", "suspended").out
    found = local("resume", "aa1", "--json")
    assert (found.code, found.json()["tasks"][0]["state"]) == (0, "running")
    assert local("resume", "aa1").code == 5


def test_cancel(tasks: LiveAgent, local: Cli) -> None:
    """Cancelling says what became of each task."""
    found = local("cancel", "aa1", "aa2")
    assert (found.code, found.out, found.err) == (0, "task aa11 cancelled\ntask aa22 cancelled\n", "")


def test_cancel_goes_on(tasks: LiveAgent, local: Cli) -> None:
    """One task that cannot be cancelled does not save the others."""
    found = local("cancel", "bb33", "zz", "aa11", "--json")
    assert found.code == 5
    assert [task["id"] for task in found.json()["tasks"]] == ["aa11"]
    assert len(found.err.splitlines()) == 2


def test_status(agent: LiveAgent, local: Cli) -> None:
    """The state of the agent at a glance."""
    found = local("status")
    assert (found.code, found.err) == (0, "")
    assert dict(line.split(maxsplit=1) for line in found.out.splitlines() if line.startswith(("state", "tasks"))) == {
        "state": "ready",
        "tasks": "1 running",
    }
    assert "none (stand-alone)" in found.out
    assert local("status", "--json").json()["state"] == "ready"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.9, "59s"), (60, "1m00s"), (3725, "1h02m"), (90000, "1d01h")]
)
def test_span(seconds: float, text: str) -> None:
    """A span of time has its two largest units."""
    assert output.span(seconds) == text


@pytest.mark.parametrize("moment", [None, "", "yesterday"])
def test_no_time(moment: str | None) -> None:
    """What is no time is shown as nothing."""
    assert (output.age(moment), output.local_time(moment)) == ("", "")


def test_times() -> None:
    """Ages and spans are between two moments; a clock that was set back makes none negative."""
    assert output.age("2026-02-05T12:00:00Z", "2026-02-05T12:03:05Z") == "3m05s"
    assert output.age("2026-02-05T12:00:00Z", "2026-02-05T11:00:00Z") == "0s"


# --- on a terminal -------------------------------------------------------------------------------------------------


def on_a_terminal(agent: LiveAgent, *arguments: str, **environ: str) -> str:
    """What the program draws on a terminal of 100 columns."""
    screen, terminal = pty.openpty()
    whole = environment(REMOTEGPU_AGENT_SOCKET=str(agent.socket), COLUMNS="100", **environ)
    with subprocess.Popen([*PROGRAM, *arguments], stdin=terminal, stdout=terminal, env=whole) as child:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the program has gone (pty(7))
            while piece := os.read(screen, 65536):
                shown += piece
        os.close(screen)
        assert child.wait(DEADLINE_S) == 0
    return shown.decode()


@pytest.mark.parametrize("verb", ["list", "status"])
def test_colours_on_a_terminal(tasks: LiveAgent, verb: str) -> None:
    """A terminal gets colours, unless --no-color, NO_COLOR or TERM=dumb says otherwise."""
    assert "\x1b[3" in on_a_terminal(tasks, verb)
    assert "\x1b" not in on_a_terminal(tasks, "--no-color", verb)
    assert "\x1b" not in on_a_terminal(tasks, verb, NO_COLOR="1")
    assert "\x1b" not in on_a_terminal(tasks, verb, TERM="dumb")


def test_status_with_a_plane(tasks: LiveAgent, local: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the control plane and with reports stands in `status`."""
    operations = tasks.operations
    ordinary = operations.queue_status

    async def degraded() -> QueueStatus:
        plane = ControlPlaneStatus(
            url="http://plane",
            is_connected=False,
            is_registered=False,
            last_contact_at="2026-02-05T12:00:00Z",
            error="connection refused",
        )
        changes = {"state": "degraded", "reasons": ["disk is full"], "dead_letters": 2, "control_plane": plane}
        return (await ordinary()).model_copy(update=changes)

    monkeypatch.setattr(operations, "queue_status", degraded)
    shown = local("status").out
    assert shown.startswith("state          degraded\n               - disk is full\n")
    assert "problem: not connected, last contact " in shown
    assert "connection refused" in shown
    assert "problem: 2 refused for good (dead letters)" in shown
