"""`show`: one task with its runs, and the end of its standard error if it failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from remotegpu_agent.cli.arguments import Argument
from remotegpu_agent.cli.context import Globals

if TYPE_CHECKING:
    from remotegpu_agent.cli.output import Column

STDERR_LINES = 20


def show(
    options: Globals,
    task_id: Annotated[str, Argument(metavar="ID", text="The task, by id or unique prefix.")],
) -> None:
    """Show one task: state, cause, runs, and the last 20 lines of standard error of what failed.

    Example: remotegpu-agent show 0198a2
    """
    from remotegpu_agent.cli import output
    from remotegpu_agent.cli.client import task_path
    from remotegpu_agent.cli.following import tail_of

    client = options.client()
    detail = client.get(task_path(task_id))
    has_failed = detail.get("state") in {"failed", "cancelled"} and bool(detail.get("runs"))
    tail = tail_of(client, task_path(str(detail.get("id"))), "stderr", STDERR_LINES) if has_failed else []
    if options.is_json:
        output.print_json({**detail, "stderr_tail": tail})
        return
    output.print_record([pair for pair in _pairs(detail) if pair[1]], options)
    if detail.get("runs"):
        print()
        output.print_table(_run_columns(), [_run_row(run) for run in detail["runs"]], options)
    if tail:
        print("\nlast lines of standard error:")
        for line in tail:
            print("  " + output.clean(line))


def _pairs(detail: dict[str, Any]) -> list[tuple[str, str]]:
    from remotegpu_agent.cli.output import age, local_time

    task = detail.get("task") or {}
    state = str(detail.get("state", ""))
    if detail.get("is_stopping"):
        state += " (stopping)"
    ran = age(detail.get("started_at"), detail.get("ended_at"))
    progress = detail.get("progress_percent")
    lease = detail.get("lease_left_s")
    return [
        ("id", str(detail.get("id", ""))),
        ("name", str(detail.get("name") or "")),
        ("state", state),
        ("cause", str(detail.get("cause") or "")),
        ("exit code", _text(detail.get("exit_code"))),
        ("error", str(detail.get("error") or "")),
        ("waits because", str(detail.get("reason") or "")),
        ("progress", f"{progress:g} % {detail.get('progress_message') or ''}" if progress is not None else ""),
        ("command", str(detail.get("command") or "")),
        ("directory", str(task.get("workdir") or "")),
        ("priority", _text(detail.get("priority"))),
        ("labels", ", ".join(f"{key}={value}" for key, value in (detail.get("labels") or {}).items())),
        ("origin", str(detail.get("origin", "")).replace("_", " ")),
        ("attempt", str(detail.get("attempt_id") or "")),
        ("process", _text(detail.get("process_id"))),
        ("retries", f"{detail.get('retries_used', 0)} of {detail.get('max_retries', 0)}"),
        ("submitted", local_time(detail.get("submitted_at"))),
        ("started", local_time(detail.get("started_at"))),
        ("ended", local_time(detail.get("ended_at"))),
        ("ran", ran),
        ("used", _used(detail.get("runs") or [])),
        ("lease left", f"{lease:.0f} s" if isinstance(lease, int | float) else ""),
        ("reported", "" if detail.get("is_synced", True) else "not yet"),
    ]


def _used(runs: list[dict[str, Any]]) -> str:
    """What the last run that has ended used."""
    usage = next((run["usage"] for run in reversed(runs) if run.get("usage")), None)
    if usage is None:
        return ""
    parts = (  # 15 digits: with :g a day on many CPUs would be a power of ten
        ("cpu_s", "{:.15g} s of CPU"),
        ("memory_peak_mb", "{:.15g} MiB of memory"),
        ("io_read_mb", "{:.15g} MiB read"),
        ("io_write_mb", "{:.15g} MiB written"),
    )
    return ", ".join(text.format(usage[key]) for key, text in parts if usage.get(key))


def _run_columns() -> tuple[Column, ...]:
    from remotegpu_agent.cli.output import Column

    return (
        Column("run", is_right=True),
        Column("state"),
        Column("cause"),
        Column("exit", is_right=True),
        Column("signal", is_right=True),
        Column("pid", is_right=True),
        Column("started"),
        Column("ran", is_right=True),
        Column("error", is_wide=True),
    )


def _run_row(run: dict[str, Any]) -> tuple[str, ...]:
    from remotegpu_agent.cli.output import age, local_time

    return (
        _text(run.get("run_no")),
        str(run.get("state") or ""),
        str(run.get("cause") or ""),
        _text(run.get("exit_code")),
        _text(run.get("signal")),
        _text(run.get("process_id")),
        local_time(run.get("started_at")),
        age(run.get("started_at"), run.get("ended_at")),
        str(run.get("error") or ""),
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)
