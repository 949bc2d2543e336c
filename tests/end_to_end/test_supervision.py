"""What the supervisor does: with a frozen agent, a spawner without descriptors or with too many, a warned task."""

from __future__ import annotations

import ast
import os
import resource
import signal
import sys
from pathlib import Path

from remotegpu_sidecar import identity, record
from tests.end_to_end.agent_process import AgentProcess, agent
from tests.end_to_end.fleet import fleet
from tests.waiting import until_so


async def test_f10_an_agent_that_is_frozen_past_a_lease(tmp_path: Path) -> None:
    """F10: the shim kills at the deadline; thawed, the agent reports `lease_lost`, and the task runs once more."""
    marker = tmp_path / "again"
    script = f"[ -e {marker} ] && exit 0; trap '' TERM; touch {marker}; while :; do sleep 0.05; done"
    async with fleet(tmp_path, {"lease": {"renew_interval": 0.5, "margin": 0.2}}, lease_ttl_s=3.0) as both:
        [task_id] = await both.submit({"script": script, "grace_period_sec": 0.3})
        detail = await both.host.wait_running(task_id)
        await until_so(marker.exists)
        os.kill(both.host.pid, signal.SIGSTOP)
        try:
            path = next((both.host.state_dir / "attempts").iterdir())
            await until_so(lambda: "ended" in record.read(path / "record")[0])
            deadline_ns = int.from_bytes((path / "deadline").read_bytes(), "little")
            assert identity.boottime_ns() < deadline_ns + 10**9
            ended = record.read(path / "record")[0]["ended"]
            assert (ended["ended_by"], ended["signal"]) == ("lease", signal.SIGKILL)
            assert identity.stat_of(detail["process_id"]) is None
        finally:
            os.kill(both.host.pid, signal.SIGCONT)
        detail = await both.host.until_shown(
            f"/tasks/{task_id}", lambda task: len(task["runs"]) == 2 and task["state"] == "completed"
        )
        assert [run["cause"] for run in detail["runs"]] == ["lease_lost", "succeeded"]
        [task] = await both.ended([task_id])
        assert (task["status"], task["completions"]["accepted"]) == ("completed", 1)
        # That is what a completion with `lease_lost` does there: the attempt is ended, and is no result.
        assert [event["kind"] for event in task["events"]].count("given_up") == 1


async def test_f27_a_spawner_without_descriptors(tmp_path: Path) -> None:
    """F27: the run is `launch_failed` with EMFILE and repeated; the agent lives, and the task succeeds when it can."""
    async with agent(tmp_path) as host:
        await host.wait_for(await host.submit(command="true"))
        spawner = await host.spawner()
        before = resource.prlimit(spawner.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(spawner.pid, resource.RLIMIT_NOFILE, (spawner.num_fds() + 3, before[1]))
        task_id = await host.submit(command="echo done", retry={"max": 1000, "delay": 0.1})
        failed = await host.until_shown(f"/tasks/{task_id}", lambda task: task["retries_used"] >= 2)
        assert {run["cause"] for run in failed["runs"][:2]} == {"launch_failed"}
        assert "open files" in failed["runs"][0]["error"].lower()
        resource.prlimit(spawner.pid, resource.RLIMIT_NOFILE, before)
        assert (await host.wait_for(task_id))["state"] == "completed"
        assert await host.output(task_id) == "done\n"


async def test_what_the_agent_inherits_reaches_no_task(tmp_path: Path) -> None:
    """An agent that was started with an open file keeps it to itself: a task has its three streams, and no more."""
    secret = tmp_path / "secret"
    secret.touch()
    listing = (
        "import os; fds = map(int, os.listdir('/proc/self/fd'));"  # the listing's own is closed by the time it is read
        " print({fd: os.readlink(f'/proc/self/fd/{fd}') for fd in fds if os.path.lexists(f'/proc/self/fd/{fd}')})"
    )
    host = AgentProcess(tmp_path, {})
    host.launched_by = ["sh", "-c", 'exec 9<"$0"; exec "$@"', str(secret)]
    async with host:
        assert os.readlink(f"/proc/{host.pid}/fd/9") == str(secret)
        task_id = await host.submit(command=sys.executable, args=["-I", "-S", "-c", listing])
        assert (await host.wait_for(task_id))["state"] == "completed"
        listed = await host.output(task_id)
        assert set(ast.literal_eval(listed)) == {0, 1, 2}, listed


async def test_a_task_is_warned_before_its_timeout(tmp_path: Path) -> None:
    """`warn` of the task file: its signal comes so long before the timeout, and the cause stays the timeout."""
    script = "trap 'echo warned' USR1; trap 'echo bye; exit 0' TERM; while :; do sleep 0.02; done"
    async with agent(tmp_path) as host:
        task_id = await host.submit(script=script, timeout=2, warn={"signal": "SIGUSR1", "before": "1s"})
        detail = await host.wait_for(task_id)
        assert (detail["cause"], detail["exit_code"]) == ("timed_out", 124)
        assert await host.output(task_id) == "warned\nbye\n"
        assert detail["task"]["warn"] == {"before_s": 1.0}
