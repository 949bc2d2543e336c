"""F22, F32: process ids that were a task's or its shim's, and belong to strangers by now: nobody signals them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import psutil
import pytest

from remotegpu_schemas.errors import Code
from tests.end_to_end.agent_process import agent
from tests.waiting import until_so

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can choose the next process id")

_LAST_PID: Final = Path("/proc/sys/kernel/ns_last_pid")
_TRIES: Final = 2000
"""Others start processes as well, and may be faster."""


@contextmanager
def stranger_with(pid: int) -> Generator[subprocess.Popen[bytes]]:
    """A process of somebody else's that was given this number (ns_last_pid: proc(5))."""
    for _ in range(_TRIES):
        _LAST_PID.write_text(str(pid - 1))
        process = subprocess.Popen(["sleep", "600"], env={"PATH": os.environ["PATH"]}, start_new_session=True)
        if process.pid == pid:
            break
        process.kill()
        process.wait()
    else:
        raise AssertionError(f"process id {pid} is not to be had")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def test_f22_f32_the_number_of_a_finished_task(tmp_path: Path) -> None:
    """F22, F32: a stop by what was a finished task's process id: the stranger lives, the code says gone."""
    async with agent(tmp_path) as host:
        detail = await host.wait_for(await host.submit(command="true"))
        pid = detail["runs"][0]["process_id"]
        with stranger_with(pid) as stranger:
            for number in ("SIGTERM", "SIGKILL"):
                body = f'{{"process_id": {pid}, "signal": "{number}"}}'
                status, answer = await host.call("POST", "/process/stop", data=body)
                assert (status, answer["code"]) == (410, Code.PROCESS_GONE), answer
            assert stranger.poll() is None


@pytest.mark.parametrize("is_running", [True, False], ids=["runs", "has ended"])
async def test_f22_the_numbers_of_task_and_shim_after_a_restart(tmp_path: Path, is_running: bool) -> None:
    """F22: while no agent was there shim and task went, and strangers got their numbers: they live on, all of them.

    What the run's record says of them is of no account: lost, or over.
    """
    marker = tmp_path / "again"
    async with agent(tmp_path) as host:
        task_id = await host.submit(command=f"[ -e {marker} ] && exit 3; touch {marker}; sleep 600")
        pid = (await host.wait_running(task_id))["process_id"]
        await until_so(marker.exists)
        shim = psutil.Process(pid).parent()
        assert shim is not None
        await host.kill()
        shim.send_signal(signal.SIGKILL if is_running else signal.SIGTERM)
        await until_so(lambda: not psutil.pid_exists(shim.pid) and not psutil.pid_exists(pid))
        with ExitStack() as stack:
            strangers = [stack.enter_context(stranger_with(number)) for number in (pid, shim.pid)]
            await host.start()
            detail = await host.wait_for(task_id)
            assert [run["cause"] for run in detail["runs"]] == (
                ["agent_lost", "exit_code"] if is_running else ["stopped"]
            )
            await host.call("POST", f"/tasks/{task_id}/cancel")
            for number in (pid, shim.pid):
                status, answer = await host.call("POST", "/process/stop", data=f'{{"process_id": {number}}}')
                assert status in {404, 410}, answer
            assert [stranger.poll() for stranger in strangers] == [None, None]
