"""The task's own process between fork and exec: drops what is the shim's, takes on what the spec says, executes.

Runs in the forked child, imports nothing, never returns. What goes wrong is told through a pipe as
{"errno": N, "error": "one sentence that says what to do"}. Standard library only.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat

from remotegpu_sidecar import cgroups, kernel

REPORT_MAX_BYTES = 4096  # PIPE_BUF: one write, one read

_REPORT_FD = 3
_DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
_SHEBANG_MAX_BYTES = 256
_TEXT_MAX_CHARS = 300
# Those that the interpreter, the spawner and the shim changed; the spawner has set all others to their default.
_CHANGED_SIGNALS = (
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGWINCH,
    signal.SIGCHLD,
)


class CannotStartError(Exception):
    """The task cannot be started; the sentence says why and what to do."""

    def __init__(self, number: int, sentence: str) -> None:
        super().__init__(sentence)
        self.number = number
        self.sentence = sentence


def start(
    spec: dict[str, object], shim_pid: int, cgroup: str | None, stdout_fd: int, stderr_fd: int, report_fd: int
) -> None:
    """Become the task. Never returns; signals that the shim handles must be blocked when this is called."""
    try:
        os.dup2(stdout_fd, 1)
        os.dup2(stderr_fd, 2)
        if report_fd != _REPORT_FD:
            os.dup2(report_fd, _REPORT_FD, inheritable=False)
        report_fd = _REPORT_FD
        kernel.close_from(_REPORT_FD + 1)
        if cgroup:
            _join(cgroup)
        _take_on(spec, shim_pid)
        _execute(spec)
    except CannotStartError as error:
        _report(report_fd, error.number, error.sentence)
    except BaseException as error:  # noqa: BLE001 - nothing may get back into the shim's code
        _report(report_fd, getattr(error, "errno", None) or errno.EINVAL, f"the task could not be started: {error!r}")
    finally:
        os._exit(127)


def _report(fd: int, number: int, sentence: str) -> None:
    report = json.dumps({"errno": number, "error": sentence}).encode("ascii")
    if len(report) > REPORT_MAX_BYTES:
        report = json.dumps({"errno": number, "error": "the task could not be started"}).encode("ascii")
    os.write(fd, report)


def _take_on(spec: dict[str, object], shim_pid: int) -> None:
    os.setsid()
    _reset_oom_score()
    signal.set_wakeup_fd(-1)
    for number in _CHANGED_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    umask = spec.get("umask")
    os.umask(umask if isinstance(umask, int) else 0o022)
    user = spec.get("user")
    if isinstance(user, dict):
        _become(user)
    # A shim that is killed takes the main process along at once; the agent looks for the others.
    # After the change of user, which clears it (prctl(2)).
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != shim_pid:
        os._exit(127)
    _enter(str(spec["cwd"]))


def _join(cgroup: str) -> None:
    """From the shim's leaf to the task's, while there is still the right to."""
    try:
        cgroups.join(f"{cgroup}/{cgroups.TASK}")
    except OSError as error:
        number = error.errno or 0
        sentence = f"the task cannot enter its control group {_shown(cgroup)}: {os.strerror(number)}"
        raise CannotStartError(number, sentence) from None


def _reset_oom_score() -> None:
    """The agent may be protected from the kernel's OOM killer; its tasks are not."""
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(fd, b"0")
    except OSError:  # lowering it takes CAP_SYS_RESOURCE
        pass
    finally:
        os.close(fd)


def _become(user: dict[str, object]) -> None:
    """Drop to the user's rights for good."""
    uid, gid, groups = user["uid"], user["gid"], user.get("groups") or []
    if not (isinstance(uid, int) and isinstance(gid, int) and isinstance(groups, list)):
        raise CannotStartError(errno.EINVAL, "the run's user is not given by numbers")
    try:
        if os.geteuid() == 0 or (os.getuid(), os.getgid()) != (uid, gid):
            _hand_over_streams(uid, gid)
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    except (OSError, OverflowError) as error:
        name = _shown(str(user.get("name", uid)))
        mend = "run the agent as root, or set tasks.run_as to the agent's own user"
        number = error.errno if isinstance(error, OSError) else None
        raise CannotStartError(number or errno.EINVAL, f"cannot become user {name} (uid {uid}): {mend}") from None
    if (os.getresuid(), os.getresgid()) != ((uid,) * 3, (gid,) * 3):  # what was asked for was "leave it as it is"
        raise CannotStartError(errno.EPERM, f"the rights of user {uid} and group {gid} were not taken on")


def _hand_over_streams(uid: int, gid: int) -> None:
    """Whoever opens /dev/stdout or /dev/stderr is judged as for a file: the pipes are the shim's, and 0600."""
    for fd in (1, 2):
        try:
            os.fchown(fd, uid, gid)
        except OSError:  # they can be written to all the same
            return


def _enter(directory: str) -> None:
    try:
        os.chdir(directory)
    except OSError as error:
        number = error.errno or 0
        shown = _shown(directory)
        if number == errno.ENOENT:
            sentence = f"the working directory {shown} does not exist: create it, or name another one"
        elif number == errno.ENOTDIR:
            sentence = f"the working directory {shown} is not a directory: name another one"
        elif number == errno.EACCES:
            sentence = f"the working directory {shown} may not be entered by uid {os.geteuid()}: change its rights"
        else:
            sentence = f"the working directory {shown} cannot be entered: {os.strerror(number)}"
        raise CannotStartError(number, sentence) from None


def _execute(spec: dict[str, object]) -> None:
    argv, env = spec["argv"], spec["env"]
    if not isinstance(argv, list) or not isinstance(env, dict):
        raise CannotStartError(errno.EINVAL, "the run has no arguments or no environment")
    program = str(argv[0])
    if not program:
        raise CannotStartError(errno.ENOENT, "the run has an empty command: name a program")
    denied: OSError | None = None
    for path in _candidates(program, env):
        try:
            os.execve(path, argv, env)
        except ValueError as error:
            raise CannotStartError(errno.EINVAL, f"arguments or environment cannot be passed on: {error}") from None
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENOTDIR} and not os.path.lexists(path):
                continue
            if error.errno != errno.EACCES or "/" in program:
                raise CannotStartError(error.errno or 0, _why(path, error.errno or 0)) from None
            denied = denied or OSError(error.errno, "", path)
    if denied is not None:
        raise CannotStartError(errno.EACCES, _why(str(denied.filename), errno.EACCES))
    if "/" in program:
        raise CannotStartError(
            errno.ENOENT, f"the program {_shown(program)} does not exist: install it, or correct the path"
        )
    searched = _shown(str(env.get("PATH", _DEFAULT_PATH)))
    raise CannotStartError(
        errno.ENOENT, f"there is no program {_shown(program)} in PATH ({searched}): install it, or give its full path"
    )


def _candidates(program: str, env: dict[str, str]) -> list[str]:
    if "/" in program:
        return [program]
    return [os.path.join(folder or ".", program) for folder in env.get("PATH", _DEFAULT_PATH).split(":")]


def _why(path: str, number: int) -> str:
    """One sentence on why a file that is there could not be executed. Read with the task's own rights."""
    shown = _shown(path)
    match number:
        case errno.ENOENT:
            return _why_interpreter(path, shown)
        case errno.EACCES:
            if os.path.isdir(path):
                return f"{shown} is a directory, not a program: name a program"
            return f"{shown} may not be executed by uid {os.geteuid()}: 'chmod +x' it, or name its interpreter first"
        case errno.ENOEXEC:
            return (
                f"{shown} is neither a program for this machine nor a script with an interpreter:"
                " put '#!/bin/sh' or the like into its first line"
            )
        case errno.E2BIG:
            return (
                "arguments and environment are too long for Linux (128 KiB each, 2 MiB together, as a rule):"
                " pass large values in a file"
            )
        case errno.ETXTBSY:
            return f"{shown} is being written to: finish writing it first"
        case errno.ELOOP:
            return f"{shown} is a link that leads back to itself: correct it"
        case _:
            return f"{shown} cannot be executed: {os.strerror(number)}"


def _why_interpreter(path: str, shown: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        first = os.read(fd, _SHEBANG_MAX_BYTES) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    except OSError:
        return f"{shown} leads nowhere: correct the link, or name another program"
    line = first.split(b"\n", 1)[0]
    if not line.startswith(b"#!"):
        return f"{shown} was built for another system: its program loader is not installed here"
    words = line[2:].split()
    interpreter = _shown(os.fsdecode(words[0])) if words else "''"
    if line.endswith(b"\r"):
        return f"the first line of {shown} ends like a Windows line and names no interpreter: convert the file"
    return f"{shown} names the interpreter {interpreter}, which does not exist: install it, or correct the first line"


def _shown(text: str) -> str:
    quoted = repr(text)
    return quoted if len(quoted) <= _TEXT_MAX_CHARS else quoted[:_TEXT_MAX_CHARS] + "...'"
