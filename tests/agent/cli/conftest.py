"""The command line in this process, with a running agent where the test asks for one."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from remotegpu_agent.cli import main
from tests.agent.cli.program import Cli, Ended
from tests.agent.cli.scripted_agent import LiveAgent


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="rg-") as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The server's own log would stand in the output of the program."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield
    structlog.reset_defaults()


@pytest.fixture
def agent(short_dir: Path) -> Iterator[LiveAgent]:
    """A running agent."""
    with LiveAgent(short_dir).running() as live:
        yield live


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("REMOTEGPU_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Calls the program in this process."""

    def call(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        assert "a mistake in this program" not in found.err
        return Ended(int(ended.value.code or 0), found.out, found.err)

    return call


@pytest.fixture
def local(cli: Cli, agent: LiveAgent, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """As `cli`, and the running agent is the one that it finds."""
    monkeypatch.setenv("REMOTEGPU_AGENT_SOCKET", str(agent.socket))
    return cli
