"""`status`: how the agent is, for somebody who was just woken up."""

from __future__ import annotations

from typing import Any

from remotegpu_agent.cli.context import Globals

_TASK_ORDER = ("running", "assigned", "pending", "suspended", "preempted", "completed", "failed", "cancelled")


def status(options: Globals) -> None:
    """Show the state of the agent: why it is not ready, the control plane, capacity, counts, reports that wait.

    Example: remotegpu-agent status --json
    """
    from remotegpu_agent.cli import output

    found = options.client().get("/queue/status")
    if options.is_json:
        output.print_json(found)
        return
    output.print_record(_pairs(found), options)


def _pairs(found: dict[str, Any]) -> list[tuple[str, str]]:
    from remotegpu_agent.cli.output import span

    reasons = found.get("reasons") or []
    state = str(found.get("state", "")) + ("".join(f"\n- {reason}" for reason in reasons))
    dead = found.get("dead_letters") or 0
    reports = f"{found.get('reports_waiting', 0)} waiting for the control plane"
    if dead:
        reports += f"\nproblem: {dead} refused for good (dead letters)"
    return [
        ("state", state),
        ("control plane", _control_plane(found.get("control_plane") or {})),
        ("tasks", _tasks(found.get("tasks") or {})),
        ("capacity", _capacity(found.get("capacity") or {})),
        ("reports", reports),
        ("agent", f"{found.get('agent_id')} on machine {found.get('machine_id')}"),
        ("version", f"{found.get('version')}, up {span(found.get('uptime_s') or 0.0)}"),
    ]


def _control_plane(plane: dict[str, Any]) -> str:
    from remotegpu_agent.cli.output import age, local_time

    if not plane.get("url"):
        return "none (stand-alone)"
    last = plane.get("last_contact_at")
    contact = f"last contact {age(last)} ago ({local_time(last)})" if last else "no contact yet"
    if plane.get("is_connected"):
        state = "connected" if plane.get("is_registered") else "connected, not registered yet"
    else:
        state = "problem: not connected"
    lines = [f"{state}, {contact}", str(plane["url"])]
    if plane.get("error"):
        lines.append(str(plane["error"]))
    return "\n".join(lines)


def _tasks(counts: dict[str, Any]) -> str:
    order = [*_TASK_ORDER, *sorted(set(counts) - set(_TASK_ORDER))]
    return ", ".join(f"{counts[name]} {name}" for name in order if counts.get(name)) or "none"


def _capacity(capacity: dict[str, Any]) -> str:
    def part(used: str, all_of: str, unit: str) -> str:
        return f"{capacity.get(used, 0):g} of {capacity.get(all_of, 0):g} {unit}"

    memory = f"{capacity.get('memory_mb_used', 0) / 1024:.1f} of {capacity.get('memory_mb', 0) / 1024:.1f} GiB"
    slots = part("slots_used", "slots", "slots")
    return f"{slots}, {part('cpus_used', 'cpus', 'CPUs')}, {memory} used by running tasks"
