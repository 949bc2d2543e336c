"""In the guest of the test bed, as root: an agent as a systemd service, and what must be true of it.

Executed by the guest's own python3 with the name of a set of checks; standard library only, but for what the checks
call in processes of their own. Prints a line per check, ends with 1 if one failed. Emulation is slow: no short times.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

LIBRARY = "/opt/remotegpu"
SOCKET = "/run/remotegpu-agent/agent.sock"
STATE = Path("/var/lib/remotegpu-agent")
NOTES = Path("/root/notes")
DEADLINE_S = 240.0

CONFIG = {
    "agent": {"state_dir": str(STATE)},
    "api": {"listen": None, "socket": SOCKET},
    "capacity": {"max_concurrent": 16, "cpus": 16, "memory_gb": 16},
    "tasks": {
        "placement": "systemd",
        "grace_period": "5s",
        "cpu_weight": 200,
        "io_weight": 300,
        "allowed_cpus": "0",
        "processes_max": 5000,
    },
}
UNIT = f"""
[Service]
ExecStart=/usr/bin/python3 -m remotegpu_agent.cli run
Environment=PYTHONPATH={LIBRARY}
RuntimeDirectory=remotegpu-agent
PrivateTmp=yes
NoNewPrivileges=yes
Restart=always
RestartSec=200ms
LimitNOFILE=4321:5432
LimitMEMLOCK=infinity
LimitCORE=0
[Install]
WantedBy=multi-user.target
"""


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        """To the agent's socket instead of a port."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(DEADLINE_S)
        self.sock.connect(SOCKET)


def call(method: str, path: str, body: object = None) -> Any:
    """The data that the agent answers with."""
    with contextlib.closing(_Connection("localhost")) as connection:
        connection.request(method, f"/api/v1{path}", json.dumps(body) if body is not None else None)
        answer = json.loads(connection.getresponse().read())
    assert answer["success"], answer
    return answer["data"]


def until(fact: Callable[[], Any], what: str) -> Any:
    """Wait for something that gives no event."""
    give_up = time.monotonic() + DEADLINE_S
    while True:
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            if found := fact():
                return found
        assert time.monotonic() < give_up, f"waited in vain for {what}"
        time.sleep(0.1)


def sh(*command: str) -> str:
    """What a command says."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout.strip()


def submit(command: str, **task: Any) -> str:
    """The id of a new task."""
    return str(call("POST", "/tasks", {"task": {"command": command, **task}})["task_ids"][0])


def running(task_id: str) -> dict[str, Any]:
    """The task once its process exists."""

    def look() -> Any:
        task = call("GET", f"/tasks/{task_id}")
        assert task["state"] not in {"failed", "completed", "cancelled"}, task
        return task if task["process_id"] else None

    found: dict[str, Any] = until(look, f"task {task_id} to run")
    return found


def ended(task_id: str) -> dict[str, Any]:
    """The task once it has ended."""

    def look() -> Any:
        task = call("GET", f"/tasks/{task_id}")
        return task if task["state"] in {"failed", "completed", "cancelled"} else None

    found: dict[str, Any] = until(look, f"task {task_id} to end")
    return found


def is_alive(pid: int) -> bool:
    """Whether a process lives."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def agent_pid() -> int:
    """The agent's main process."""
    return int(sh("systemctl", "show", "-P", "MainPID", "remotegpu-agent"))


def new_agent(before: int) -> int:
    """The pid of the agent that has come after another one, once it is ready."""

    def look() -> Any:
        pid = agent_pid()
        with contextlib.suppress(KeyError):
            endpoints = json.loads((STATE / "endpoints.json").read_bytes())
            return pid if pid not in {0, before} and endpoints["pid"] == pid and call("GET", "/ping") else None

    found: int = until(look, "an agent to be ready")
    return found


def group_of(pid: int) -> str:
    """The path of a process's control group."""
    return Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::")


def parent_of(pid: int) -> int:
    """The parent's pid; a task's is its shim."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# --- the checks of the first boot ---


def check_tasks_have_scopes() -> None:
    """A run has a scope of its own in the slice, a leaf for its shim and one for itself, and limits on the latter."""
    task = running(submit("sleep 1000", resources={"cpus": 1.5, "memory_gb": 0.25}))
    pid = task["process_id"]
    scope = f"/remotegpu.slice/remotegpu-tasks.slice/remotegpu-task-{task['attempt_id']}-1.scope"
    assert group_of(pid) == f"{scope}/task", group_of(pid)
    assert group_of(parent_of(pid)) == f"{scope}/shim", group_of(parent_of(pid))
    wanted = {
        "memory.max": str(256 << 20),
        "memory.swap.max": "0",
        "cpu.max": "150000 100000",
        "pids.max": "5000",
        "cpu.weight": "200",
        "io.weight": "default 300",
        "cpuset.cpus": "0",
    }
    for name, value in wanted.items():
        assert Path(f"/sys/fs/cgroup{scope}/task/{name}").read_text().strip() == value, name
    for name in ("memory.max", "cpu.max"):
        assert Path(f"/sys/fs/cgroup{scope}/shim/{name}").read_text().strip().split()[0] == "max", name
    assert os.sched_getaffinity(pid) == {0}
    call("POST", f"/tasks/{task['id']}/cancel")
    assert ended(task["id"])["cause"] == "cancelled"
    until(lambda: not Path(f"/sys/fs/cgroup{scope}").exists(), "the scope to go")


def check_sandbox_is_not_inherited() -> None:
    """The agent's PrivateTmp and NoNewPrivileges are not the task's; its resource limits are."""
    task_id = submit("grep NoNewPrivs /proc/self/status; readlink /proc/self/ns/mnt; cat /proc/self/oom_score_adj")
    assert ended(task_id)["cause"] == "succeeded"
    text = call("GET", f"/tasks/{task_id}/logs?stream=stdout")["text"]
    assert text.split() == ["NoNewPrivs:", "0", os.readlink("/proc/1/ns/mnt"), "0"], text
    assert os.readlink(f"/proc/{agent_pid()}/ns/mnt") != os.readlink("/proc/1/ns/mnt")
    task_id = submit("cat /proc/self/limits")
    assert ended(task_id)["cause"] == "succeeded"
    text = call("GET", f"/tasks/{task_id}/logs?stream=stdout")["text"]
    assert text == Path(f"/proc/{agent_pid()}/limits").read_text()
    assert re.search(r"Max open files +4321 +5432", text), text


def check_f04_f07_task_survives_its_agent() -> None:
    """F04, F07, F45: over restart, kill -9, stop and start of the agent the same process goes on, and is adopted."""
    task_id = submit("until [ -e /root/enough ]; do sleep 0.2; done; echo done; exit 7")
    pid, agent = running(task_id)["process_id"], agent_pid()
    sh("systemctl", "restart", "remotegpu-agent")
    agent = new_agent(agent)
    assert running(task_id)["process_id"] == pid
    assert is_alive(pid)
    os.kill(agent, signal.SIGKILL)
    agent = new_agent(agent)
    assert running(task_id)["process_id"] == pid
    sh("systemctl", "stop", "remotegpu-agent")
    assert is_alive(pid)
    until(lambda: not sh("systemctl", "list-units", "-q", "--no-legend", "remotegpu-spawner-*"), "the spawner to go")
    sh("systemctl", "start", "remotegpu-agent")
    new_agent(agent)
    Path("/root/enough").touch()
    task = ended(task_id)
    assert (task["cause"], task["exit_code"], len(task["runs"])) == ("exit_code", 7, 1), task
    assert call("GET", f"/tasks/{task_id}/logs?stream=stdout")["text"] == "done\n"


def check_f08_spawner_killed() -> None:
    """F08: a new spawner; running tasks are untouched."""
    task = running(submit("sleep 1000"))
    [unit] = [
        line.split()[0]
        for line in sh("systemctl", "list-units", "-q", "--no-legend", "remotegpu-spawner-*").splitlines()
    ]
    sh("systemctl", "kill", "-s", "KILL", unit)
    assert ended(submit("true"))["cause"] == "succeeded"
    assert is_alive(task["process_id"])
    call("POST", f"/tasks/{task['id']}/cancel")
    ended(task["id"])


def check_f09_shim_killed() -> None:
    """F09: the whole tree is stopped, what has left environment and session too, and the run is agent_lost."""
    hidden = "env -i setsid setsid sh -c 'echo $$ >/root/hidden; exec sleep 1000' & "
    task = running(submit(f"{hidden} sleep 1000", retry={"max": 0}))
    pid = int(until(lambda: Path("/root/hidden").read_text(), "the hidden process"))
    os.kill(parent_of(task["process_id"]), signal.SIGKILL)
    until(lambda: not is_alive(pid), "the hidden process to die")
    until(lambda: call("GET", f"/tasks/{task['id']}")["runs"][0]["cause"] == "agent_lost", "the run to be lost")
    call("POST", f"/tasks/{task['id']}/cancel")
    ended(task["id"])


def check_f20_wall_clock_jumps() -> None:
    """F20: the host's clock is set a day ahead, and back: a timeout and a retry's delay take their seconds.

    Agent, shim and systemd have the same clock here.
    """
    for days in (1, -1):
        timed = submit("sleep 1000", timeout="20s", grace_period="1s")
        delayed = submit("exit $((2 - REMOTEGPU_RUN_NUMBER))", retry={"max": 1, "delay": 15})
        running(timed)
        has_failed = partial(lambda task_id: call("GET", f"/tasks/{task_id}")["retries_used"] == 1, delayed)
        until(has_failed, "the first run to fail")
        begun = time.monotonic()
        time.clock_settime(time.CLOCK_REALTIME, time.time() + days * 86400)
        assert call("GET", f"/tasks/{timed}")["state"] == "running"
        task = ended(timed)
        assert task["cause"] == "timed_out", task
        assert 20 <= task["runs"][0]["usage"]["wall_s"] < 60, task
        assert ended(delayed)["cause"] == "succeeded"
        assert 5 < time.monotonic() - begun < 100


def check_f27_no_processes() -> None:
    """F27: EAGAIN: the spawner may fork nothing: `launch_failed` and repeated; the agent lives, others go on."""
    other, agent = running(submit("sleep 1000")), agent_pid()
    [unit] = [
        line.split()[0]
        for line in sh("systemctl", "list-units", "-q", "--no-legend", "remotegpu-spawner-*").splitlines()
    ]
    sh("systemctl", "set-property", "--runtime", unit, "TasksMax=1")
    task_id = submit("true", retry={"max": 1000, "delay": 1})
    until(lambda: call("GET", f"/tasks/{task_id}")["retries_used"] >= 2, "launches to fail")
    sh("systemctl", "set-property", "--runtime", unit, "TasksMax=infinity")
    task = ended(task_id)
    causes = [run["cause"] for run in task["runs"]]
    assert causes == ["launch_failed"] * (len(causes) - 1) + ["succeeded"], task
    assert "temporarily unavailable" in task["runs"][0]["error"], task
    assert agent_pid() == agent
    assert is_alive(other["process_id"])
    call("POST", f"/tasks/{other['id']}/cancel")
    ended(other["id"])


def check_f28_out_of_memory() -> None:
    """F28: a task beyond its memory ends as out_of_memory; its shim wrote that, the agent and other tasks live."""
    other, agent = running(submit("sleep 1000")), agent_pid()
    hog = "python3 -c 'x = bytearray(300 << 20); print(len(x))'"
    by_main = ended(submit(f"exec {hog}", resources={"memory_gb": 0.0625}))
    assert (by_main["cause"], by_main["exit_code"]) == ("out_of_memory", 137), by_main
    assert "ran out of memory" in by_main["error"]
    assert 32 <= by_main["runs"][0]["usage"]["memory_peak_mb"] <= 64, by_main["runs"]
    by_child = ended(submit(f"{hog} || exit 3", resources={"memory_gb": 0.0625}))
    assert by_child["cause"] == "out_of_memory", by_child
    survived = ended(submit(f"{hog} || exit 0", resources={"memory_gb": 0.0625}))
    assert survived["cause"] == "succeeded", survived
    script = f"[ -e /root/has-met-it ] && exit 0; touch /root/has-met-it; exec {hog}"
    retried = ended(submit(script, resources={"memory_gb": 0.0625}, retry={"max": 1}))
    assert [run["cause"] for run in retried["runs"]] == ["out_of_memory", "succeeded"], retried
    assert retried["retries_used"] == 1, retried
    scoped = running(submit(f"until [ -e /root/eat ]; do sleep 0.1; done; exec {hog}"))
    scope = Path(f"/sys/fs/cgroup{group_of(scoped['process_id'])}").parent
    (scope / "memory.max").write_text(str(64 << 20))  # of the whole scope, its shim included
    Path("/root/eat").touch()
    assert ended(scoped["id"])["cause"] == "out_of_memory", ended(scoped["id"])
    assert agent_pid() == agent
    assert is_alive(other["process_id"])
    call("POST", f"/tasks/{other['id']}/cancel")
    ended(other["id"])


def check_f30_fork_bomb() -> None:
    """F30: a fork bomb stays within its memory and its processes, and the whole of it goes at its timeout."""
    other, agent = running(submit("sleep 1000")), agent_pid()
    bomb = 'f() { while :; do setsid bash -c "$(declare -f f); f" & done; }; trap "" TERM; f'
    task = ended(submit(bomb, resources={"memory_gb": 0.125}, timeout="20s", grace_period="2s"))
    assert task["cause"] in {"timed_out", "out_of_memory"}, task
    assert agent_pid() == agent
    assert is_alive(other["process_id"])
    call("POST", f"/tasks/{other['id']}/cancel")
    ended(other["id"])
    until(lambda: not sh("systemctl", "list-units", "-q", "--no-legend", "remotegpu-task-*"), "all scopes to go")


_FORKS = """
import os, time
n = 0
try:
    while n < 100:
        n += 1
        if os.fork() == 0:
            time.sleep(1000)
except OSError as error:
    print(n, error.errno)
"""

_BOUNDED = f"""
import asyncio
from pathlib import Path
from remotegpu_schemas.attempt import PlacementKind, RunLimits, RunSpec
from remotegpu_sidecar.launcher import Launcher
from remotegpu_sidecar.placement import choose

async def main():
    launcher = Launcher(Path("/root/attempts"), await choose(PlacementKind.SYSTEMD))
    await launcher.start()
    env = {{"PATH": "/usr/bin", "REMOTEGPU_ATTEMPT_ID": "bounded", "REMOTEGPU_RUN_NUMBER": "1"}}
    spec = RunSpec(task_id="bounded", attempt_id="bounded", run_no=1, argv=("python3", "-c", {_FORKS!r}), cwd="/",
        env=env, grace_period_s=1, run_limits=RunLimits(tasks_max=20))
    run = await launcher.launch(spec)
    record = await run.wait()
    print(record.ended.exit_code, record.ended.stragglers_killed)
    print(next(run.directory.glob("stdout*")).read_text())
    run.close()
    await launcher.stop()

asyncio.run(main())
"""


def check_f30_number_of_processes() -> None:
    """F30: at its bound a task gets EAGAIN (11), and nobody else."""
    environment = {"PYTHONPATH": LIBRARY, "PATH": os.environ["PATH"]}
    done = subprocess.run(["python3", "-c", _BOUNDED], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0", "19", "20", "11"], (done.stdout, done.stderr)


_BARE = """
import asyncio, os
from pathlib import Path
from remotegpu_schemas.attempt import RunLimits, RunSpec
from remotegpu_sidecar.grouping import CgroupPlacement
from remotegpu_sidecar.launcher import Launcher

async def main():
    base = "/sys/fs/cgroup/bare"
    os.mkdir(base)
    launcher = Launcher(Path("/root/bare-attempts"), CgroupPlacement(base))
    await launcher.start()
    tasks = {
        "forks": (FORKS, RunLimits(tasks_max=20)),
        "hog": ("x = bytearray(300 << 20); print(len(x))", RunLimits(memory_bytes=64 << 20, swap_bytes=0)),
    }
    for name, (program, limits) in tasks.items():
        env = {"PATH": "/usr/bin", "REMOTEGPU_ATTEMPT_ID": name, "REMOTEGPU_RUN_NUMBER": "1"}
        spec = RunSpec(task_id=name, attempt_id=name, run_no=1, argv=("python3", "-c", program), cwd="/", env=env,
            grace_period_s=1, run_limits=limits)
        run = await launcher.launch(spec)
        ended = (await run.wait()).ended
        output = "".join(path.read_text() for path in run.directory.glob("stdout*")).strip()
        print(name, ended.exit_code, ended.signal, bool(ended.oom_kills), output)
        run.close()
    await launcher.stop()

asyncio.run(main())
"""


def check_f28_f30_bare_groups() -> None:
    """F28, F30: groups without systemd hold their limits too: EAGAIN (11) at the bound, out of memory told apart."""
    environment = {"PYTHONPATH": LIBRARY, "PATH": os.environ["PATH"]}
    program = _BARE.replace("FORKS", repr(_FORKS))
    done = subprocess.run(["python3", "-c", program], env=environment, capture_output=True, text=True, check=False)
    said = [line.rstrip() for line in done.stdout.splitlines()]
    assert said == ["forks 0 None False 20 11", "hog None 9 True"], (done.stdout, done.stderr)


def check_suspend_freezes() -> None:
    """A suspended run's leaf is frozen, its shim is not; a stop thaws it."""
    task = running(submit("while :; do :; done"))
    events = Path(f"/sys/fs/cgroup{group_of(task['process_id'])}/cgroup.events")
    call("POST", f"/tasks/{task['id']}/suspend")
    until(lambda: "frozen 1" in events.read_text(), "the leaf to be frozen")
    call("POST", f"/tasks/{task['id']}/cancel")
    assert ended(task["id"])["cause"] == "cancelled"


def check_refused_scope() -> None:
    """A scope that systemd refuses is launch_failed; nothing runs anywhere else, and the agent goes on."""
    until(lambda: not sh("systemctl", "list-units", "-q", "--no-legend", "remotegpu-task-*"), "all scopes to go")
    sh("systemctl", "stop", "remotegpu-tasks.slice")
    sh("systemctl", "mask", "--runtime", "remotegpu-tasks.slice")
    task = ended(submit("touch /root/has-run", retry={"max": 0}))
    assert task["cause"] == "launch_failed", task
    assert "masked" in task["error"], task
    assert not Path("/root/has-run").exists()
    sh("systemctl", "unmask", "--runtime", "remotegpu-tasks.slice")
    assert ended(submit("true"))["cause"] == "succeeded"


def check_others_are_told() -> None:
    """`doctor` names the placement; one who is not root is told why there are no scopes for him."""
    environment = {"PYTHONPATH": LIBRARY, "PATH": os.environ["PATH"]}
    command = ["python3", "-m", "remotegpu_agent.cli", "doctor"]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout
    assert "placement: systemd (a transient scope per run)" in text, text
    unprivileged = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    environment["REMOTEGPU_AGENT__TASKS__PLACEMENT"] = "auto"
    text = subprocess.run(
        [*unprivileged, *command], env=environment, capture_output=True, text=True, check=False
    ).stdout
    assert "placement: process-group" in text, text
    assert "systemd lets only root make scopes" in text, text
    assert "KillMode=process" in text, text


def check_nothing_is_left() -> None:
    """After all of that no scope and no group is left of any run."""
    until(
        lambda: not sh("systemctl", "list-units", "-q", "--all", "--no-legend", "remotegpu-task-*"), "all scopes to go"
    )
    slice_path = Path("/sys/fs/cgroup/remotegpu.slice/remotegpu-tasks.slice")
    assert not slice_path.exists() or not [path for path in slice_path.iterdir() if path.is_dir()]


# --- reboots ---


def prepare_reboot() -> None:
    """A task runs when the host goes down; it says when it hears of that."""
    task = running(submit("trap 'echo saved; exit 0' TERM; while :; do sleep 0.2; done", retry={"max": 0}))
    NOTES.write_text(task["id"])


def check_f21_shut_down() -> None:
    """F21: the run that was under way heard its stop signal, had its grace, and ended as host_shutdown."""
    task = call("GET", f"/tasks/{NOTES.read_text()}")
    assert task["runs"][0]["cause"] == "host_shutdown", task
    assert call("GET", f"/tasks/{task['id']}/logs?stream=stdout")["text"] == "saved\n"


def check_f21_rebooted() -> None:
    """F21: a run that the host took down without a word ended as host_rebooted."""
    task = call("GET", f"/tasks/{NOTES.read_text()}")
    assert task["runs"][0]["cause"] == "host_rebooted", task


def submit_until_the_power_is_cut() -> None:
    """Says the id of each task once the agent has answered for it: some end, some run, some wait."""
    for number in range(1, 10_000):
        command = "echo done" if number % 3 else "sleep 1000"
        print(f"stored-{number} {submit(command, retry={'max': 0})}", flush=True)


def check_f23_power_cut() -> None:
    """F23: each task that was answered for is known, the database is whole, no run directory is torn, all goes on."""
    stored = NOTES.read_text().split()
    known = {task_id: call("GET", f"/tasks/{task_id}") for task_id in stored}
    causes = {task["runs"][0]["cause"] for task in known.values() if task["runs"]}
    assert causes <= {"succeeded", "host_rebooted", "agent_lost", None}, causes
    environment = {"PYTHONPATH": LIBRARY, "PATH": os.environ["PATH"]}
    check = ["python3", "-m", "remotegpu_agent.cli", "db", "check"]
    done = subprocess.run(check, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr)
    said = sh("journalctl", "--no-pager", "-b", "-o", "cat", "-u", "remotegpu-agent")
    assert "cannot be read" not in said, said
    assert ended(submit("true"))["cause"] == "succeeded"


SETS: dict[str, tuple[Callable[[], None], ...]] = {
    "placement": (
        check_tasks_have_scopes,
        check_sandbox_is_not_inherited,
        check_f04_f07_task_survives_its_agent,
        check_f08_spawner_killed,
        check_f09_shim_killed,
        check_f20_wall_clock_jumps,
        check_f27_no_processes,
        check_f28_out_of_memory,
        check_f30_fork_bomb,
        check_f30_number_of_processes,
        check_f28_f30_bare_groups,
        check_suspend_freezes,
        check_refused_scope,
        check_others_are_told,
        check_nothing_is_left,
    ),
    "before-reboot": (prepare_reboot,),
    "after-shutdown": (check_f21_shut_down,),
    "after-crash": (check_f21_rebooted,),
    "before-power-cut": (submit_until_the_power_is_cut,),
    "after-power-cut": (check_f23_power_cut,),
}


def install() -> None:
    """The config and the unit; the packages are there already."""
    Path("/etc/remotegpu-agent").mkdir(exist_ok=True)
    Path("/etc/remotegpu-agent/config.yaml").write_text(json.dumps(CONFIG))
    Path("/etc/systemd/system/remotegpu-agent.service").write_text(UNIT)
    sh("systemctl", "daemon-reload")
    sh("systemctl", "enable", "--now", "remotegpu-agent")


def main() -> int:
    """Run a set, or those of its checks whose names hold one of the words after it."""
    name, words = sys.argv[1], sys.argv[2:]
    if not name.startswith("after-"):
        install()
    failures = 0
    try:
        new_agent(0)
        for check in SETS[name]:
            if words and not any(word in check.__name__ for word in words):
                continue
            begun = time.monotonic()
            try:
                check()
            except Exception:  # noqa: BLE001 - the other checks are to be made
                failures += 1
                print(f"FAILED {check.__name__}\n{traceback.format_exc()}", flush=True)
            else:
                print(f"ok {check.__name__} ({time.monotonic() - begun:.1f} s)", flush=True)
    finally:
        if failures or sys.exc_info()[0]:
            subprocess.run(["journalctl", "--no-pager", "-o", "cat", "-n", "60", "-u", "remotegpu-*"], check=False)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
