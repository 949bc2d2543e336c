"""As whom a task runs."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from remotegpu_agent.task_user import Submitter, as_submitted, find_user, settings_of
from remotegpu_schemas.errors import Code, Misconfigured, Refused
from remotegpu_schemas.task import Task
from remotegpu_sidecar.launcher import LaunchError
from tests.agent.support import run_settings

NOBODY_UID = pwd.getpwnam("nobody").pw_uid
UNKNOWN_UID = 4_000_000_001


def test_users() -> None:
    """One of this host with its groups and home, or a sentence that says what to do."""
    root = find_user("root")
    assert (root.uid, root.gid, root.home) == (0, 0, pwd.getpwuid(0).pw_dir)
    assert 0 in root.groups
    with pytest.raises(Misconfigured, match=r"tasks\.run_as: there is no user 'nobody-at-all'"):
        find_user("nobody-at-all")


async def test_one_user_for_all_tasks(tmp_path: Path) -> None:
    """Whoever submitted it, a task runs as the user that the host names."""
    settings = run_settings(tmp_path, user=find_user("nobody"))
    for uid in (None, 0, UNKNOWN_UID):
        assert await settings_of(uid, settings) == settings


async def test_the_submitter(tmp_path: Path) -> None:
    """Looked up at each start; the agent's own user needs no change of rights."""
    settings = run_settings(tmp_path, runs_as_submitter=True)
    assert (await settings_of(NOBODY_UID, settings)).user == find_user("nobody")
    assert (await settings_of(os.geteuid(), settings)).user is None


@pytest.mark.parametrize(
    ("uid", "sentence"),
    [
        (None, "it came without a user of this host"),
        (UNKNOWN_UID, f"its submitter, uid {UNKNOWN_UID}, is no user of this host"),
    ],
)
async def test_without_a_submitter_nothing_starts(tmp_path: Path, uid: int | None, sentence: str) -> None:
    """A task of before the setting, of a user who is gone: never as somebody else."""
    with pytest.raises(LaunchError, match=sentence):
        await settings_of(uid, run_settings(tmp_path, runs_as_submitter=True))


@pytest.mark.parametrize(
    ("workdir", "expected"),
    [(None, "/home/a"), ("sub", "/home/a/sub"), ("../b", "/home/a/../b"), ("/data", "/data")],
)
def test_a_task_runs_where_it_was_submitted(workdir: str | None, expected: str) -> None:
    """What names no directory of its own runs in the caller's, and a relative one begins there."""
    task = Task(id="t", command="true", workdir=workdir)
    [found] = as_submitted([task], Submitter(1000, Path("/home/a")))
    assert found.workdir == expected
    assert as_submitted([task], Submitter(1000)) == [task]


def test_nobody_without_a_uid_may_submit() -> None:
    """A caller with a token is refused, with what to do."""
    with pytest.raises(Refused, match="submit over the Unix socket") as caught:
        as_submitted([Task(id="t", command="true")], None)
    assert caught.value.code is Code.POLICY_REFUSED
