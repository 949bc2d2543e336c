"""What is not there is not claimed: a broken host, a full one, one that is being emptied."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from control_plane.faults import Respond
from tests.end_to_end.agent_process import agent
from tests.end_to_end.fleet import Fleet, fleet
from tests.end_to_end.gates import Gate
from tests.waiting import DEADLINE_S, until

ALLOWED: Final = 5
POLLS: Final = {"heartbeat_interval": 0.2, "long_poll": 0, "poll_interval": 0.1}
"""No claim is on its way for long."""
SHORT: Final[dict[str, tuple[dict[str, float], str, str]]] = {
    "disk_free_gb": ({"disk_free_gb": 65536}, "disk_full", "(admission.disk_free_gb)"),
    "inodes_free": ({"inodes_free": 10**9}, "inodes_used_up", "(admission.inodes_free)"),
    "memory_free_gb": ({"memory_free_gb": 65536}, "memory_short", "(admission.memory_free_gb)"),
    "drain": ({}, "draining", "new driver"),
}
"""More than any machine has that runs these tests; which block that is; words of its sentence."""


def breaker(mark: Path) -> dict[str, Any]:
    """A breaker whose canary looks for the thing that every task here needs."""
    section = {"failures": ALLOWED, "probe_interval": 0.3, "probe_max_interval": 0.5, "canary_command": f"ls {mark}"}
    return {"breaker": section}


def refusal() -> Respond:
    """The answer to parameters that do not fit."""
    body = {"code": 30005, "message": "exit_code is missing", "data": None}
    return Respond(400, json.dumps(body).encode(), {"Content-Type": "application/json"})


async def cli(command: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the program."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


async def host_metrics(all_of_it: Fleet) -> tuple[int, str]:
    """Status and text."""
    connector = aiohttp.UnixConnector(str(all_of_it.host.socket))
    async with aiohttp.ClientSession(connector=connector) as session, session.get("http://localhost/metrics") as answer:
        return answer.status, await answer.text()


async def blocks(all_of_it: Fleet) -> list[str]:
    """Why the agent claims nothing."""
    return [block["kind"] for block in (await all_of_it.host.get("/queue/status"))["blocks"]]


async def test_f53_a_broken_host_burns_a_few_tasks_and_comes_back_by_itself(tmp_path: Path) -> None:
    """F53: of 500 tasks at most K are burnt while every task fails at once; mended, the host does all the others."""
    mark = tmp_path / "mount"
    async with fleet(tmp_path, breaker(mark)) as all_of_it:
        task_ids = await all_of_it.submit(*[{"command": f"ls {mark}"}] * 500)
        await until(lambda: _is(all_of_it, ["breaker_open"]))
        status = await all_of_it.host.get("/queue/status")
        assert status["state"] == "degraded"
        assert f"{ALLOWED} different tasks in a row failed within 10 s" in status["reasons"][0]
        code, text = await host_metrics(all_of_it)
        assert (code, 'remotegpu_claims_blocked{reason="breaker_open"} 1.0' in text) == (200, True)
        # Canaries fail as long as the host is broken.
        await until(lambda: _canaries(all_of_it, "failed", 3))
        burnt = [
            task for task in [await all_of_it.operator.task(each) for each in task_ids] if task["status"] == "failed"
        ]
        assert 0 < len(burnt) <= ALLOWED
        mark.mkdir()
        ended = await all_of_it.ended(task_ids, 120.0)
        assert [task["status"] for task in ended].count("failed") == len(burnt)
        assert [task["status"] for task in ended].count("completed") == 500 - len(burnt)
        assert await blocks(all_of_it) == []


async def test_f53_the_breaker_stays_open_over_a_restart(tmp_path: Path) -> None:
    """F53: an agent that is killed while its host is broken does not burn K tasks more when it comes back."""
    mark = tmp_path / "mount"
    async with fleet(tmp_path, breaker(mark)) as all_of_it:
        task_ids = await all_of_it.submit(*[{"command": f"ls {mark}"}] * 50)
        await until(lambda: _is(all_of_it, ["breaker_open"]))
        # What is in memory is on disk a moment later.
        await until(lambda: _canaries(all_of_it, "failed", 1))
        await all_of_it.host.kill()
        await all_of_it.host.start()
        await until(lambda: _canaries(all_of_it, "failed", 3))
        states = [(await all_of_it.operator.task(each))["status"] for each in task_ids]
        assert states.count("failed") <= ALLOWED
        mark.mkdir()
        await all_of_it.ended(task_ids)


@pytest.mark.parametrize("why", SHORT)
async def test_nothing_is_claimed_for_one_reason_that_everybody_is_told(tmp_path: Path, why: str) -> None:
    """A host without the disk, inodes or memory asked for, or drained, makes no claim from its start on.

    The plane hears in heartbeats the very sentence that the status shows; the metrics name the kind.
    """
    floor, kind, words = SHORT[why]
    async with fleet(tmp_path, {"admission": floor, "control_plane": POLLS}, is_started=False) as all_of_it:
        host, faults = all_of_it.host, all_of_it.plane.faults
        if not floor:
            await host.start()
            await host.post("/drain", {"reason": words})
            await host.stop()
        claims = faults.calls["claim"]
        [task_id] = await all_of_it.submit({"command": "true"})
        await host.start()

        async def is_same() -> str:
            """The one sentence, once both have it from the same look: what is free changes all the time."""
            found = (await host.get("/queue/status"))["reasons"]
            return str(found[0]) if len(found) == 1 and (await all_of_it.heartbeat()).get("reasons") == found else ""

        assert words in await until(is_same)
        await faults.wait_calls("heartbeat", faults.calls["heartbeat"] + 3, DEADLINE_S)
        status = await host.get("/queue/status")
        assert (status["state"], [block["kind"] for block in status["blocks"]]) == (
            "draining" if kind == "draining" else "degraded",
            [kind],
        )
        assert status["reasons"] == [block["reason"] for block in status["blocks"]]
        assert (await all_of_it.heartbeat())["state"] == status["state"]
        gauges = [line for line in (await host_metrics(all_of_it))[1].splitlines() if "claims_blocked{" in line]
        assert [line for line in gauges if not line.endswith(" 0.0")] == [
            f'remotegpu_claims_blocked{{reason="{kind}"}} 1.0'
        ]
        assert faults.calls["claim"] == claims
        assert (await all_of_it.operator.task(task_id))["status"] == "pending"


async def test_f37_drain_leaves_running_tasks_and_takes_no_others(tmp_path: Path) -> None:
    """F37: drained, the host runs what it has to its end, claims and starts nothing, and says so; undrain ends it."""
    gate = Gate(tmp_path / "gate")
    polls = {"long_poll": 0, "poll_interval": 0.2}  # no claim is on its way for long
    async with fleet(tmp_path, {"capacity": {"max_concurrent": 2}, "control_plane": polls}) as all_of_it:
        host = all_of_it.host
        [claimed] = await all_of_it.submit({"command": f"{gate.wait}; echo whole", "lease_ttl_sec": 6})
        await host.wait_running(claimed)
        asked = await cli(host.command("drain", "--reason", "new driver"))
        assert asked[0] == 0
        assert asked[1].splitlines() == ["draining: 1 run, 0 claimed ones wait"]
        [later] = await all_of_it.submit({"command": "true"})
        status = await host.get("/queue/status")
        assert (status["state"], [block["kind"] for block in status["blocks"]]) == ("draining", ["draining"])
        assert "new driver" in status["reasons"][0]
        code, body = await host.call("POST", "/tasks", json={"task": {"command": "true"}})
        assert (code, body["code"]) == (503, 30012)
        # Its lease is renewed meanwhile, and the plane hears that the host is draining.
        renewals = all_of_it.plane.faults.calls["renew"]
        await all_of_it.plane.faults.wait_calls("renew", renewals + 2, DEADLINE_S)
        waiting = asyncio.create_task(cli(host.command("drain", "--wait", "--timeout", "60s")))
        gate.open()
        assert (await waiting)[:2] == (0, "drained: nothing runs\n")
        assert (await all_of_it.ended([claimed]))[0]["result"]["stdout"] == "whole\n"
        assert (await all_of_it.operator.task(later))["status"] == "pending"
        assert (await cli(host.command("undrain")))[:2] == (0, "takes on tasks\n")
        assert (await all_of_it.ended([later]))[0]["status"] == "completed"


async def test_f37_a_drain_outlives_the_agent_and_holds_local_tasks(tmp_path: Path) -> None:
    """F37: after a restart the host still drains; a local task that waited is not started until undrain."""
    gate = Gate(tmp_path / "gate")
    async with agent(tmp_path, capacity={"max_concurrent": 1}) as host:
        running = await host.submit(command=gate.wait)
        await host.wait_running(running)
        waiting = await host.submit(command="echo late")
        await host.post("/drain")
        await host.kill()
        await host.start()
        gate.open()
        assert (await host.wait_for(running))["state"] == "completed"
        state = await host.get("/drain?wait=30")
        assert (state["is_drained"], state["by"]) == (True, "uid:0")
        shown = await host.get(f"/tasks/{waiting}")
        assert shown["state"] == "pending"
        assert shown["reason"].startswith("draining on the order of uid:0")
        await host.post("/undrain")
        assert (await host.wait_for(waiting))["state"] == "completed"


async def test_f37_a_claim_that_is_on_its_way_is_finished(tmp_path: Path) -> None:
    """F37: what the plane hands out after the drain was asked for, by a claim from before, is run and reported."""
    async with fleet(tmp_path) as all_of_it:
        await all_of_it.plane.faults.wait_calls("claim", 1, DEADLINE_S)
        await all_of_it.host.post("/drain")
        [task_id] = await all_of_it.submit({"command": "echo done"})
        assert (await all_of_it.ended([task_id]))[0]["result"]["stdout"] == "done\n"
        assert (await all_of_it.host.get("/drain?wait=30"))["is_drained"]


async def test_f37_sigterm_once_and_twice(tmp_path: Path) -> None:
    """F37: the first SIGTERM ends the agent in order and leaves its task running; a second one ends it at once."""
    gate = Gate(tmp_path / "gate")
    async with agent(tmp_path) as host:
        task_id = await host.submit(command=gate.wait)
        process_id = (await host.wait_running(task_id))["process_id"]
        assert await host.stop() == 0
        assert Path(f"/proc/{process_id}").exists()
        await host.start()
        os.kill(host.pid, signal.SIGSTOP)  # it must find both
        os.kill(host.pid, signal.SIGTERM)
        os.kill(host.pid, signal.SIGTERM)
        os.kill(host.pid, signal.SIGCONT)
        assert await host.wait_exit() in {0, 128 + signal.SIGTERM}
        await host.start()
        assert (await host.get(f"/tasks/{task_id}"))["process_id"] == process_id
        gate.open()
        assert (await host.wait_for(task_id))["state"] == "completed"


async def test_dead_letters_are_shown_sent_again_and_dropped(tmp_path: Path) -> None:
    """What the plane refused for good is kept, and reaches it once an operator sends it again."""
    async with fleet(tmp_path) as all_of_it:
        host = all_of_it.host
        all_of_it.plane.faults.order("complete", refusal(), refusal())
        first, second = await all_of_it.submit({"command": "echo one"}, {"command": "echo two"})
        await host.until_shown("/queue/status", lambda status: status["dead_letters"] == 2)
        code, listed, _ = await cli(host.command("dead-letters", "list"))
        assert code == 0
        assert listed.count("exit_code is missing") == 2
        letters = (await host.get("/dead-letters"))["dead_letters"]
        by_task = {letter["task_id"]: letter for letter in letters}
        assert set(by_task) == {first, second}
        shown = await host.get(f"/dead-letters/{by_task[first]['id']}")
        assert (shown["kind"], shown["body"]["stdout"]) == ("complete", "one\n")
        code, said, _ = await cli(host.command("dead-letters", "resend", str(by_task[first]["id"])))
        assert (code, said) == (0, f"dead letter {by_task[first]['id']} (complete of task {first}) is sent again\n")
        assert (await all_of_it.ended([first]))[0]["result"]["stdout"] == "one\n"
        code, _, err = await cli(host.command("dead-letters", "drop", str(by_task[second]["id"]), "999999"))
        assert (code, "there is no dead letter 999999" in err) == (4, True)
        assert (await host.get("/queue/status"))["dead_letters"] == 0


async def _is(all_of_it: Fleet, expected: list[str]) -> bool:
    return await blocks(all_of_it) == expected


async def _canaries(all_of_it: Fleet, state: str, count: int) -> bool:
    page = await all_of_it.host.get(f"/tasks?label=remotegpu%3Dcanary&state={state}")
    return bool(page["total"] >= count)
