"""A drain that the control plane orders in the answers to heartbeats."""

from __future__ import annotations

import json
from pathlib import Path

from control_plane.faults import Respond
from tests.end_to_end.fleet import fleet
from tests.end_to_end.gates import Gate
from tests.waiting import DEADLINE_S


def drain_answer(*, wants_drain: bool) -> Respond:
    """A heartbeat's answer that orders a drain, or takes it back."""
    body = {"code": 0, "message": "ok", "data": {"status": "ok", "drain": wants_drain}}
    return Respond(200, json.dumps(body).encode(), {"Content-Type": "application/json"})


async def test_f37_a_drain_that_the_plane_orders_by_heartbeat(tmp_path: Path) -> None:
    """F37: `drain: true` stops claims, not the running task's lease or heartbeats; `drain: false` ends it."""
    gate = Gate(tmp_path / "gate")
    polls = {"heartbeat_interval": 0.2, "long_poll": 0, "poll_interval": 0.1}
    async with fleet(tmp_path, {"control_plane": polls}) as all_of_it:
        host, faults = all_of_it.host, all_of_it.plane.faults
        [running] = await all_of_it.submit({"command": f"{gate.wait}; echo whole", "lease_ttl_sec": 6})
        await host.wait_running(running)
        faults.order_always("heartbeat", drain_answer(wants_drain=True))
        status = await host.until_shown("/queue/status", lambda status: status["state"] == "draining")
        assert [block["kind"] for block in status["blocks"]] == ["draining"]
        assert status["reasons"] == ["draining: the control plane asked for no more tasks on this host"]
        await faults.wait_calls("heartbeat", faults.calls["heartbeat"] + 2, DEADLINE_S)  # no claim is on its way now
        claims, renewals = faults.calls["claim"], faults.calls["renew"]
        [later] = await all_of_it.submit({"command": "true"})
        await faults.wait_calls("renew", renewals + 2, DEADLINE_S)
        await faults.wait_calls("heartbeat", faults.calls["heartbeat"] + 2, DEADLINE_S)
        assert faults.calls["claim"] == claims
        assert [(await all_of_it.operator.task(each))["status"] for each in (running, later)] == ["running", "pending"]
        faults.order_always("heartbeat", drain_answer(wants_drain=False))
        assert (await all_of_it.ended([later]))[0]["status"] == "completed"
        assert (await host.get("/queue/status"))["state"] == "ready"
        gate.open()
        assert (await all_of_it.ended([running]))[0]["result"]["stdout"] == "whole\n"
