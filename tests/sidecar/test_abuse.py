"""Random and hostile process trees: whatever a task does, nothing of it is left, and its end is on record, once."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remotegpu_queue.transitions import outcome_of
from remotegpu_schemas.attempt import EndedBy, PlacementKind, RunEnded
from remotegpu_schemas.states import Cause
from remotegpu_sidecar import record, tree
from remotegpu_sidecar.identity import boottime_ns
from remotegpu_sidecar.launcher import Launcher, Run
from remotegpu_sidecar.placement import choose
from tests.scale import scaled
from tests.sidecar.support import HAS_GROUPS, launched, make_spec, python, until

# Grows the tree that is its first argument. Each node writes a byte when it is there, then does what it is told.
_TREE = """
import json, os, signal, sys, time
sys_log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

def live(node):
    for number in node["ignores"]:
        signal.signal(number, signal.SIG_IGN)
    if node["forks_when_told"]:
        signal.signal(signal.SIGTERM, fork_more)
    if node["closes_output"]:
        os.closerange(1, 3)
    for child in node["children"]:
        grow(child)
    os.write(sys_log, b"x")
    if node["then"] == "exit":
        os._exit(node["code"])
    if node["then"] == "loud":
        while True:
            try:
                os.write(1, b"x" * 65536)
            except OSError:
                break
    while node["then"] == "spin":
        pass
    while True:
        time.sleep(1000)

def fork_more(*_):
    for _ in range(5):
        if os.fork() == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(1000)

def grow(node):
    if os.fork():
        return
    if node["how"] != "fork":
        os.setsid()
    if node["how"] == "daemon" and os.fork():
        os._exit(0)
    try:
        live(node)
    finally:
        os._exit(9)

live(json.loads(sys.argv[1]))
"""

_OWN = {
    "how": st.sampled_from(["fork", "setsid", "daemon"]),
    "ignores": st.lists(st.sampled_from([1, 2, 15]), max_size=2, unique=True),
    "forks_when_told": st.booleans(),
    "closes_output": st.booleans(),
    "then": st.sampled_from(["sleep", "sleep", "exit", "spin", "loud"]),
    "code": st.integers(0, 255),
}
_LEAVES = st.fixed_dictionaries({**_OWN, "children": st.just([])})
TREES = st.recursive(
    _LEAVES, lambda inner: st.fixed_dictionaries({**_OWN, "children": st.lists(inner, max_size=3)}), max_leaves=8
)
ENDS = ("stop", "kill", "lease", "timeout", "nothing")
PLACEMENTS = [PlacementKind.PROCESS_GROUP, *([PlacementKind.CGROUP] if HAS_GROUPS else [])]


def left_of(attempt_id: str) -> list[int]:
    """Who on this host was started for the attempt, by its environment, and is not dead."""
    wanted = f"REMOTEGPU_ATTEMPT_ID={attempt_id}\0".encode()
    found = []
    for stat in tree.all_processes():
        try:
            environ = Path(f"/proc/{stat.pid}/environ").read_bytes()
        except OSError:
            continue
        if wanted in environ and not stat.is_dead:
            found.append(stat.pid)
    return found


def ended_once(run: Run) -> RunEnded:
    """The end on record, of which there is one."""
    content = (run.directory / record.FILE_NAME).read_bytes()
    assert content.count(b'"kind":"ended"') == 1
    return RunEnded.model_validate(record.parse(content)[0]["ended"])


async def live_and_die(folder: Path, node: dict[str, Any], end: str, after: int, placement: PlacementKind) -> RunEnded:
    """Grow a tree; once so many of its nodes are there, end it in this way; return what is on record."""
    launcher = Launcher(folder / "attempts", await choose(placement))
    await launcher.start()
    log = folder / "log"
    log.touch()
    limits: dict[str, Any] = {"timeout_s": 0.05} if end == "timeout" else {}
    spec = make_spec(
        *python(_TREE), json.dumps(node), str(log), attempt=f"tree-{uuid.uuid4()}", grace_period_s=0.1, **limits
    )
    run: Run | None = None
    try:
        run = await launched(launcher, spec, boottime_ns() + 10**12 if end == "lease" else None)
        waiting = asyncio.ensure_future(run.wait())
        await until(lambda: log.stat().st_size >= after or waiting.done(), "the tree to grow")
        match end:
            case "stop":
                run.stop()
            case "kill" | "nothing":
                run.kill()
            case "lease":
                run.extend(boottime_ns())
            case _:
                pass
        result = await waiting
        run.close()
        assert left_of(spec.attempt_id) == []
        assert result.ended == ended_once(run)
        return ended_once(run)
    finally:
        if run is not None:
            run.kill()  # if the test failed
        await launcher.stop()


def _count(node: dict[str, Any]) -> int:
    return 1 + sum(map(_count, node["children"]))


@pytest.mark.timeout(scaled(120, 900))
@settings(max_examples=scaled(25, 200), deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
@given(node=TREES, end=st.sampled_from(ENDS), share=st.integers(0, 4), placement=st.sampled_from(PLACEMENTS))
def test_f30_random_trees_leave_nothing(node: dict[str, Any], end: str, share: int, placement: PlacementKind) -> None:
    """F30: forks, daemons, sessions, deaf and loud ones, ended at any moment: all gone, one end, one cause."""
    with tempfile.TemporaryDirectory(prefix="remotegpu-abuse-") as folder:
        ended = asyncio.run(live_and_die(Path(folder), node, end, _count(node) * share // 4, placement))
    asked_for = {"stop": EndedBy.STOP, "kill": EndedBy.STOP, "nothing": EndedBy.STOP}
    asked_for |= {"lease": EndedBy.LEASE, "timeout": EndedBy.TIMEOUT}
    assert ended.ended_by in {EndedBy.EXIT, asked_for[end]}
    if ended.ended_by is EndedBy.EXIT:
        assert node["then"] == "exit" or ended.signal is not None or ended.exit_code == 9
    outcome = outcome_of(ended, Cause.CANCELLED)
    causes = {EndedBy.STOP: Cause.CANCELLED, EndedBy.LEASE: Cause.LEASE_LOST, EndedBy.TIMEOUT: Cause.TIMED_OUT}
    natural = Cause.SUCCEEDED if ended.exit_code == 0 else Cause.EXIT_CODE if ended.signal is None else Cause.SIGNAL
    assert outcome.cause is causes.get(ended.ended_by, natural)


# Bounded, since nothing here limits the number of processes: who is born of it forks no more until it is told to go.
_DYING = """
import os, signal, sys, time
def again(*_):
    for _ in range(3):
        if os.fork() == 0:
            rest()
def rest():
    os.setsid()
    signal.signal(signal.SIGTERM, again)
    while True:
        time.sleep(1000)
signal.signal(signal.SIGTERM, again)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for _ in range(10):
    if os.fork() == 0:
        os.setsid()
        break
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(log, b"x")
for _ in range({forks}):
    time.sleep(0.02)
    if os.fork() == 0:
        if os.fork():
            os._exit(0)
        rest()
while True:
    time.sleep(1000)
"""


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("forks", [0, 100])
async def test_f30_families_that_fork_while_they_die(tmp_path: Path, placement: PlacementKind, forks: int) -> None:
    """F30: at SIGTERM each forks three that do the same; some fork besides. SIGKILL ends all of them."""
    launcher = Launcher(tmp_path / "attempts", await choose(placement))
    await launcher.start()
    try:
        script = _DYING.replace("{forks}", str(forks))
        spec = make_spec(*python(script), str(tmp_path / "up"), attempt="dying", grace_period_s=0.3)
        run = await launched(launcher, spec)
        await until(lambda: (tmp_path / "up").exists() and (tmp_path / "up").stat().st_size >= 11, "the family")
        run.stop()
        result = await run.wait()
        run.close()
        assert left_of(spec.attempt_id) == []
        assert result.ended is not None
        assert result.ended.ended_by is EndedBy.STOP
        assert result.ended.stragglers_killed >= 20
    finally:
        await launcher.stop()


@pytest.mark.parametrize("is_over", [False, True])
async def test_f31_everything_at_the_same_moment(tmp_path: Path, is_over: bool) -> None:
    """F31: with the shim frozen, timeout, lease, stop and kill all come due, and the task may end: one outcome."""
    launcher = Launcher(tmp_path / "attempts")
    await launcher.start()
    try:
        os.mkfifo(tmp_path / "fifo")
        spec = make_spec("sh", "-c", f"read line <{tmp_path}/fifo; exit 5", attempt="race", timeout_s=1.5)
        lease_ends_ns = boottime_ns() + 2 * 10**9
        run = await launched(launcher, spec, lease_ends_ns)
        assert run.started is not None
        main = run.started.process
        os.kill(run.shim.pid, 19)
        if is_over:
            (tmp_path / "fifo").write_text("go\n")
            await until(lambda: any(stat.pid == main.pid and stat.is_dead for stat in tree.all_processes()), "its end")
        await until(lambda: boottime_ns() > lease_ends_ns, "the timeout and the lease to be over")
        run.stop()
        run.kill()
        run.extend(boottime_ns() - 1)
        os.kill(run.shim.pid, 18)
        result = await run.wait()
        run.close()
        assert result.ended == ended_once(run)
        assert result.ended is not None
        wanted = (EndedBy.EXIT, 5) if is_over else (EndedBy.STOP, None)
        assert (result.ended.ended_by, result.ended.exit_code) == wanted
    finally:
        await launcher.stop()
