"""Where runs are put: the best that is possible, with what is lost in sentences; a run's group lives as long as it."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path

import pytest

from remotegpu_schemas.attempt import EndedBy, PlacementKind, ProcessIdentity, RunLimits
from remotegpu_schemas.errors import Misconfigured
from remotegpu_sidecar import cgroups, grouping, identity, placement
from remotegpu_sidecar.adoption import AdoptedState
from remotegpu_sidecar.grouping import CgroupPlacement
from remotegpu_sidecar.launcher import Launcher, LaunchError, Run
from remotegpu_sidecar.placement import NO_GROUPS, NO_SCOPES, choose
from tests.sidecar.support import (
    HAS_GROUPS,
    AgentProcess,
    identity_of,
    kill_if_alive,
    launched,
    make_spec,
    pid_from,
    sh,
    unique,
    until,
    until_file,
    wait_until_dead,
)

needs_groups = pytest.mark.skipif(not HAS_GROUPS, reason="no writable cgroup v2 here; the first tests say so")
in_groups = pytest.mark.parametrize("placement_kind", [PlacementKind.CGROUP], indirect=True)
IS_SYSTEMD = os.path.isdir("/run/systemd/system")


# --- what is chosen ---


async def test_best_possible_placement_is_chosen_here() -> None:
    """Control groups where a version 2 is writable and not systemd's; else process groups, with what is lost."""
    chosen = await choose()
    await chosen.close()
    if HAS_GROUPS:
        assert chosen.kind is PlacementKind.CGROUP
        assert not set(chosen.missing) & set(NO_GROUPS)
    elif not IS_SYSTEMD:
        assert chosen.kind is PlacementKind.PROCESS_GROUP
        assert "no control groups" in " ".join(chosen.missing)
        assert chosen.missing[-len(NO_GROUPS) :] == NO_GROUPS


async def test_without_writable_groups_there_are_process_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason comes first, then each loss; whoever insists on groups is refused with the reason."""
    monkeypatch.setattr(placement, "_is_systemd_booted", lambda: False)
    monkeypatch.setattr(grouping, "find", lambda: "/sys/fs/cgroup is not writable")
    chosen = await choose()
    assert chosen.kind is PlacementKind.PROCESS_GROUP
    assert "no control groups: /sys/fs/cgroup is not writable" in chosen.missing
    assert chosen.missing[-len(NO_GROUPS) :] == NO_GROUPS
    with pytest.raises(Misconfigured, match=r"tasks.placement: cgroup is not possible here.*not writable"):
        await choose(PlacementKind.CGROUP)
    with pytest.raises(Misconfigured, match=r"systemd is not possible here.*process 1 is not systemd"):
        await choose(PlacementKind.SYSTEMD)


async def test_groups_of_systemd_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where systemd runs and makes no scopes, runs get no groups behind its back."""

    async def refuse() -> str:
        return "systemd lets only root make scopes, and this is uid 1000"

    monkeypatch.setattr(placement, "_is_systemd_booted", lambda: True)
    monkeypatch.setattr(placement, "_find_scopes", refuse)
    chosen = await choose()
    assert chosen.kind is PlacementKind.PROCESS_GROUP
    assert any("only root" in each for each in chosen.missing)
    assert NO_SCOPES in chosen.missing
    with pytest.raises(Misconfigured, match="systemd owns the control groups"):
        await choose(PlacementKind.CGROUP)
    with pytest.raises(Misconfigured, match="only root"):
        await choose(PlacementKind.SYSTEMD)


async def test_unreachable_bus_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without D-Bus there are no scopes, in a sentence."""
    monkeypatch.setattr(placement, "_is_systemd_booted", lambda: True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none")
    with pytest.raises(Misconfigured, match="cannot be reached over D-Bus"):
        await choose(PlacementKind.SYSTEMD)


# --- where groups are ---

V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)


@pytest.mark.parametrize(
    ("mountinfo", "found"),
    [
        (V2, ("/sys/fs/cgroup", "/")),
        (HYBRID, ("/sys/fs/cgroup/unified", "/")),
        (V2.replace("0:26 / ", "0:26 /docker/abc "), ("/sys/fs/cgroup", "/docker/abc")),
        (V2.replace("/sys/fs/cgroup ", "/mnt/with\\040space "), ("/mnt/with space", "/")),
        (V2.replace(" rw,nosuid -", " rw,nosuid shared:9 master:3 -"), ("/sys/fs/cgroup", "/")),
        (HYBRID.replace("cgroup2", "cgroup"), None),
        ("", None),
    ],
)
def test_mount_is_found(mountinfo: str, found: tuple[str, str] | None) -> None:
    """Pure version 2, beside version 1, a part of it only, and none."""
    assert grouping.find_mount(mountinfo) == found


@pytest.mark.parametrize(
    ("root", "cgroup", "path"),
    [
        ("/", "0::/\n", "/mnt"),
        ("/", "4:memory:/x\n0::/user.slice/a\n", "/mnt/user.slice/a"),
        ("/docker/abc", "0::/docker/abc\n", "/mnt"),
        ("/docker/abc", "0::/docker/abc/d\n", "/mnt/d"),
        ("/docker/abc", "0::/docker/abcd\n", None),
        ("/docker/abc", "0::/\n", None),
        ("/", "0::/../other\n", None),
        ("/", "4:memory:/x\n", None),
    ],
)
def test_group_is_seen_below_the_mount(root: str, cgroup: str, path: str | None) -> None:
    """A group outside of what is mounted is not to be had."""
    assert grouping.below("/mnt", root, cgroup) == path


# --- limits ---


def fake_group(tmp_path: Path, controllers: str) -> Path:
    """A group as the kernel shows it, of plain files."""
    for leaf in (tmp_path, tmp_path / "task", tmp_path / "shim"):
        leaf.mkdir(exist_ok=True)
        for name in ("cgroup.procs", "cgroup.subtree_control", "memory.max", "cpu.max", "cpu.weight", "pids.max"):
            (leaf / name).touch()
    (tmp_path / "cgroup.controllers").write_text(controllers)
    return tmp_path


def test_limits_are_the_tasks_alone(tmp_path: Path) -> None:
    """They are written to the task's leaf; controllers that are not needed are left alone, as are missing files."""
    group = fake_group(tmp_path, "cpuset cpu io memory pids\n")
    run_limits = RunLimits(memory_bytes=1 << 20, swap_bytes=0, cpus=1.5, cpu_weight=50, tasks_max=9)
    grouping.divide(str(group), identity_of(os.getpid()), run_limits)
    assert (group / "shim" / "cgroup.procs").read_text() == str(os.getpid())
    assert (group / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    written = {
        name: (group / "task" / name).read_text() for name in ("memory.max", "cpu.max", "cpu.weight", "pids.max")
    }
    assert written == {"memory.max": "1048576", "cpu.max": "150000 100000", "cpu.weight": "50", "pids.max": "9"}
    assert (group / "shim" / "memory.max").read_text() == ""


def test_what_cannot_be_limited_is_not(tmp_path: Path) -> None:
    """Without controllers the run is divided all the same; `missing` has said so."""
    group = fake_group(tmp_path, "hugetlb\n")
    grouping.divide(str(group), identity_of(os.getpid()), RunLimits(memory_bytes=1 << 20, tasks_max=9))
    assert (group / "cgroup.subtree_control").read_text() == ""
    assert (group / "task" / "memory.max").read_text() == ""


def test_every_limit_has_its_file() -> None:
    """Nothing that the schema names is dropped in silence."""
    run_limits = RunLimits(
        memory_bytes=1, swap_bytes=2, cpus=0.001, cpu_weight=3, io_weight=4, allowed_cpus="0-3,8", tasks_max=5
    )
    assert None not in run_limits.model_dump().values()
    files = [f"{name}={value}" for files in grouping.limit_files(run_limits).values() for name, value in files.items()]
    assert sorted(files) == [
        "cpu.max=1000 100000",
        "cpu.weight=3",
        "cpuset.cpus=0-3,8",
        "io.weight=default 4",
        "memory.max=1",
        "memory.swap.max=2",
        "pids.max=5",
    ]


# --- the life of a run's group ---


def group_of(run: Run) -> str:
    """Where this run's group is, if it is there."""
    found = grouping.find()
    assert not isinstance(found, str)
    return found.group_of(run.directory.name)


@needs_groups
@in_groups
async def test_shim_and_task_are_in_their_leaves(launcher: Launcher, tmp_path: Path) -> None:
    """Daemons too; when the run has ended nothing of the group is left."""
    run = await launched(
        launcher, make_spec(*sh(f"(setsid sh -c 'echo $$ >{tmp_path}/pid; sleep 1000' &); sleep 1000"))
    )
    assert run.started is not None
    daemon = await pid_from(tmp_path / "pid")
    group = group_of(run)
    assert grouping.group_of_process(run.shim.pid) == f"{group}/shim"
    assert grouping.group_of_process(run.started.process.pid) == f"{group}/task"
    assert grouping.group_of_process(daemon.pid) == f"{group}/task"
    run.kill()
    record = await run.wait()
    run.close()
    assert record.cgroup == group
    assert not os.path.exists(group)


@needs_groups
@in_groups
async def test_group_is_left_before_rights_are_dropped(launcher: Launcher, tmp_path: Path) -> None:
    """A task that runs as another user is in its leaf, and may not leave it."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    script = (
        f"grep '^0::.*/task$' /proc/self/cgroup || exit 1; sh -c 'echo 0 >{cgroups_root()}/cgroup.procs' && exit 2; "
    )
    user = {"name": "nobody", "uid": 65534, "gid": 65534}
    run = await launched(launcher, make_spec(*sh(f"{script} exit 0"), user=user))
    record = await run.wait()
    run.close()
    assert record.ended is not None
    assert record.ended.exit_code == 0


def cgroups_root() -> str:
    """Where version 2 is mounted."""
    mount = grouping.find_mount(cgroups.read("/proc/self/mountinfo"))
    assert mount is not None
    return mount[0]


@needs_groups
@in_groups
async def test_run_is_not_over_while_somebody_is_in_its_group(launcher: Launcher) -> None:
    """Who was put there from outside ends with the run: an empty group is part of the proof."""
    run = await launched(launcher, make_spec("sleep", "1000"))
    guest = await asyncio.create_subprocess_exec("sleep", "1000")
    cgroups.write(f"{group_of(run)}/{cgroups.TASK}/cgroup.procs", str(guest.pid))
    run.kill()
    record = await run.wait()
    assert await guest.wait() == -signal.SIGKILL
    run.close()
    assert record.ended is not None
    assert record.ended.ended_by is EndedBy.STOP


@needs_groups
@in_groups
async def test_f09_hidden_process_of_a_lost_shim_is_found(launcher: Launcher, tmp_path: Path) -> None:
    """F09: no environment, another session, no parent: the group tells whose it is."""
    hidden = f"(env -i /usr/bin/setsid /bin/sh -c 'echo $$ >{tmp_path}/pid; exec /bin/sleep 1000' &)"
    run = await launched(launcher, make_spec(*sh(f"{hidden}; sleep 1000")))
    daemon = await pid_from(tmp_path / "pid")
    group = group_of(run)
    os.kill(run.shim.pid, signal.SIGKILL)
    record = await run.wait()
    run.close()
    assert record.ended is None
    assert not identity.is_alive(daemon)
    assert not os.path.exists(group)


@needs_groups
async def test_f09_hidden_process_is_found_by_the_next_agent(attempts_dir: Path, tmp_path: Path) -> None:
    """F09: the record names the group, so that it matters not which agent looks, nor what it chose for its own runs."""
    hidden = f"(env -i /usr/bin/setsid /bin/sh -c 'echo $$ >{tmp_path}/pid; exec /bin/sleep 1000' &)"
    spec = make_spec(*sh(f"{hidden}; sleep 1000"))
    with AgentProcess(attempts_dir, (spec, None), placement=PlacementKind.CGROUP) as agent:
        daemon = await pid_from(tmp_path / "pid")
        main = identity_of(agent.task_pids[0])
        agent.kill()
    kill_if_alive(identity_of(identity_parent(main)))
    wait_until_dead(main)
    [lost] = await Launcher(attempts_dir).adopt()
    assert (lost.state, lost.left_pids) == (AdoptedState.LOST, ())
    assert not identity.is_alive(daemon)
    assert lost.record is not None
    assert lost.record.cgroup is not None
    assert not os.path.exists(lost.record.cgroup)


def identity_parent(who: ProcessIdentity) -> int:
    """The pid of a living process's parent."""
    stat = identity.stat_of(who.pid)
    assert stat is not None
    return stat.ppid


@needs_groups
async def test_groups_of_runs_that_ended_or_never_began_are_removed(attempts_dir: Path, tmp_path: Path) -> None:
    """The agent was killed before it could: the next one does it."""
    os.mkfifo(tmp_path / "fifo")
    ending = make_spec(*sh(f"read line <{tmp_path}/fifo"), attempt="ending")
    waiting = make_spec("true", attempt="waiting")
    with AgentProcess(attempts_dir, (ending, None), placement=PlacementKind.CGROUP) as agent:
        main = identity_of(agent.task_pids[0])
        agent.kill()
    with AgentProcess(attempts_dir, (waiting, None), placement=PlacementKind.CGROUP, is_placed_before=True) as agent:
        shim = identity_of(agent.task_pids[0])
        agent.kill()
    parent = identity_of(identity_parent(main))
    (tmp_path / "fifo").write_text("go\n")
    wait_until_dead(parent)
    wait_until_dead(shim)
    chosen = await choose(PlacementKind.CGROUP)
    groups = [chosen.group_of(f"{unique(name)}.1") for name in ("ending", "waiting")]
    assert all(group is not None and os.path.exists(group) for group in groups)
    states = [each.state for each in await Launcher(attempts_dir, chosen).adopt()]
    assert states == [AdoptedState.ENDED, AdoptedState.ENDED]
    assert not any(group is not None and os.path.exists(group) for group in groups)


@needs_groups
async def test_refused_group_starts_nothing(attempts_dir: Path, tmp_path: Path) -> None:
    """A group that cannot be made is a launch that has failed, never a run in another place."""

    class Refusing(CgroupPlacement):
        async def start(self) -> None:
            """Leave the folder out."""

    refusing = Refusing(str(tmp_path / "no-such"))
    launcher = Launcher(attempts_dir, refusing)
    await launcher.start()
    with pytest.raises(LaunchError, match="refused its place") as caught:
        await launched(launcher, make_spec("touch", str(tmp_path / "ran")))
    assert caught.value.errno == errno.ENOENT
    await launcher.stop()
    assert not (tmp_path / "ran").exists()


@needs_groups
@in_groups
async def test_suspended_run_is_frozen_by_its_group(launcher: Launcher, tmp_path: Path) -> None:
    """The kernel stops the whole leaf; no signal is spent, so that job control inside the task stays as it was."""
    run = await launched(launcher, make_spec(*sh(f"echo up >{tmp_path}/up; while :; do :; done")))
    await until_file(tmp_path / "up")
    events = Path(f"{group_of(run)}/{cgroups.TASK}/cgroup.events")
    assert run.started is not None
    run.suspend()
    await until(lambda: "frozen 1" in events.read_text(), "the leaf to be frozen")
    stat = identity.stat_of(run.started.process.pid)
    assert stat is not None
    assert stat.state != "T"
    run.resume()
    await until(lambda: "frozen 0" in events.read_text(), "the leaf to go on")
    run.suspend()
    await until(lambda: "frozen 1" in events.read_text(), "the leaf to be frozen again")
    run.stop()
    record = await run.wait()
    run.close()
    assert record.ended is not None
    assert record.ended.signal == signal.SIGTERM
