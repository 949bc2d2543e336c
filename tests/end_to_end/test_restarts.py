"""What survives what, with real processes and real signals (faults.md)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.agent_process import AgentProcess, agent
from tests.end_to_end.gates import Gate
from tests.waiting import DEADLINE_S, until_so


def is_gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def test_f04_a_running_task_survives_a_killed_agent(tmp_path: Path) -> None:
    """F04: the task goes on under SIGKILL of the agent, is adopted, its output is whole, its exit status is right."""
    gate = Gate(tmp_path / "gate")
    async with agent(tmp_path) as host:
        task_id = await host.submit(script=f"echo before; {gate.wait}; echo meanwhile; echo after; exit 3")
        pid = (await host.wait_running(task_id))["process_id"]
        await host.kill()
        gate.open()
        await until_so(lambda: is_gone(pid))
        await host.start()
        detail = await host.wait_for(task_id)
        assert (detail["state"], detail["cause"], detail["exit_code"]) == ("failed", "exit_code", 3)
        assert await host.output(task_id) == "before\nmeanwhile\nafter\n"
        assert len(detail["runs"]) == 1


async def test_f04_an_adopted_task_can_be_followed_and_stopped(tmp_path: Path) -> None:
    """A run that another agent process started has the same identity, obeys a cancel, and its end is seen."""
    async with agent(tmp_path) as host:
        task_id = await host.submit(script="echo up; sleep 60")
        before = await host.wait_running(task_id)
        await host.kill()
        await host.start()
        after = await host.get(f"/tasks/{task_id}")
        assert (after["state"], after["process_id"]) == ("running", before["process_id"])
        await host.post(f"/tasks/{task_id}/cancel")
        assert (await host.wait_for(task_id))["cause"] == "cancelled"
        await until_so(lambda: is_gone(before["process_id"]))


async def test_f05_an_end_that_the_agent_did_not_see_is_stored_after_the_restart(tmp_path: Path) -> None:
    """F05: the agent is frozen while the task ends, and killed before it can store anything."""
    gate = Gate(tmp_path / "gate")
    async with agent(tmp_path) as host:
        task_id = await host.submit(script=f"{gate.wait}; exit 4")
        pid = (await host.wait_running(task_id))["process_id"]
        host.freeze()
        gate.open()
        record = next((host.state_dir / "attempts").iterdir()) / "record"
        await until_so(lambda: is_gone(pid) and b'"kind":"ended"' in record.read_bytes())
        await host.kill()
        await host.start()
        detail = await host.wait_for(task_id)
        assert (detail["cause"], detail["exit_code"], len(detail["runs"])) == ("exit_code", 4, 1)


async def test_f08_a_killed_spawner_is_replaced(tmp_path: Path) -> None:
    """F08: a new spawner is made for the next task; the running one is untouched."""
    async with agent(tmp_path, capacity={"max_concurrent": 2}) as host:
        running = await host.submit(command="sleep 60")
        before = await host.wait_running(running)
        spawner = await host.spawner()
        spawner.kill()
        assert (await host.wait_for(await host.submit(command="true")))["state"] == "completed"
        assert (await host.get(f"/tasks/{running}"))["process_id"] == before["process_id"]
        await host.post(f"/tasks/{running}/cancel")
        await host.wait_for(running)


async def test_f08_a_spawner_killed_in_the_middle_of_a_launch(tmp_path: Path) -> None:
    """F08: a new spawner makes the launch that the old one had not begun, in the same run; the other task is whole."""
    gate, trace = Gate(tmp_path / "gate"), tmp_path / "trace"
    async with agent(tmp_path, capacity={"max_concurrent": 2}) as host:
        running = await host.submit(command=f"echo before; {gate.wait}; echo after; exit 6")
        await host.wait_running(running)
        spawner = await host.spawner()
        spawner.suspend()
        launched = await host.submit(command=f"echo x >>{trace}")
        await until_so(lambda: len(list((host.state_dir / "attempts").glob("*.1/record"))) == 2)
        spawner.kill()
        detail = await host.wait_for(launched)
        assert (detail["cause"], len(detail["runs"]), trace.read_text()) == ("succeeded", 1, "x\n")
        gate.open()
        detail = await host.wait_for(running)
        assert (detail["exit_code"], len(detail["runs"])) == (6, 1)
        assert await host.output(running) == "before\nafter\n"


@pytest.mark.parametrize("is_agent_alive", [True, False])
async def test_f09_what_a_lost_run_held_is_free_once_its_tree_is_gone(tmp_path: Path, is_agent_alive: bool) -> None:
    """F09: the only slot and all memory go to the next task, and by then nothing of the lost tree is alive."""
    pids, marker, deaf = tmp_path / "pids", tmp_path / "again", tmp_path / "deaf"
    deaf.write_text(f"trap '' TERM HUP; echo $$ >>{pids}; while :; do sleep 1; done")
    lost = f"[ -e {marker} ] && exit 0; touch {marker}; setsid sh {deaf} & (setsid sh {deaf} &) ; . {deaf}"
    # Who is dead and waits to be buried by init has gone, too.
    look = f"for pid in $(cat {pids}); do grep -q '^State:.[^ZX]' /proc/$pid/status 2>/dev/null && exit 1; done; exit 0"
    whole = {"memory_gb": 1}
    async with agent(tmp_path, capacity={"max_concurrent": 1, "memory_gb": 1}) as host:
        task_id = await host.submit(command=lost, resources=whole, priority=9)
        process_id = (await host.wait_running(task_id))["process_id"]
        await until_so(lambda: pids.exists() and len(pids.read_text().split()) == 3)
        shim = psutil.Process(process_id).parent()
        assert shim is not None
        waiting = await host.submit(command=look, resources=whole, priority=1)
        if not is_agent_alive:
            await host.kill()
        shim.kill()
        if not is_agent_alive:
            await until_so(lambda: is_gone(process_id))  # with its shim, without any agent
            await host.start()
        assert (await host.wait_for(waiting))["cause"] == "succeeded"
        detail = await host.wait_for(task_id)
        assert [run["cause"] for run in detail["runs"]] == ["agent_lost", "succeeded"]
        capacity = (await host.get("/queue/status"))["capacity"]
        assert (capacity["slots_used"], capacity["memory_mb_used"]) == (0, 0)


@pytest.mark.parametrize("is_agent_alive", [True, False])
async def test_f09_a_killed_shim_takes_its_tree_along(tmp_path: Path, is_agent_alive: bool) -> None:
    """F09: the whole tree is stopped, the run is `agent_lost`, and the task runs again at no cost to its retries."""
    marker = tmp_path / "again"
    script = f"[ -e {marker} ] && exit 0; setsid sleep 60 & sleep 60"
    async with agent(tmp_path) as host:
        task_id = await host.submit(script=script)
        pid = (await host.wait_running(task_id))["process_id"]
        await until_so(lambda: len(psutil.Process(pid).children(recursive=True)) == 2)
        tree = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        shim = psutil.Process(pid).parent()
        assert shim is not None
        marker.touch()
        if not is_agent_alive:
            await host.kill()
        shim.kill()
        if not is_agent_alive:
            await host.start()
        detail = await host.wait_for(task_id)
        assert [run["cause"] for run in detail["runs"]] == ["agent_lost", "succeeded"]
        assert (detail["state"], detail["retries_used"]) == ("completed", 0)
        await until_so(lambda: all(is_gone(each) for each in tree))


@pytest.mark.parametrize("is_shim_alive", [True, False])
async def test_f09_a_run_whose_directory_was_removed_is_cleared_away(tmp_path: Path, *, is_shim_alive: bool) -> None:
    """F09: while no agent was there. The next one ends its whole tree before the task runs again."""
    async with agent(tmp_path) as host:
        task_id = await host.submit(command=f"(setsid sh -c 'echo $$ >>{tmp_path}/pids; sleep 1000' &); sleep 1000")
        main = (await host.wait_running(task_id))["process_id"]
        await until_so(lambda: (tmp_path / "pids").exists() and bool((tmp_path / "pids").read_text()))
        daemon = int((tmp_path / "pids").read_text())
        shim = psutil.Process(main).ppid()
        await host.kill()
        [directory] = (host.state_dir / "attempts").iterdir()
        directory.rename(tmp_path / "gone")
        if not is_shim_alive:
            os.kill(shim, signal.SIGKILL)
        await host.start()
        await host.until_shown(f"/tasks/{task_id}", lambda task: task["run_no"] == 2 and task["process_id"] is not None)
        assert [pid for pid in (main, daemon) if not is_gone(pid)] == []
        await until_so(lambda: is_gone(shim))
        await host.post(f"/tasks/{task_id}/cancel")
        await host.wait_for(task_id)


async def test_f09_a_run_whose_record_cannot_be_read_can_be_cancelled(tmp_path: Path) -> None:
    """F09: its shim is lost as well; what is found of it is left alone until somebody asks for its end."""
    async with agent(tmp_path) as host:
        task_id = await host.submit(command="(setsid sleep 1000 &); sleep 1000; true")
        main = (await host.wait_running(task_id))["process_id"]
        shim = psutil.Process(main).parent()
        assert shim is not None
        await until_so(lambda: len(shim.children(recursive=True)) == 3)
        tree = [each.pid for each in shim.children(recursive=True)]
        await host.kill()
        [directory] = (host.state_dir / "attempts").iterdir()
        (directory / "record").write_bytes(b"damaged\n")
        shim.kill()
        await host.start()
        await host.post(f"/tasks/{task_id}/cancel")
        assert (await host.wait_for(task_id))["state"] == "cancelled"
        assert [pid for pid in tree if not is_gone(pid)] == []


async def test_f36_a_second_agent_is_refused(tmp_path: Path) -> None:
    """F36: one clear line, exit code 2, and the first one serves on."""
    async with agent(tmp_path) as host:
        second = await asyncio.to_thread(
            subprocess.run, host.command("run"), capture_output=True, text=True, timeout=DEADLINE_S, check=False
        )
        assert second.returncode == 2
        assert second.stderr.splitlines()[-1].endswith("stop it, or set another agent.state_dir")
        assert "Traceback" not in second.stderr
        assert (await host.get("/ping"))["state"] == "ready"


async def test_f37_sigterm_leaves_tasks_running(tmp_path: Path) -> None:
    """F37: the agent ends with 0 and its socket goes; the task goes on and is adopted."""
    async with agent(tmp_path) as host:
        task_id = await host.submit(command="sleep 60")
        pid = (await host.wait_running(task_id))["process_id"]
        assert await host.stop() == 0
        assert not host.socket.exists()
        assert not is_gone(pid)
        await host.start()
        assert (await host.get(f"/tasks/{task_id}"))["process_id"] == pid
        await host.post(f"/tasks/{task_id}/cancel")
        await host.wait_for(task_id)


async def test_f07_ten_kills_while_forty_tasks_run(tmp_path: Path) -> None:
    """F07, in small: after kills at arbitrary moments every result is right and no task ran twice."""
    async with agent(tmp_path, capacity={"max_concurrent": 4}) as host:
        trace = tmp_path / "trace"
        trace.mkdir()
        documents = [
            f'{{"task": {{"id": "t-{number}", "command": "echo x >>{trace}/{number}; sleep 0.02; exit {number % 3}"}}}}'
            for number in range(40)
        ]
        await host.post("/tasks", "\n---\n".join(documents))
        for round_no in range(10):
            await _some_progress(host, round_no)
            await host.kill()
            await host.start()
        for number in range(40):
            detail = await host.wait_for(f"t-{number}")
            assert detail["exit_code"] == number % 3, detail
            # A run that was written down and never started costs nothing; one that started is never repeated.
            started = [run for run in detail["runs"] if run["started_at"] is not None]
            assert len(started) == 1, detail
            assert (trace / str(number)).read_text() == "x\n"


async def _some_progress(host: AgentProcess, round_no: int) -> None:
    """Let the agent finish a few more tasks, a different number each time."""
    enough = min(3 * round_no + round_no % 3, 38)
    await host.until_shown(
        "/queue/status", lambda status: status["tasks"]["completed"] + status["tasks"]["failed"] >= enough
    )
