"""Tasks of a user of their own, under an agent that is root."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import pwd
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import psutil
import pytest

from tests.end_to_end.agent_process import AgentProcess, agent
from tests.end_to_end.gates import Gate

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can run tasks as another user")


async def test_a_script_runs_as_the_tasks_user_and_its_progress_is_seen(open_dir: Path) -> None:
    """`tasks.run_as`: uid, file rights and progress are that user's."""
    gate = Gate(open_dir / "gate")
    async with agent(open_dir, tasks={"run_as": "nobody"}) as host:
        script = f'id -un; echo "40 half" >"$REMOTEGPU_PROGRESS"; {gate.wait}; test -O "$REMOTEGPU_PROGRESS"'
        task_id = await host.submit(script=script)
        await host.until_shown(f"/tasks/{task_id}", lambda task: task["progress_message"] == "half")
        gate.open()
        assert (await host.wait_for(task_id))["state"] == "completed"
        assert await host.output(task_id) == "nobody\n"


async def test_f52_no_secret_of_root_leaks_through_what_a_task_plants(open_dir: Path) -> None:
    """F52: links to a file that only root may read, where the agent reads: nothing of it is ever shown."""
    secret = open_dir / "secret"
    secret.write_text("77 hunter2\n")
    secret.chmod(0o600)
    async with agent(open_dir, tasks={"run_as": "nobody"}) as host:
        plant = f'rm -f "$REMOTEGPU_PROGRESS"; ln -s {secret} "$REMOTEGPU_PROGRESS"'
        outside = f'd=$(dirname "$REMOTEGPU_PROGRESS"); rm -rf "$d"; ln -s {open_dir} "$d"'
        for command in (plant, f"{plant}; {outside}; ln -s {secret} progress"):
            task_id = await host.submit(command=f"{command}; true")
            assert (await host.wait_for(task_id))["state"] == "completed"
            shown = await host.get(f"/tasks/{task_id}")
            assert (shown["progress_percent"], shown["progress_message"]) == (None, None)
        assert "hunter2" not in host.log.read_text()


# --- `run_as: submitter` ---

CALLER = """
import http.client, json, os, socket, sys
path, gid, uid, method, target, body = sys.argv[1:]
os.setgroups([])
os.setgid(int(gid))
os.setuid(int(uid))
connection = http.client.HTTPConnection("localhost", timeout=20)
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(path)
connection.request(method, target, body)
print(connection.getresponse().read().decode())
"""
SUBMITTERS = {"tasks": {"run_as": "submitter"}, "api": {"socket_group": "daemon"}}


async def submit_as(host: AgentProcess, user: str | int, directory: Path, **task: Any) -> dict[str, Any]:
    """The whole answer to a submission by a process of that user, by name or uid, in that directory."""
    uid = user if isinstance(user, int) else pwd.getpwnam(user).pw_uid
    ids = [str(grp.getgrnam("daemon").gr_gid), str(uid)]
    target = f"/api/v1/tasks?directory={quote(str(directory))}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-c", CALLER, str(host.socket), *ids, "POST", target, json.dumps({"task": task}),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, _ = await process.communicate()
    answer: dict[str, Any] = json.loads(output)
    return answer


async def test_a_task_runs_as_its_submitter_in_its_submitters_directory(open_dir: Path) -> None:
    """uid, groups, home, directory, script and progress are the caller's; the next caller's are its own."""
    async with agent(open_dir, **SUBMITTERS) as host:
        own = open_dir / "own"
        own.mkdir()
        shutil.chown(own, "nobody")
        own.chmod(0o700)
        script = 'echo "40 half" >"$REMOTEGPU_PROGRESS"; id -un; id -Gn; pwd; echo $HOME; touch made'
        for user, directory in (("nobody", own), ("root", open_dir)):
            [task_id] = (await submit_as(host, user, directory, script=script))["data"]["task_ids"]
            ended = await host.wait_for(task_id)
            assert (ended["cause"], ended["progress_message"]) == ("succeeded", "half"), ended
            entry = pwd.getpwnam(user)
            groups = {grp.getgrgid(gid).gr_name for gid in os.getgrouplist(user, entry.pw_gid)}
            name, of_groups, *rest = (await host.output(task_id)).splitlines()
            assert (name, set(of_groups.split()), rest) == (user, groups, [str(directory), entry.pw_dir])
            assert (directory / "made").owner() == user


async def test_a_submitter_gets_no_further_than_its_own_rights(open_dir: Path) -> None:
    """A directory that only root may enter is closed to another user's task: the launch fails with what to mend."""
    closed = open_dir / "closed"
    closed.mkdir(mode=0o700)
    async with agent(open_dir, **SUBMITTERS) as host:
        [task_id] = (await submit_as(host, "nobody", closed, command="id"))["data"]["task_ids"]
        ended = await host.wait_for(task_id)
        assert ended["cause"] == "launch_failed"
        assert f"may not be entered by uid {pwd.getpwnam('nobody').pw_uid}" in ended["error"]


async def test_a_submitter_in_no_user_database_holds_nobody_up(open_dir: Path) -> None:
    """Its task is `launch_failed` with what to mend, as nobody, and the next one, of another user, has the slot."""
    uid = 4_000_000_001
    with pytest.raises(KeyError):
        pwd.getpwuid(uid)
    async with agent(open_dir, capacity={"max_concurrent": 1}, **SUBMITTERS) as host:
        [task_id] = (await submit_as(host, uid, open_dir, command="id"))["data"]["task_ids"]
        ended = await host.wait_for(task_id)
        assert (ended["state"], ended["cause"]) == ("failed", "launch_failed"), ended
        assert f"its submitter, uid {uid}, is no user of this host" in ended["error"]
        assert "create one, or submit it as another" in ended["error"]
        assert [run["process_id"] for run in ended["runs"]] == [None]
        [next_id] = (await submit_as(host, "nobody", open_dir, command="id -un"))["data"]["task_ids"]
        assert (await host.wait_for(next_id))["cause"] == "succeeded"
        assert await host.output(next_id) == "nobody\n"


async def test_the_submitter_is_remembered(open_dir: Path) -> None:
    """Over a kill of the agent, and a database that is lost: a retry runs as the one who submitted."""
    first, second = Gate(open_dir / "first"), Gate(open_dir / "second")
    async with agent(open_dir, capacity={"max_concurrent": 1}, **SUBMITTERS) as host:
        script = f'id -un; if test "$REMOTEGPU_RUN_NUMBER" = 1; then {first.wait}; exit 1; fi; {second.wait}'
        asked = {"script": script, "retry": {"max": 1, "delay": 0, "on": ["exit_code"]}}
        [task_id] = (await submit_as(host, "nobody", open_dir, **asked))["data"]["task_ids"]
        await host.wait_running(task_id)
        await host.kill()
        for file in host.state_dir.glob("queue.db*"):
            file.unlink()
        await host.start()
        first.open()
        await host.until_shown(f"/tasks/{task_id}", lambda task: task["run_no"] == 2)
        second.open()
        assert (await host.wait_for(task_id))["state"] == "completed"
        assert await host.output(task_id) == "nobody\n"


async def test_who_is_no_user_of_this_host_may_not_submit(open_dir: Path) -> None:
    """Over TCP with the operator's token: refused by policy, with what to do instead."""
    settings = {**SUBMITTERS, "api": {**SUBMITTERS["api"], "listen": "127.0.0.1:0"}}
    async with agent(open_dir, **settings) as host, aiohttp.ClientSession() as session:
        url = json.loads((host.state_dir / "endpoints.json").read_bytes())["url"]
        token = (host.state_dir / "api-token").read_text().strip().rpartition(":")[2]
        headers = {"X-Agent-Token": token}
        async with session.post(f"{url}/api/v1/tasks", json={"task": {"command": "id"}}, headers=headers) as answer:
            body = await answer.json()
        assert (answer.status, body["code"]) == (403, 30014)
        assert "submit over the Unix socket" in body["message"]


async def test_f52_what_a_run_leaves_for_the_next_is_met_with_the_users_rights(open_dir: Path) -> None:
    """F52: links, fifos and directories where the agent writes the script and enters: at worst this task fails.

    The first run plants, the second one, of the same task, meets it; a task beside them runs to its end all the while.
    """
    secret, closed, gate = open_dir / "secret", open_dir / "closed", Gate(open_dir / "gate")
    secret.write_text("hunter2\n")
    secret.chmod(0o600)
    closed.mkdir(mode=0o700)
    plants = {
        f"ln -sf {secret} $s": "succeeded",
        f"rm $s; ln {open_dir}/own $s": "succeeded",
        "rm $s; mkfifo $s": "succeeded",
        "rm $s; ln -s /dev/zero $s": "succeeded",
        "rm $s; mkdir $s; touch $s/x": "launch_failed",
        "rm $s; chmod 0 .": "launch_failed",
        "rm -rf .remotegpu; ln -s / .remotegpu": "succeeded",
        f"rm -rf artifacts checkpoints; ln -s {closed} artifacts; mkfifo checkpoints": "succeeded",
    }
    own = open_dir / "own"
    own.write_text("kept\n")
    os.chown(own, 65534, 65534)
    async with agent(open_dir, tasks={"run_as": "nobody"}, capacity={"max_concurrent": 4}) as host:
        beside = await host.submit(command=f"{gate.wait}; exit 6")
        for plant, cause in plants.items():
            script = f'[ "$REMOTEGPU_RUN_NUMBER" = 2 ] && exit 0; s=.remotegpu-script; {plant}; exit 3'
            task_id = await host.submit(script=script, retry={"max": 1, "delay": 0})
            detail = await host.wait_for(task_id)
            assert [run["cause"] for run in detail["runs"]] == ["exit_code", cause], (plant, detail)
            assert "hunter2" not in str(detail)
        gate.open()
        assert (await host.wait_for(beside))["exit_code"] == 6
        assert "hunter2" not in host.log.read_text()
    assert (secret.read_text(), secret.stat().st_uid, secret.stat().st_mode & 0o777) == ("hunter2\n", 0, 0o600)
    assert (own.read_text(), own.stat().st_uid) == ("kept\n", 65534)
    assert (closed.stat().st_uid, list(closed.iterdir())) == (0, [])


async def test_f52_a_working_directory_is_entered_with_the_users_rights(open_dir: Path) -> None:
    """F52: a link to a directory that only root may enter, in the place of the working directory: not entered."""
    closed = open_dir / "closed"
    closed.mkdir(mode=0o700)
    (closed / "secret").write_text("hunter2\n")
    async with agent(open_dir, tasks={"run_as": "nobody"}) as host:
        task_id = await host.submit(
            command=f"ln -sfn {closed} w; cat w/secret; exit 3", workdir="w", retry={"max": 1, "delay": 1}
        )
        await host.until_shown(f"/tasks/{task_id}", lambda task: task["retries_used"] == 1)
        work = host.state_dir / "work" / task_id
        (work / "w").symlink_to(closed)  # as a run of it could
        detail = await host.wait_for(task_id)
        assert [run["cause"] for run in detail["runs"]] == ["launch_failed"] * 2
        assert ["does not exist" in detail["runs"][0]["error"], "may not be entered" in detail["runs"][1]["error"]] == [
            True,
            True,
        ]
        assert "hunter2" not in host.log.read_text()


async def test_f52_a_huge_progress_file_costs_nothing(open_dir: Path) -> None:
    """F52: a terabyte of nothing with a last line: that line is shown, and the agent reads no more than its tail."""
    gate = Gate(open_dir / "gate")
    async with agent(open_dir, tasks={"run_as": "nobody"}) as host:
        grow = 'truncate -s 1T "$REMOTEGPU_PROGRESS"; printf "\\n70 big\\n" >>"$REMOTEGPU_PROGRESS"'
        task_id = await host.submit(command=f"{grow}; {gate.wait}")
        before = psutil.Process(host.pid).memory_info().rss
        await host.until_shown(f"/tasks/{task_id}", lambda task: task["progress_message"] == "big")
        assert psutil.Process(host.pid).memory_info().rss - before < 16 << 20
        gate.open()
        assert (await host.wait_for(task_id))["progress_percent"] == 70.0
