"""From a task to what the shim executes."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from remotegpu_agent.runspec import (
    DEFAULT_PATH,
    MESSAGES_DIR,
    SCRIPT_NAME,
    build_run_spec,
    check_runnable,
    prepare_work_dir,
    progress_path,
    refusal,
    work_dir,
)
from remotegpu_schemas.attempt import AttemptId, RunNo, RunSpec, TaskUser
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.task import Resources, Task, TaskType
from tests.agent.support import run_settings

NOBODY = TaskUser(name="nobody", uid=65534, gid=65534, home="/nonexistent")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def make(**task: Any) -> Task:
    """A task with the id `t`."""
    values: dict[str, Any] = {} if "script" in task else {"command": "true"}
    return Task(id="t", **{**values, **task})


def spec(task: Task, **settings: Any) -> RunSpec:
    """The spec of its third run."""
    return build_run_spec(task, AttemptId("a-1"), RunNo(3), run_settings(Path("/state"), **settings), lease_ttl_s=6.0)


@pytest.mark.parametrize(
    ("task", "argv"),
    [
        ({"command": "echo $HOME | wc"}, ("bash", "-c", "echo $HOME | wc")),
        ({"command": "echo", "args": ("a b", "$c")}, ("echo", "a b", "$c")),
        ({"command": "echo", "args": ()}, ("echo",)),
        ({"script": "make"}, ("bash", f"/state/work/t/{SCRIPT_NAME}")),
        ({"script": "make", "args": ("x y",)}, ("bash", f"/state/work/t/{SCRIPT_NAME}", "x y")),
        ({"script": "import os", "type": TaskType.PYTHON}, ("python3", f"/state/work/t/{SCRIPT_NAME}")),
        ({"script": "x", "interpreter": "/usr/bin/perl"}, ("/usr/bin/perl", f"/state/work/t/{SCRIPT_NAME}")),
        ({"command": "--help", "args": ("--",)}, ("--help", "--")),
    ],
)
def test_argument_vectors(task: dict[str, Any], argv: tuple[str, ...]) -> None:
    """A shell string, a vector that no shell sees, a script with its interpreter."""
    assert spec(make(**task)).argv == argv


@pytest.mark.parametrize(
    ("workdir", "cwd"),
    [(None, "/state/work/t"), ("", "/state/work/t"), ("sub/dir", "/state/work/t/sub/dir"), ("/data", "/data")],
)
def test_the_working_directory(workdir: str | None, cwd: str) -> None:
    """The task's own unless it names one; relative ones lie in it."""
    assert spec(make(workdir=workdir)).cwd == cwd


def test_the_environment_is_complete_and_overridden_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults, then the host's, then the task's, then what the agent alone may say; nothing of the agent's own."""
    monkeypatch.setenv("AGENT_SECRET", "x")
    monkeypatch.setenv("PATH", "/agent/only")
    env = spec(
        make(env={"B": "task", "C": "task", "REMOTEGPU_TASK_ID": "forged", "CUDA_VISIBLE_DEVICES": "0", "LANG": "C"}),
        env={"A": "host", "B": "host", "REMOTEGPU_ATTEMPT_ID": "forged", "HOME": "/srv"},
        api_socket=Path("/run/agent.sock"),
        user=NOBODY,
    ).env
    assert env == {
        "PATH": DEFAULT_PATH,
        "HOME": "/srv",
        "USER": "nobody",
        "LOGNAME": "nobody",
        "SHELL": "/bin/bash",
        "LANG": "C",
        "A": "host",
        "B": "task",
        "C": "task",
        "REMOTEGPU_TASK_ID": "t",
        "REMOTEGPU_ATTEMPT_ID": "a-1",
        "REMOTEGPU_RUN_NUMBER": "3",
        "REMOTEGPU_AGENT_ID": "agent-1",
        "REMOTEGPU_MACHINE_ID": "machine-1",
        "REMOTEGPU_GPU_UUIDS": "",
        "CUDA_VISIBLE_DEVICES": "-1",
        "NVIDIA_VISIBLE_DEVICES": "void",
        "REMOTEGPU_ARTIFACTS_DIR": "/state/work/t/artifacts",
        "REMOTEGPU_CHECKPOINT_DIR": "/state/work/t/checkpoints",
        "REMOTEGPU_OUTPUTS": "/state/work/t/.remotegpu/outputs",
        "REMOTEGPU_PROGRESS": "/state/work/t/.remotegpu/progress",
        "REMOTEGPU_AGENT_SOCKET": "/run/agent.sock",
    }


def test_bounds_come_from_the_task_or_the_host() -> None:
    """Timeout 0 is the default; a default of 0 is none. A grace period of 0 is one."""
    plain = spec(make())
    assert (plain.timeout_s, plain.grace_period_s, plain.lease_grace_s) == (None, 10.0, 2.0)
    assert spec(make(), default_timeout_s=60.0).timeout_s == 60.0
    own = spec(make(timeout_s=5.0, grace_period_s=0.0, stop_signal=2), default_timeout_s=60.0)
    assert (own.timeout_s, own.grace_period_s, own.stop_signal) == (5.0, 0.0, 2)


def test_what_cannot_run_here_is_refused() -> None:
    """Containers, in this version."""
    assert refusal(make()) is None
    with pytest.raises(Refused, match="container") as caught:
        check_runnable(make(type=TaskType.CONTAINER))
    assert caught.value.code is Code.NOT_SUPPORTED


# --- the task's directory ---


@pytest.fixture(params=[0o022, 0o077], ids=["umask 022", "umask 077"])
def umask(request: pytest.FixtureRequest) -> Generator[int]:
    """A host's usual umask, and a careful one."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_directory_is_made_once_and_kept(tmp_path: Path, umask: int) -> None:
    """With its folders, closed to others; what a task left there is there at its next run."""
    task, settings = make(script="echo 1\n"), run_settings(tmp_path)
    prepare_work_dir(task, settings)
    directory = work_dir(tmp_path, task.task_id)
    kept = directory / "checkpoints" / "x"
    kept.write_text("kept")
    prepare_work_dir(make(script="echo 2\n"), settings)
    assert kept.read_text() == "kept"
    assert (directory / SCRIPT_NAME).read_text() == "echo 2\n"
    assert stat.S_IMODE((directory / SCRIPT_NAME).stat().st_mode) == 0o700
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {path.name for path in directory.iterdir()} == {"artifacts", "checkpoints", MESSAGES_DIR, SCRIPT_NAME}
    assert progress_path(tmp_path, task.task_id).parent.is_dir()
    # Its user must be able to pass through, and nobody may list the tasks of others.
    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o711


@needs_root
def test_all_of_it_belongs_to_the_tasks_user(open_dir: Path) -> None:
    """The directory, its folders, the script; the parent stays the agent's."""
    task, settings = make(script="true"), run_settings(open_dir, user=NOBODY)
    prepare_work_dir(task, settings)
    directory = work_dir(open_dir, task.task_id)
    for path in (directory, *directory.iterdir()):
        assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534), path
    assert directory.parent.stat().st_uid == 0


@needs_root
def test_what_a_crash_left_half_done_is_mended(tmp_path: Path) -> None:
    """The directory is given away last: one that is still the agent's is gone through again."""
    task, settings = make(), run_settings(tmp_path, user=NOBODY)
    directory = work_dir(tmp_path, task.task_id)
    (directory / "artifacts").mkdir(parents=True)
    prepare_work_dir(task, settings)
    for path in (directory, directory / "artifacts", directory / "checkpoints", directory / MESSAGES_DIR):
        assert path.stat().st_uid == 65534


@needs_root
@pytest.mark.parametrize("user", [None, TaskUser(name="other", uid=65533, gid=65533)])
def test_f52_a_directory_of_another_user_is_refused(open_dir: Path, user: TaskUser | None) -> None:
    """F52: after a change of `run_as`, nothing is written, or run from, where an earlier user could exchange it."""
    task = make(script="true")
    prepare_work_dir(task, run_settings(open_dir, user=NOBODY))
    script = work_dir(open_dir, task.task_id) / SCRIPT_NAME
    script.write_text("planted")
    with pytest.raises(PermissionError, match=r"belongs to uid 65534.*take away the directory"):
        prepare_work_dir(task, run_settings(open_dir, user=user))
    assert script.read_text() == "planted"


@needs_root
def test_f52_planted_links_are_not_followed(open_dir: Path) -> None:
    """F52: once the directory is the task's, nothing in it is made, changed or given away through a link."""
    task, settings = make(script="true"), run_settings(open_dir, user=NOBODY)
    prepare_work_dir(task, settings)
    directory = work_dir(open_dir, task.task_id)
    victim, victims = open_dir / "victim", open_dir / "victims"
    victim.write_text("precious")
    victims.mkdir()
    (directory / SCRIPT_NAME).unlink()
    (directory / SCRIPT_NAME).symlink_to(victim)
    (directory / "artifacts").rmdir()
    (directory / "artifacts").symlink_to(victims)
    (directory / "checkpoints").rmdir()
    prepare_work_dir(task, settings)
    assert (victim.read_text(), victim.stat().st_uid) == ("precious", 0)
    assert victims.stat().st_uid == 0
    assert not (directory / "checkpoints").exists()
    assert not (directory / SCRIPT_NAME).is_symlink()
    assert (directory / SCRIPT_NAME).read_text() == "true"


def test_f52_a_directory_in_the_scripts_place_fails_this_task_alone(tmp_path: Path) -> None:
    """F52: OSError, which makes the run `launch_failed`."""
    task, settings = make(script="true"), run_settings(tmp_path)
    prepare_work_dir(task, settings)
    script = work_dir(tmp_path, task.task_id) / SCRIPT_NAME
    script.unlink()
    script.mkdir()
    with pytest.raises(OSError, match=SCRIPT_NAME):
        prepare_work_dir(task, settings)


def test_a_script_is_written_as_it_is(tmp_path: Path) -> None:
    """Line ends and characters are the task's own."""
    text = "#!/bin/sh\r\necho 'grün €'\n"
    prepare_work_dir(make(script=text), run_settings(tmp_path))
    assert (work_dir(tmp_path, make().task_id) / SCRIPT_NAME).read_bytes() == text.encode()


def test_what_the_host_sets_for_every_run_is_in_its_limits(tmp_path: Path) -> None:
    """Weights, CPUs and processes of the config, beside what the task asks for."""
    settings = run_settings(tmp_path, cpu_weight=50, io_weight=200, allowed_cpus="0-1", processes_max=64)
    task = make(resources=Resources(cpus=2, memory_gb=1))
    found = build_run_spec(task, AttemptId("a"), RunNo(1), settings, lease_ttl_s=None).run_limits
    assert (found.cpu_weight, found.io_weight, found.allowed_cpus, found.tasks_max) == (50, 200, "0-1", 64)
    assert (found.cpus, found.memory_bytes, found.swap_bytes) == (2, 1 << 30, 0)
