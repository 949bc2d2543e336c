"""Rights of another user for the length of a block, on one thread."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from remotegpu_schemas.attempt import TaskUser
from remotegpu_sidecar.privileges import rights_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can take on another user's rights")

USER = TaskUser(name="somebody", uid=65533, gid=65532, groups=(65531, 65530))


def rights(thread_id: int | None = None) -> dict[str, str]:
    """File-system ids, groups and effective capabilities of a thread of this process (proc(5))."""
    text = Path(f"/proc/self/task/{thread_id or threading.get_native_id()}/status").read_text()
    return dict(re.findall(r"^(Uid|Gid|Groups|CapEff):\t(.*?) *$", text, re.MULTILINE))


def test_f52_files_are_read_and_made_as_the_user(open_dir: Path) -> None:
    """F52: root's secret cannot be read, its directory not be written to; what is made elsewhere is the user's."""
    secret = open_dir / "secret"
    secret.write_text("hunter2")
    secret.chmod(0o600)
    shared = open_dir / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with rights_of(USER):
        with pytest.raises(PermissionError):
            secret.read_text()
        with pytest.raises(PermissionError):
            (open_dir / "planted").touch()
        (shared / "made").touch()
    made = (shared / "made").stat()
    assert (made.st_uid, made.st_gid) == (USER.uid, USER.gid)
    assert secret.read_text() == "hunter2"


def test_groups_count_and_ours_do_not(open_dir: Path) -> None:
    """A file for one of the user's groups can be read; one for root's group cannot."""
    for name, gid in (("theirs", 65530), ("ours", 0)):
        file = open_dir / name
        file.write_text(name)
        os.chown(file, 0, gid)
        file.chmod(0o640)
    with rights_of(USER):
        assert (open_dir / "theirs").read_text() == "theirs"
        with pytest.raises(PermissionError):
            (open_dir / "ours").read_text()


def test_everything_is_as_before_afterwards_also_after_an_error() -> None:
    """Ids, groups and capabilities of the thread."""
    before = rights()
    inside: dict[str, str] = {}
    with contextlib.suppress(ValueError), rights_of(USER):
        inside = rights()
        raise ValueError("from the block")
    assert inside["Uid"].split()[3] == str(USER.uid)
    assert inside["CapEff"] != before["CapEff"]
    assert rights() == before


def test_other_threads_keep_theirs() -> None:
    """The agent goes on with its own rights meanwhile."""
    started, may_end, ids = threading.Event(), threading.Event(), list[int]()

    def wait() -> None:
        ids.append(threading.get_native_id())
        started.set()
        may_end.wait(20)

    other = threading.Thread(target=wait)
    other.start()
    assert started.wait(20)
    before = rights(ids[0])
    with rights_of(USER):
        during = rights(ids[0])
    may_end.set()
    other.join()
    assert during == before


def test_nobody_and_root_change_nothing() -> None:
    """No user, and root itself, as which tasks may run."""
    before = rights()
    for user in (None, TaskUser(name="root", uid=0, gid=0)):
        with rights_of(user):
            assert rights() == before


def test_rights_that_cannot_be_taken_on_are_refused() -> None:
    """Without the capability for it the block is not entered; the process goes on as it was."""
    code = (
        "from remotegpu_schemas.attempt import TaskUser\n"
        "from remotegpu_sidecar.privileges import rights_of\n"
        "try:\n"
        "    with rights_of(TaskUser(name='x', uid=65533, gid=65533)): print('entered')\n"
        "except PermissionError as error: print(error)\n"
    )
    limited = ["setpriv", "--bounding-set", "-setuid,-setgid", "--inh-caps", "-setuid,-setgid"]
    ended = subprocess.run([*limited, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.stdout.startswith("the rights of uid 65533 cannot be taken on"), ended
