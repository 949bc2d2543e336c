"""Every cause of the closed list, brought about for real: what it does to its task, by the table of causes.

A reader who wonders what follows from a cause finds its fault here. What has none yet stands in NOT_BUILT, with the
reason, and a test fails when that is no longer so.
"""

from __future__ import annotations

import ast
import asyncio
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import pytest

from control_plane.faults import Respond
from remotegpu_schemas.errors import Code
from remotegpu_schemas.states import CAUSE_RULES, Cause, Retry
from remotegpu_sidecar import record
from tests.end_to_end.fleet import Fleet, fleet
from tests.waiting import DEADLINE_S, until, until_so

REPOSITORY: Final = Path(__file__).resolve().parents[2]

IN_THE_TEST_BED: Final = {Cause.OUT_OF_MEMORY: "check_f28_out_of_memory"}
"""What needs limits that only a host with systemd gives: by its check in `tests/system/guest.py`."""

NOT_BUILT: Final = {
    Cause.GPU_OUT_OF_MEMORY: "nobody looks at GPUs yet",
    Cause.GPU_ERROR: "nobody looks at GPUs yet",
    Cause.GPU_FAULT: "nobody looks at GPUs yet",
    Cause.GPU_MEMORY_EXCEEDED: "nobody looks at GPUs yet",
    Cause.PREEMPTED: "the scheduler preempts nobody yet",
    Cause.DEPENDENCY_FAILED: "there are no groups yet",
}
"""Causes that no run of this version can end with."""


@dataclass
class Scene:
    """A plane, a host, and one claimed task whose first run meets its fault; whose second one, if any, succeeds."""

    all_of_it: Fleet
    directory: Path
    task_id: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def marker(self) -> Path:
        """There once the first run's process runs."""
        return self.directory / "marker"

    def task(self, fault: str) -> dict[str, Any]:
        """A task that meets `fault`, a line of shell, in its first run."""
        return {"script": f"[ -e {self.marker} ] && exit 0; touch {self.marker}; {fault}"}

    @property
    def process_id(self) -> int:
        """The main process of the first run."""
        return int(self.detail["process_id"])

    @property
    def shim(self) -> psutil.Process:
        """Its supervisor."""
        found = psutil.Process(self.process_id).parent()
        assert found is not None
        return found

    async def reboot(self, end: Callable[[], None]) -> None:
        """Let the host go down and come up: `end` takes down what runs; the agent finds another boot id."""
        host, shim = self.all_of_it.host, self.shim
        await host.kill()
        end()
        await until_so(lambda: not shim.is_running() or shim.status() == psutil.STATUS_ZOMBIE)
        boot_id = self.directory / "boot_id"
        boot_id.write_text("00000000-0000-4000-8000-000000000000\n")
        mount = f'mount --bind {boot_id} /proc/sys/kernel/random/boot_id && exec "$@"'
        host.launched_by = ["unshare", "--mount", "sh", "-c", mount, "sh"]
        await host.start()


Injection = Callable[[Scene], Awaitable[None]]
"""What happens once the first run's process runs."""


async def nothing(scene: Scene) -> None:
    """The task does it itself."""


async def refuse_renewals(scene: Scene, code: Code) -> None:
    """The plane says so at the next renewal."""
    body = b'{"code": %d, "message": "refused"}' % code
    scene.all_of_it.plane.faults.order_always("renew", Respond(200, body, {"Content-Type": "application/json"}))


async def lose_lease(scene: Scene) -> None:
    """Its lease is over, the plane says; this host is not to claim the task again."""
    await scene.all_of_it.host.post("/drain", {})
    await refuse_renewals(scene, Code.LEASE_EXPIRED)


async def supersede(scene: Scene) -> None:
    """Another attempt has the task, the plane says."""
    await refuse_renewals(scene, Code.ATTEMPT_MISMATCH)


async def cancel(scene: Scene) -> None:
    """An operator of the plane cancels it."""
    await scene.all_of_it.operator.call("POST", f"/tasks/{scene.task_id}/cancel")


async def stop_by_process_id(scene: Scene) -> None:
    """An operator of the host stops it."""
    await scene.all_of_it.host.post("/process/stop", {"process_id": scene.process_id})


async def cut_power(scene: Scene) -> None:
    """Everything is gone without a word."""

    def end() -> None:
        scene.shim.kill()
        os.kill(scene.process_id, signal.SIGKILL)

    await scene.reboot(end)


async def shut_down(scene: Scene) -> None:
    """The host's init tells every supervisor to stop; no agent is there any more."""
    path = next((scene.all_of_it.host.state_dir / "attempts").iterdir()) / "record"
    shim = scene.shim

    def end() -> None:
        shim.terminate()

    await scene.reboot(end)
    assert record.read(path)[0]["ended"]["ended_by"] == "stop"


async def kill_shim(scene: Scene) -> None:
    """The supervisor is gone."""
    scene.shim.kill()


async def make_directory(scene: Scene) -> None:
    """What the first launch lacked is there for the second."""
    await scene.all_of_it.host.until_shown(
        f"/tasks/{scene.task_id}", lambda task: bool(task["runs"]) and task["runs"][0]["state"] == "ended"
    )
    (scene.directory / "later").mkdir()


def fill_work(scene: Scene) -> None:
    """No directory can be made any more where tasks have theirs: a file system without a free inode."""
    work = scene.all_of_it.host.state_dir / "work"
    work.mkdir(mode=0o711)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=1", "tmpfs", str(work)], check=True)


async def make_room(scene: Scene) -> None:
    """The disk that was full for the first launch has room for the second."""
    await scene.all_of_it.host.until_shown(
        f"/tasks/{scene.task_id}", lambda task: bool(task["runs"]) and task["runs"][0]["state"] == "ended"
    )
    await asyncio.to_thread(
        subprocess.run, ["umount", "--lazy", str(scene.all_of_it.host.state_dir / "work")], check=True
    )


SLEEP: Final = "sleep 600"
INJECTIONS: Final[dict[Cause, tuple[str, Injection]]] = {
    Cause.SUCCEEDED: ("exit 0", nothing),
    Cause.EXIT_CODE: ("exit 7", nothing),
    Cause.SIGNAL: ("kill -SEGV $$", nothing),
    Cause.TIMED_OUT: (SLEEP, nothing),
    Cause.LEASE_LOST: (SLEEP, lose_lease),
    Cause.SUPERSEDED: (SLEEP, supersede),
    Cause.CANCELLED: (SLEEP, cancel),
    Cause.STOPPED: (SLEEP, stop_by_process_id),
    Cause.HOST_REBOOTED: (SLEEP, cut_power),
    Cause.HOST_SHUTDOWN: (SLEEP, shut_down),
    Cause.AGENT_LOST: (SLEEP, kill_shim),
    Cause.LAUNCH_FAILED: ("exit 0", make_directory),
    Cause.DISK_FULL: ("exit 0", make_room),
    Cause.POLICY_REFUSED: ("exit 9", nothing),
}
"""By cause: what the first run does, and what happens to it meanwhile."""

EXIT_CODES: Final = {Cause.EXIT_CODE: 7, Cause.SIGNAL: 128 + signal.SIGSEGV, Cause.LAUNCH_FAILED: 127}
"""Of these the process has its own say; of the others the table has."""

RETRIED: Final = [cause for cause in INJECTIONS if CAUSE_RULES[cause].retry is Retry.ASKED]


def keys_of(cause: Cause, scene: Scene) -> dict[str, Any]:
    """What a task needs besides its script to meet its fault."""
    match cause:
        case Cause.TIMED_OUT:
            return {"timeout": 0.5}
        case Cause.LAUNCH_FAILED:
            return {"workdir": str(scene.directory / "later")}
        case Cause.POLICY_REFUSED:
            return {"type": "container", "image": "scratch"}
        case _:
            return {}


async def meet(scene: Scene, cause: Cause, *, retries: int) -> None:
    """Let a task meet the fault, and wait for its end here."""
    fault, injection = INJECTIONS[cause]
    if cause is Cause.DISK_FULL:
        fill_work(scene)
    # All causes that can be asked for; the delay gives the test time to mend what a launch lacks.
    names = [rule.retry_on for rule in CAUSE_RULES.values() if rule.retry_on is not None]
    retry = {"max": retries, "delay": 1 if cause in {Cause.LAUNCH_FAILED, Cause.DISK_FULL} else 0, "on": names}
    task = {**scene.task(fault), "retry": retry, "renew_interval_sec": 0.1, **keys_of(cause, scene)}
    [scene.task_id] = await scene.all_of_it.submit(task)
    if fault == SLEEP and injection is not nothing:
        scene.detail = await scene.all_of_it.host.wait_running(scene.task_id)
        await until_so(scene.marker.exists)
        await scene.all_of_it.plane.faults.wait_calls("start", 1, DEADLINE_S)
    await injection(scene)
    await scene.all_of_it.host.until_shown(f"/tasks/{scene.task_id}", lambda _: True)
    scene.detail = await scene.all_of_it.host.wait_for(scene.task_id)


async def check_end(scene: Scene, cause: Cause) -> None:
    """The task has ended for this cause, here and at the plane, by the table."""
    rule, detail = CAUSE_RULES[cause], scene.detail
    exit_code = EXIT_CODES.get(cause, rule.fallback_exit_code)
    assert (detail["state"], detail["cause"], detail["exit_code"]) == (rule.final_state, cause, exit_code)
    assert bool(detail["error"]) == (cause is not Cause.SUCCEEDED)
    calls = scene.all_of_it.plane.faults.calls
    if not rule.is_reported:
        assert calls["complete"] == 0
        return
    if cause is Cause.LEASE_LOST:  # of no use as a result: the task may be claimed again
        await until(lambda: _is_given_up(scene))
        return
    [task] = await scene.all_of_it.ended([scene.task_id])
    result = task["result"]
    assert (task["status"], result["cause"], result["exit_code"]) == (rule.final_state, cause, exit_code)
    assert (result["error"], task["completions"]["accepted"]) == (detail["error"] or "", 1)


async def _is_given_up(scene: Scene) -> bool:
    return "given_up" in await scene.all_of_it.operator.events(scene.task_id)


@pytest.mark.parametrize("cause", INJECTIONS)
async def test_what_follows_from_a_cause(tmp_path: Path, cause: Cause) -> None:
    """With a retry to spend: whether a run that ended so is repeated, and whether that costs the retry."""
    if cause in {Cause.HOST_REBOOTED, Cause.HOST_SHUTDOWN, Cause.DISK_FULL} and os.geteuid() != 0:
        pytest.skip("only root can give an agent another boot id, or mount a file system that is full")
    async with fleet(tmp_path) as all_of_it:
        scene = Scene(all_of_it, tmp_path)
        await meet(scene, cause, retries=1)
        detail = scene.detail
        runs = [run["cause"] for run in detail["runs"]]
        match CAUSE_RULES[cause].retry:
            case Retry.ASKED:
                assert (runs, detail["state"], detail["retries_used"]) == ([cause, "succeeded"], "completed", 1)
            case Retry.FREE:
                assert (runs, detail["state"], detail["retries_used"]) == ([cause, "succeeded"], "completed", 0)
            case Retry.NEVER | Retry.ON_REBOOT:  # `on_reboot` is not supported by this version: as its default, fail
                assert (runs, detail["retries_used"]) == ([] if cause is Cause.POLICY_REFUSED else [cause], 0)
                await check_end(scene, cause)


@pytest.mark.parametrize("cause", RETRIED)
async def test_without_a_retry_left_it_is_the_end(tmp_path: Path, cause: Cause) -> None:
    """A cause that costs a retry ends the task of one that has none: state, exit code and report by the table."""
    if cause is Cause.DISK_FULL and os.geteuid() != 0:
        pytest.skip("only root can mount a file system that is full")
    async with fleet(tmp_path) as all_of_it:
        scene = Scene(all_of_it, tmp_path)
        await meet(scene, cause, retries=0)
        assert [run["cause"] for run in scene.detail["runs"]] == [cause]
        await check_end(scene, cause)


def test_every_cause_has_its_fault_or_a_reason() -> None:
    """The three lists are the closed list, and none of them overlap."""
    named = [*INJECTIONS, *IN_THE_TEST_BED, *NOT_BUILT]
    assert sorted(named) == sorted(Cause)


def test_what_is_left_to_the_test_bed_is_there() -> None:
    """Each of its checks exists, is in a set that is run, and looks for its cause."""
    tree = ast.parse((REPOSITORY / "tests" / "system" / "guest.py").read_text())
    checks = {node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    [sets] = [node for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SETS"]
    for cause, check in IN_THE_TEST_BED.items():
        assert f"'{cause}'" in checks[check]
        assert check in ast.unparse(sets)


def test_what_is_not_built_is_still_not_built() -> None:
    """Nothing but the tables names a cause of NOT_BUILT: once something does, it can be brought about here."""
    assert {cause: users for cause in NOT_BUILT if (users := sorted(_users_of(cause)))} == {}


_TABLES: Final = {"queue/remotegpu_queue/transitions.py", "queue/remotegpu_queue/breaker.py"}
"""What says what follows from a cause, and brings none about."""


def _users_of(cause: Cause) -> Iterator[str]:
    for package in ("agent", "queue", "sidecar"):
        for path in (REPOSITORY / package).rglob("*.py"):
            name = str(path.relative_to(REPOSITORY))
            if name not in _TABLES and f"Cause.{cause.name}" in path.read_text():
                yield name
