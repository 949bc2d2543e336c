"""`drain`, `undrain` and `dead-letters` against a running API."""

from __future__ import annotations

import json

import pytest

from tests.agent.cli.program import Cli
from tests.agent.cli.scripted_agent import LiveAgent


@pytest.fixture
def local(cli: Cli, agent: LiveAgent, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """The program beside its agent."""
    monkeypatch.setenv("REMOTEGPU_AGENT_SOCKET", str(agent.socket))
    return cli


def test_drain_says_what_still_runs(local: Cli, agent: LiveAgent) -> None:
    """The order is given with its reason; the exit code says that it was taken."""
    ended = local("drain", "--reason", "new driver")
    assert (ended.code, ended.out) == (0, "draining: 1 run, 0 claimed ones wait\n")
    assert "new driver" in ended.err
    assert agent.operations.calls[-1][1]["reason"] == "new driver"


def test_drain_that_is_waited_for_in_vain(local: Cli) -> None:
    """A host that is not empty in time: exit code 1, and what is left."""
    ended = local("drain", "--wait", "--timeout", "0.05s")
    assert (ended.code, ended.out) == (1, "draining: 1 run, 0 claimed ones wait\n")


def test_undrain(local: Cli) -> None:
    """It says what holds now."""
    assert local("undrain").out == "takes on tasks\n"
    assert local("undrain", "--json").json()["is_draining"] is False


@pytest.mark.parametrize("words", [("--timeout", "5s"), ("--wait", "--timeout", "soon"), ("--wait", "--timeout", "-3")])
def test_drain_with_words_that_make_no_sense(local: Cli, words: tuple[str, ...]) -> None:
    """Exit code 2, and no order is given."""
    ended = local("drain", *words)
    assert (ended.code, ended.out) == (2, "")
    assert "--timeout" in ended.err


def test_dead_letters_listed_and_shown(local: Cli) -> None:
    """The list has the plane's answer; one is shown whole, as JSON."""
    lines = local("dead-letters", "list").out.splitlines()
    assert lines[0].split() == ["NUMBER", "KIND", "TASK", "AGE", "TRIES", "ANSWER"]
    assert lines[1].split()[:3] == ["17", "complete", "task-1"]
    assert lines[1].endswith("30005: exit_code is missing")
    assert json.loads(local("dead-letters", "show", "17").out)["body"] == {"exit_code": 0}


def test_dead_letters_sent_again_and_dropped(local: Cli) -> None:
    """Each is answered for; one that is not there is named, and the others are done all the same."""
    ended = local("dead-letters", "resend", "18", "17")
    assert (ended.code, ended.out) == (4, "dead letter 17 (complete of task task-1) is sent again\n")
    assert "18: no such dead letter" in ended.err
    assert local("dead-letters", "drop", "17").out == "dead letter 17 (complete of task task-1) is dropped\n"
    assert [each["id"] for each in local("dead-letters", "drop", "17", "--json").json()["dead_letters"]] == [17]


@pytest.mark.parametrize("number", ["x", "1.5", "../1", "²"])
def test_numbers_that_are_none(local: Cli, agent: LiveAgent, number: str) -> None:
    """Refused before the agent is asked."""
    assert local("dead-letters", "drop", number).code == 2
    assert agent.operations.calls == []
