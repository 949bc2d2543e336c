"""What a task sees when it starts, and what is said when it cannot."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
from pathlib import Path
from typing import Any, cast

import pytest

from remotegpu_schemas.attempt import EndedBy, RunEnded, RunSpec, TaskUser
from remotegpu_sidecar.identity import boottime_ns
from remotegpu_sidecar.launcher import Launcher
from remotegpu_sidecar.output import read_output
from tests.sidecar.support import launched, make_spec, python, sh, unique

NOBODY = TaskUser(name="nobody", uid=65534, gid=65534, groups=(65534,))


async def run_to_end(launcher: Launcher, spec: RunSpec) -> tuple[RunEnded, bytes, bytes]:
    """Run a spec; its end and its output."""
    run = await launched(launcher, spec)
    record = await run.wait()
    run.close()
    assert record.ended is not None
    stdout, stderr = (read_output(run.directory, name, 0, 1 << 20)[1] for name in ("stdout", "stderr"))
    return record.ended, stdout, stderr


async def report_of(launcher: Launcher, script: str, **changes: Any) -> object:
    """What a Python program prints as JSON."""
    ended, stdout, stderr = await run_to_end(launcher, make_spec(*python(script), **changes))
    assert (ended.exit_code, stderr) == (0, b"")
    return json.loads(stdout)


async def test_only_three_descriptors_are_open(attempts_dir: Path) -> None:
    """Nothing of agent, spawner or shim reaches a task, even if it was opened without close-on-exec."""
    leak = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(leak, True)
    again = Launcher(attempts_dir)
    try:
        await again.start()
        ended, stdout, _ = await run_to_end(again, make_spec(*sh("ls -l /proc/self/fd | cat; readlink /proc/$$/fd/0")))
    finally:
        await again.stop()
        os.close(leak)
    lines = stdout.decode().splitlines()
    assert ended.exit_code == 0
    assert lines[-1] == "/dev/null"
    # `ls` itself has the listing open.
    assert [line.split()[8] for line in lines[1:-1]] == ["0", "1", "2", "3"]
    assert "/proc/" in lines[4]


async def test_environment_is_exactly_the_spec(launcher: Launcher) -> None:
    """Nothing is added and nothing is lost, in any script."""
    spec = make_spec("env", "-0", env={"WEIGHT": "ä ≠ 'x'\n\"y\"", "EMPTY": ""})
    _, stdout, _ = await run_to_end(launcher, spec)
    assert dict(line.split("=", 1) for line in stdout.decode().split("\0") if line) == spec.env


async def test_arguments_pass_unchanged(launcher: Launcher) -> None:
    """No shell touches them."""
    arguments = ("", " a  b ", "$HOME", "ü\n'\"", "-" * 100_000)
    script = "import sys, json; print(json.dumps(sys.argv[1:]))"
    ended, stdout, _ = await run_to_end(launcher, make_spec(*python(script), *arguments))
    assert (ended.exit_code, tuple(json.loads(stdout))) == (0, arguments)


async def test_signals_umask_and_groups_are_as_new(attempts_dir: Path) -> None:
    """Nothing is ignored, caught or blocked, whatever the agent does; the umask is the spec's."""
    old = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
    again = Launcher(attempts_dir)
    try:
        await again.start()
        spec = make_spec(*sh("cat /proc/self/status"), umask=0o027)
        _, stdout, _ = await run_to_end(again, spec)
    finally:
        await again.stop()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGWINCH])
        signal.signal(signal.SIGUSR2, old)
    status = dict(line.split(":\t", 1) for line in stdout.decode().splitlines())
    # The C library keeps 32 and 33 for itself (signal(7)): nobody can reset them, whatever started the tests.
    reserved = 1 << 31 | 1 << 32
    signals = {name: int(status[name], 16) & ~reserved for name in ("SigBlk", "SigIgn", "SigCgt")}
    assert (status["Umask"], signals) == ("0027", dict.fromkeys(signals, 0))


async def test_task_leads_its_own_session_and_may_be_killed_by_the_oom_killer(attempts_dir: Path) -> None:
    """A session and group of its own; no protection inherited from the agent."""
    script = (
        "import os, json; print(json.dumps([os.getsid(0) == os.getpgid(0) == os.getpid(),"
        " open('/proc/self/oom_score_adj').read().strip()]))"
    )
    score = Path("/proc/self/oom_score_adj")
    before = score.read_text()
    score.write_text("300")
    again = Launcher(attempts_dir)
    try:
        await again.start()
        assert await report_of(again, script) == [True, "0"]
    finally:
        await again.stop()
        score.write_text(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_rights_are_dropped_for_good(launcher: Launcher, attempts_dir: Path) -> None:
    """User, group and groups are the given ones; no_new_privs is set; the home of the run stays closed to the task."""
    script = (
        "import os, json; s = open('/proc/self/status').read();"
        "has = [line + '\\n' in s for line in ('NoNewPrivs:\\t1', 'CapEff:\\t' + '0' * 16, 'CapPrm:\\t' + '0' * 16)];"
        "print(json.dumps([os.getresuid(), os.getresgid(), os.getgroups(), has]))"
    )
    program = ("/usr/bin/python3", "-I", "-S", "-c", script)
    ended, stdout, stderr = await run_to_end(launcher, make_spec(*program, user=NOBODY))
    assert (ended.exit_code, stderr) == (0, b"")
    assert json.loads(stdout) == [[65534] * 3, [65534] * 3, [65534], [True, True, True]]
    directory = attempts_dir / f"{unique()}.1"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_standard_streams_can_be_opened_by_name(launcher: Launcher) -> None:
    """Another user's task writes to /dev/stdout and /dev/stderr, as programs do that are given a file's name."""
    spec = make_spec(*sh("echo one >/dev/stdout; echo two | tee /dev/stderr"), user=NOBODY)
    ended, stdout, stderr = await run_to_end(launcher, spec)
    assert (ended.exit_code, stdout, stderr) == (0, b"one\ntwo\n", b"two\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_dropped_rights_do_not_come_back(launcher: Launcher, tmp_path: Path) -> None:
    """setuid(0), setgid(0) and setgroups are refused, and a set-user-ID program of root's gives nothing."""
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    program = tmp_path / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o6755)
    assert (program.stat().st_uid, stat.S_IMODE(program.stat().st_mode)) == (0, 0o6755)
    script = f"""
import json, os, subprocess
def refused(call, *arguments):
    try:
        call(*arguments)
    except PermissionError:
        return True
    return False
calls = [(os.setuid, 0), (os.seteuid, 0), (os.setgid, 0), (os.setgroups, [0]), (os.setresuid, 0, 0, 0)]
calls += [(os.chroot, "/"), (os.open, "/etc/shadow", os.O_RDONLY), (os.kill, {os.getpid()}, 0)]
print(json.dumps([refused(*call) for call in calls]))
print(subprocess.check_output([{str(program)!r}, "-u"], text=True), end="")
print(subprocess.check_output([{str(program)!r}, "-g"], text=True), end="")
"""
    ended, stdout, stderr = await run_to_end(
        launcher, make_spec("/usr/bin/python3", "-I", "-S", "-c", script, user=NOBODY)
    )
    assert (ended.exit_code, stderr) == (0, b"")
    refused, uid, gid = stdout.decode().splitlines()
    assert json.loads(refused) == [True] * 8
    assert (uid, gid) == ("65534", "65534")


@pytest.mark.parametrize(
    "changes", [{"uid": 2**32 - 1}, {"gid": 2**32 - 1}, {"uid": -1}, {"uid": 2**40}, {"groups": (-1,)}]
)
async def test_user_that_is_none_keeps_no_rights(launcher: Launcher, tmp_path: Path, changes: dict[str, Any]) -> None:
    """-1 means "leave it as it is" to the kernel: a spec that says so starts nothing, least of all as root."""
    spec = make_spec("touch", str(tmp_path / "ran")).model_copy(update={"user": NOBODY.model_copy(update=changes)})
    ended, _, _ = await run_to_end(launcher, spec)
    assert ended.ended_by is EndedBy.LAUNCH
    assert ended.errno in {errno.EINVAL, errno.EPERM}
    assert not (tmp_path / "ran").exists()


async def test_limits_are_those_that_the_agent_was_started_with(attempts_dir: Path) -> None:
    """Open files and core dumps: what the operator has set for the agent holds for its tasks."""
    names = ("RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_STACK", "RLIMIT_MEMLOCK", "RLIMIT_NPROC")
    wanted = [list(resource.getrlimit(getattr(resource, name))) for name in names]
    script = f"import resource, json; print(json.dumps([resource.getrlimit(getattr(resource, n)) for n in {names}]))"
    again = Launcher(attempts_dir)
    try:
        await again.start()
        assert await report_of(again, script) == wanted
    finally:
        await again.stop()


async def test_standard_input_is_empty_and_nothing_else_is_open(launcher: Launcher) -> None:
    """As the task itself sees it: /dev/null, two pipes, and no descriptor of the agent, the spawner or the shim."""
    script = (
        "import os, json; fds = sorted(map(int, os.listdir('/proc/self/fd')));"
        " names = {fd: os.readlink(f'/proc/self/fd/{fd}') for fd in fds if os.path.lexists(f'/proc/self/fd/{fd}')};"
        " print(json.dumps([os.read(0, 10).decode(), names]))"
    )
    stdin, names = cast("tuple[str, dict[str, str]]", await report_of(launcher, script))
    assert (stdin, names.pop("0")) == ("", "/dev/null")
    assert all(name.startswith("pipe:") for name in names.values())
    assert sorted(names) == ["1", "2"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_working_directory_is_entered_with_the_tasks_rights(launcher: Launcher, tmp_path: Path) -> None:
    """What root may enter is no measure."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    ended, _, _ = await run_to_end(launcher, make_spec("true", cwd=str(closed), user=NOBODY))
    assert (ended.ended_by, ended.errno) == (EndedBy.LAUNCH, errno.EACCES)
    assert "may not be entered by uid 65534" in (ended.error or "")


def _program(path: Path, content: bytes, mode: int = 0o755) -> str:
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


async def test_launch_errors_say_what_to_do(launcher: Launcher, tmp_path: Path) -> None:
    """Each way of not starting has its errno, its object and a mend; nothing hangs, nothing has started."""
    cases: list[tuple[tuple[str, ...], dict[str, Any], int, tuple[str, ...]]] = [
        (("no-such-program",), {}, errno.ENOENT, ("no-such-program", "PATH", "install")),
        ((str(tmp_path / "none"),), {}, errno.ENOENT, (str(tmp_path / "none"), "correct the path")),
        (("x",), {"env": {"PATH": ""}}, errno.ENOENT, ("no program 'x'",)),
        ((_program(tmp_path / "plain", b"#!/bin/sh\n", 0o644),), {}, errno.EACCES, ("plain", "chmod +x")),
        ((str(tmp_path),), {}, errno.EACCES, ("is a directory",)),
        (
            (_program(tmp_path / "bang", b"#!/no/such/sh -e\n"),),
            {},
            errno.ENOENT,
            ("bang", "'/no/such/sh'", "first line"),
        ),
        ((_program(tmp_path / "dos", b"#!/bin/sh\r\necho\r\n"),), {}, errno.ENOENT, ("dos", "Windows")),
        ((_program(tmp_path / "bare", b"echo no shebang\n"),), {}, errno.ENOEXEC, ("bare", "#!/bin/sh")),
        ((_program(tmp_path / "empty", b""),), {}, errno.ENOEXEC, ("empty", "#!/bin/sh")),
        (("true",), {"cwd": str(tmp_path / "gone")}, errno.ENOENT, ("working directory", "gone", "create it")),
        (("true",), {"cwd": "/etc/passwd"}, errno.ENOTDIR, ("working directory", "/etc/passwd")),
        (("true", *["x" * 100_000] * 30), {}, errno.E2BIG, ("too long", "file")),
        (("true", "x" * 200_000), {}, errno.E2BIG, ("too long",)),
        (("true", "a\0b"), {}, errno.EINVAL, ("null",)),
        (("true",), {"env": {"A=B": "c"}}, errno.EINVAL, ("environment",)),
        (("",), {}, errno.ENOENT, ("empty command",)),
    ]
    os.symlink("loop", tmp_path / "loop")
    os.symlink("nowhere", tmp_path / "dangling")
    cases += [
        ((str(tmp_path / "loop"),), {}, errno.ELOOP, ("link",)),
        ((str(tmp_path / "dangling"),), {}, errno.ENOENT, ("dangling", "link")),
    ]
    for number, (argv, changes, code, words) in enumerate(cases, start=1):
        run = await launched(launcher, make_spec(*argv, run_no=number, **changes))
        assert run.started is None, argv[0]
        record = await run.wait()
        run.close()
        assert record.started is None
        assert record.ended is not None
        assert (record.ended.ended_by, record.ended.errno) == (EndedBy.LAUNCH, code), (argv[0], record.ended)
        for word in words:
            assert word in (record.ended.error or ""), record.ended.error
        assert "\n" not in (record.ended.error or "")
        assert record.ended.stdout_bytes == record.ended.stderr_bytes == 0


async def test_program_is_looked_up_in_the_specs_path(launcher: Launcher, tmp_path: Path) -> None:
    """Not in the agent's; what may not be executed is passed over for what may."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    _program(first / "tool", b"#!/bin/sh\necho wrong\n", 0o644)
    _program(second / "tool", b"#!/bin/sh\necho right\n")
    _, stdout, _ = await run_to_end(launcher, make_spec("tool", env={"PATH": f"{first}:/nowhere:{second}"}))
    assert stdout == b"right\n"


async def test_a_thousand_variables(launcher: Launcher) -> None:
    """A large environment passes."""
    env = {f"NAME_{number}": "v" * 100 for number in range(1000)}
    ended, stdout, _ = await run_to_end(launcher, make_spec("env", env=env))
    assert (ended.exit_code, stdout.count(b"NAME_")) == (0, 1000)


async def test_lease_that_is_over_starts_nothing(launcher: Launcher, tmp_path: Path) -> None:
    """Checked right before the start; a lease inside its grace is as good as over."""
    for number, deadline_ns in enumerate((boottime_ns() - 1, boottime_ns() + 5_000_000_000), start=1):
        spec = make_spec("touch", str(tmp_path / "ran"), run_no=number, lease_grace_s=60)
        run = await launched(launcher, spec, deadline_ns)
        record = await run.wait()
        run.close()
        assert record.started is None
        assert record.ended is not None
        assert record.ended.ended_by is EndedBy.LEASE
    assert not (tmp_path / "ran").exists()
