"""From a task to what the shim executes: argument vector, environment, directories. Pure but for the passwd database.

A command without args is a shell string for `bash -c`; with args it is a vector and no shell is involved; a script is
run by its interpreter from a file in the task's own directory.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from remotegpu_queue import leasing
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId, RunLimits, RunNo, RunSpec, TaskUser
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.task import Resources, Task, TaskId, TaskType
from remotegpu_sidecar.privileges import rights_of

DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SCRIPT_NAME: Final = ".remotegpu-script"
MESSAGES_DIR: Final = ".remotegpu"
"""In the task's directory: what it tells the agent. A directory of its own, because the agent watches it."""
PROGRESS_NAME: Final = "progress"
OUTPUTS_NAME: Final = "outputs"
_INTERPRETERS: Final = {TaskType.SHELL: "bash", TaskType.SCRIPT: "bash", TaskType.PYTHON: "python3"}


@dataclass(frozen=True)
class RunSettings:
    """What the host adds to every task. Durations are seconds, sizes bytes."""

    agent_id: str
    machine_id: str
    state_dir: Path
    default_timeout_s: float
    grace_period_s: float
    output_limit_bytes: int
    output_segments: int
    user: TaskUser | None
    """As whom tasks run; None is the agent's own user."""
    env: Mapping[str, str]
    runs_as_submitter: bool = False
    """`user` is another one for each attempt: see `task_user.settings_of`."""
    api_socket: Path | None = None
    cpu_weight: int | None = None
    io_weight: int | None = None
    allowed_cpus: str | None = None
    processes_max: int = limits.TASK_PROCESSES_MAX


def refusal(task: Task) -> str | None:
    """Why this version of the agent can never run the task, or None."""
    if task.type is TaskType.CONTAINER:
        return "tasks of type container are not supported by this version"
    return None


def check_runnable(task: Task) -> None:
    """Raise Refused(NOT_SUPPORTED) for a task that this agent can never run."""
    reason = refusal(task)
    if reason is not None:
        raise Refused(Code.NOT_SUPPORTED, reason)


def work_dir(state_dir: Path, task_id: TaskId) -> Path:
    """Where the task may write: artifacts, outputs, progress, checkpoints; kept over its runs."""
    return state_dir / "work" / task_id


def progress_path(state_dir: Path, task_id: TaskId) -> Path:
    """The file whose last line is the task's progress; the task's own."""
    return work_dir(state_dir, task_id) / MESSAGES_DIR / PROGRESS_NAME


def grace_period_s(task: Task, settings: RunSettings) -> float:
    """How long the task may take between its stop signal and SIGKILL."""
    return settings.grace_period_s if task.grace_period_s is None else task.grace_period_s


def build_run_spec(
    task: Task, attempt_id: AttemptId, run_no: RunNo, settings: RunSettings, *, lease_ttl_s: float | None
) -> RunSpec:
    """The spec of one run. The environment is complete: nothing of the agent's own reaches the task."""
    grace_s, warn = grace_period_s(task, settings), task.warn
    lease_grace_s, lease_warn_s = 0.0, None
    if lease_ttl_s is not None:
        lease_grace_s = leasing.lease_grace_s(grace_s, lease_ttl_s)
        lease_warn_s = leasing.lease_warn_s(warn.before_s, lease_ttl_s) if warn is not None else None
    directory = work_dir(settings.state_dir, task.task_id)
    timeout_s = task.timeout_s or settings.default_timeout_s
    return RunSpec(
        task_id=task.task_id,
        attempt_id=attempt_id,
        run_no=run_no,
        argv=_argv(task, directory),
        env=_environment(task, attempt_id, run_no, settings, directory),
        cwd=os.path.join(directory, task.workdir) if task.workdir else str(directory),
        user=settings.user,
        timeout_s=timeout_s or None,
        grace_period_s=grace_s,
        lease_grace_s=lease_grace_s,
        stop_signal=task.stop_signal,
        warn_signal=warn.signal if warn is not None else None,
        warn_before_s=warn.before_s if warn is not None else None,
        lease_warn_s=lease_warn_s,
        output_limit_bytes=settings.output_limit_bytes,
        output_segments=settings.output_segments,
        run_limits=_run_limits(task.resources, settings),
    )


def _run_limits(resources: Resources, settings: RunSettings) -> RunLimits:
    """What was asked for is what there is: more would be taken from tasks that asked for theirs."""
    has_memory = resources.memory_mb > 0
    return RunLimits(
        memory_bytes=resources.memory_mb * limits.MIB if has_memory else None,
        swap_bytes=0 if has_memory else None,
        cpus=resources.cpus or None,
        cpu_weight=settings.cpu_weight,
        io_weight=settings.io_weight,
        allowed_cpus=settings.allowed_cpus,
        tasks_max=settings.processes_max,
    )


def _argv(task: Task, directory: Path) -> tuple[str, ...]:
    if task.script is not None:
        interpreter = task.interpreter or _INTERPRETERS.get(task.type, "bash")
        return (interpreter, str(directory / SCRIPT_NAME), *(task.args or ()))
    command = task.command or ""
    if task.args is None:
        return ("bash", "-c", command)
    return (command, *task.args)


def _environment(
    task: Task, attempt_id: AttemptId, run_no: RunNo, settings: RunSettings, directory: Path
) -> dict[str, str]:
    user = settings.user
    env = {
        "PATH": DEFAULT_PATH,
        "HOME": user.home if user else os.path.expanduser("~"),
        "USER": user.name if user else _own_user_name(),
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        **settings.env,
        **task.env,
        "REMOTEGPU_TASK_ID": task.id,
        "REMOTEGPU_ATTEMPT_ID": attempt_id,
        "REMOTEGPU_RUN_NUMBER": str(run_no),
        "REMOTEGPU_AGENT_ID": settings.agent_id,
        "REMOTEGPU_MACHINE_ID": settings.machine_id,
        "REMOTEGPU_GPU_UUIDS": "",
        "CUDA_VISIBLE_DEVICES": "-1",
        "NVIDIA_VISIBLE_DEVICES": "void",
        "REMOTEGPU_ARTIFACTS_DIR": f"{directory}/artifacts",
        "REMOTEGPU_CHECKPOINT_DIR": f"{directory}/checkpoints",
        "REMOTEGPU_OUTPUTS": f"{directory}/{MESSAGES_DIR}/{OUTPUTS_NAME}",
        "REMOTEGPU_PROGRESS": f"{directory}/{MESSAGES_DIR}/{PROGRESS_NAME}",
    }
    env.setdefault("LOGNAME", env["USER"])
    if settings.api_socket is not None:
        env["REMOTEGPU_AGENT_SOCKET"] = str(settings.api_socket)
    return env


def _own_user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def prepare_work_dir(task: Task, settings: RunSettings) -> None:
    """Make the task's directory, owned by its user, and write its script. Raises OSError. Safe to repeat.

    The parent belongs to the agent, so the task cannot replace the directory itself; what lies inside is the task's.
    One that belongs to a third user, as whom it ran before, is refused: its owner could put a script of its own in the
    place of ours.
    """
    directory = work_dir(settings.state_dir, task.task_id)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
    except FileNotFoundError:  # the first task of this state directory
        directory.parent.mkdir(exist_ok=True)
        directory.parent.chmod(0o711)  # whatever the umask: the tasks' users have to pass through
        directory.mkdir(mode=0o700, exist_ok=True)
    user = settings.user
    _check_owner(directory, user)
    # Once the directory is the task's, nothing in it is touched any more; given away last, so that a crash is mended.
    if user is None or directory.stat().st_uid in {os.geteuid(), 0}:
        for name in ("artifacts", "checkpoints", MESSAGES_DIR):
            with contextlib.suppress(FileExistsError):  # whatever it is by now, nobody looks behind it
                os.mkdir(directory / name, 0o700)
            _give(directory / name, user)
        _give(directory, user)
    if task.script is not None:
        _write_script(directory / SCRIPT_NAME, task.script, settings.user)


def _check_owner(directory: Path, user: TaskUser | None) -> None:
    owner_uid, uid = directory.stat().st_uid, os.geteuid() if user is None else user.uid
    if owner_uid not in {uid, os.geteuid(), 0}:
        raise PermissionError(
            f"{directory} belongs to uid {owner_uid}, as whom the task ran before, and now it is to run as uid {uid}; "
            "take away the directory, or set tasks.run_as back"
        )


def _write_script(path: Path, text: str, user: TaskUser | None) -> None:
    """As its user: what is made belongs to it, and nothing is done there that it could not do itself."""
    with rights_of(user):
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o700)
        with open(fd, "w", encoding="utf-8", newline="") as file:
            file.write(text)


def _give(path: Path, user: TaskUser | None) -> None:
    if user is not None:
        os.chown(path, user.uid, user.gid, follow_symlinks=False)
