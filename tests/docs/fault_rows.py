"""The rows of the fault table: what goes wrong, what must hold, which promises that keeps, and what is still missing.

Written by hand; the tests of each row are found in the tree (`reliability.py`). As long as the table is: it is data.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

PROMISES: Final = {
    1: "A claimed task is never lost: it is on disk before the agent acts on it, its result before anyone is told.",
    2: "A task under a lease never runs twice at once: its process tree is dead when the lease ends, whatever became "
    "of the agent. (A running shim and kernel are assumed; a paused virtual machine is out of reach.)",
    3: "A running task survives the agent: crash, `kill -9`, upgrade, restart. The next agent adopts it.",
    4: "Every report arrives, at least once, and counts once. Outages of any length cost delay only.",
    5: "Nothing of a task outlives it: its whole process tree goes.",
    6: "Nobody else's process is ever signalled.",
    7: "One bad input never hurts another task: a clear error, bounded memory, and the rest goes on.",
    8: "Nobody acts without a right to.",
}


class Part(enum.StrEnum):
    """A part of the agent that is not built yet."""

    GPUS = "GPUs (issue 5 of 7)"
    SERVICES = "managed services (issue 6 of 7)"
    RESULTS = "results in object stores (issue 6 of 7)"
    WEBHOOKS = "webhooks (issue 4 of 7)"
    SCHEDULES = "schedules (issue 4 of 7)"
    GROUPS = "groups and repeats (issue 4 of 7)"
    SPOOL = "the watched folder (issue 4 of 7)"
    PACKAGE = "units and package (issue 6 of 7)"


@dataclass(frozen=True)
class Row:
    """One row. `waits_for` is the part that (the rest of) it needs; `figure` was measured, and says where."""

    fault: str
    holds: str
    promises: tuple[int, ...]
    waits_for: Part | None = None
    figure: str = ""


ROWS: Final[dict[str, Row]] = {
    "F01": Row(
        "agent killed after the claim's answer, before it is stored",
        "the task comes back after its lease; once",
        (1, 2),
    ),
    "F02": Row(
        "agent killed after storing, before launch",
        "it is launched after the restart if the lease still holds, else returned; once",
        (1, 2),
    ),
    "F03": Row(
        "agent killed between launch and storing the process identity",
        "adopted from the attempt directory; once",
        (2, 3),
    ),
    "F04": Row(
        "agent killed while the task runs",
        "the task goes on, is adopted, its output is whole, its exit status is right",
        (3,),
        figure="100 running tasks are adopted in 0.8 s from the agent's start (`end_to_end/test_adoption.py`)",
    ),
    "F05": Row(
        "agent killed after the exit, before the result is stored", "stored and reported after the restart", (3, 4)
    ),
    "F06": Row("agent killed after the report was sent, before the answer", "sent again, counted once", (4,)),
    "F07": Row(
        "agent killed 100 times at random moments over 500 tasks",
        "all results right, none twice",
        (1, 2, 3, 4),
        figure="500 tasks, 100 kills in 431 s, one attempt fenced, nothing lost, nothing twice "
        "(`chaos/test_kills.py` at full length)",
    ),
    "F08": Row("spawner killed", "a new spawner; running tasks untouched", (3,)),
    "F09": Row(
        "shim killed (agent alive, or dead until its next start)",
        "the whole tree is stopped, the run is `agent_lost`, its GPU free again",
        (5,),
        Part.GPUS,
    ),
    "F10": Row(
        "agent frozen (SIGSTOP) past a lease",
        "the shim kills at the deadline; when thawed, the agent reports `lease_lost`",
        (2,),
    ),
    "F11": Row(
        "partition longer than the lease",
        "dead at or before the deadline; the result of what finished in time is still delivered",
        (2, 4),
    ),
    "F12": Row(
        "partition longer than the lease, `on_unreachable: continue`", "goes on; stopped only by 30001-30004", (3,)
    ),
    "F13": Row("lost answer on claim, start, renew, progress, complete", "repeated without harm; once", (1, 4)),
    "F14": Row(
        "the control plane gives the attempt to another",
        "30001: the own process is stopped, the newer attempt never touched",
        (2,),
    ),
    "F15": Row("renew refused with 30003", "the tree is stopped within the grace period", (2, 5)),
    "F16": Row(
        "control plane down for an hour with 1,000 finished tasks",
        "all delivered, in order per attempt, in bounded memory, without a stampede",
        (4,),
        figure="1,102 reports within 3.0 s of the outage's end, at most 18 calls at once, memory from 65 to 68 MiB "
        "(`chaos/test_outage.py`)",
    ),
    "F17": Row(
        "401 or 403",
        "keeps running, keeps results, slow retry, visible everywhere, recovers by itself with a new token file",
        (3, 4),
    ),
    "F18": Row("429 and 503 with Retry-After", "obeyed", (4,)),
    "F19": Row(
        "malformed, truncated, huge, slow, wrong-type answers",
        "bounded read, clear log, retried, nothing crashes",
        (7,),
        figure="48 MiB in answer to each call raise the agent's peak memory by 34 MiB, from 66 "
        "(`end_to_end/test_bad_answers.py`)",
    ),
    "F20": Row("wall clock jumps by a day either way; host suspended", "leases, timeouts and cron behave", (2,)),
    "F21": Row(
        "reboot, orderly shutdown",
        "open runs end as `host_rebooted` or `host_shutdown`, reported, `on_reboot` obeyed; services start",
        (1, 4),
        Part.SERVICES,
    ),
    "F22": Row("process id reused by a stranger", "never signalled", (6,)),
    "F23": Row(
        "power cut during writes",
        "no committed row lost, no torn attempt directory",
        (1,),
        figure="22 tasks had been answered for when the power went, all were known afterwards (`system/guest.py`)",
    ),
    "F24": Row(
        "disk full", "running tasks go on; new ones are refused with a reason; recovers when there is room", (1, 7)
    ),
    "F25": Row("read-only state directory", "start refused with a clear message; while running as F24", (7,)),
    "F26": Row(
        "database locked by a backup, corrupted, or from a newer version",
        "waits; moved aside and rebuilt; refused",
        (1, 3),
    ),
    "F27": Row(
        "no descriptors, no processes, no memory left",
        "the attempt is `launch_failed` and retried; the agent lives",
        (7,),
    ),
    "F28": Row(
        "OOM kill of a task, of the whole scope", "the cause says so; the shim, the agent and others live", (7,)
    ),
    "F29": Row(
        "10 GB of output, no newlines, invalid UTF-8, closed pipes, inherited pipes",
        "bounded files, flat memory, true offsets, the end detected",
        (7,),
    ),
    "F30": Row(
        "double fork, setsid, nohup, SIGTERM ignored, fork bomb in limits",
        "the whole tree is gone after the grace period",
        (5,),
    ),
    "F31": Row("timeout, cancellation, stop and natural end at the same moment", "one outcome, the first; once", (4,)),
    "F32": Row(
        "stop by process id: unknown, foreign, reused, finished, 1, the agent itself, negative",
        "a business code each, no signal",
        (6, 8),
    ),
    "F33": Row(
        "YAML: duplicate keys, bombs, 100 MB, deep nesting, wrong types, links, devices, half-written files, "
        "10,000 files at once",
        "each file accepted or refused with a reason; the agent stays responsive",
        (7,),
        Part.SPOOL,
    ),
    "F34": Row("ids with path parts, NUL, 10 kB, unicode look-alikes", "refused at the edge", (7, 8)),
    "F35": Row(
        "HTTP: no or wrong token, slow-loris, huge headers and bodies, pipelining, bad JSON, 1,000 connections, "
        "unknown methods",
        "bounded; others are served",
        (7, 8),
    ),
    "F36": Row("two agents on one state directory", "the second is refused", (2,)),
    "F37": Row(
        "SIGTERM once, twice; `drain` with running tasks",
        "claims no more, leaves tasks running (or waits, if asked); the second signal returns at once",
        (3,),
    ),
    "F38": Row(
        "upgrade: the old agent's attempts, database and shims under the new agent",
        "adopted; a checked-in old state directory loads",
        (3,),
    ),
    "F39": Row(
        "service: crash loop, hang, failed health check, killed", "backoff, visible, restarted", (3,), Part.SERVICES
    ),
    "F40": Row(
        "GPU off the bus, Xid, ECC, NVML hang, driver upgrade under way",
        "GPU withdrawn, its task told apart as `gpu_fault`, the rest untouched",
        (7,),
        Part.GPUS,
    ),
    "F41": Row(
        "foreign process or leaked memory on a GPU",
        "not given out, the reason shown, comes back by itself",
        (6, 7),
        Part.GPUS,
    ),
    "F42": Row("GPU allocations after any kill", "never two exclusive tasks on one GPU", (2,), Part.GPUS),
    "F43": Row(
        "object store refuses, is slow, dies in a multipart upload",
        "resumed; the result itself is not held back for ever",
        (4,),
        Part.RESULTS,
    ),
    "F44": Row("webhook receiver dead or hostile", "bounded, dead letter", (7,), Part.WEBHOOKS),
    "F45": Row(
        "systemd: restart, watchdog, stop timeout, OOM score, credentials, ProtectSystem",
        "as documented",
        (3, 8),
        Part.PACKAGE,
    ),
    "F46": Row(
        "schedules over DST changes, missed runs, leap day", "each due time once, by `catch_up`", (1,), Part.SCHEDULES
    ),
    "F47": Row(
        "circuit breaker over restarts", "stays open; only `reset` with name and reason closes it", (8,), Part.GROUPS
    ),
    "F48": Row("100,000 queued tasks", "start-up, memory and latency as in the benchmarks; listing paged", (7,)),
    "F49": Row("secrets in config, environment, command lines", "never in logs, API, audit, error files", (8,)),
    "F50": Row(
        "control plane sends the same task twice, an unknown type, a task for another machine, an expired lease",
        "ignored or refused by rule; visible",
        (2, 7),
    ),
    "F51": Row(
        "the plane answers bare 404, 409, 410 during a database hiccup",
        "no run is killed, no result discarded; the deadline alone decides",
        (3, 4),
    ),
    "F52": Row(
        "a task plants links, devices, fifos, huge files where the agent reads",
        "read as the task's user, regular files only, bounded; no secret leaks",
        (7, 8),
    ),
    "F53": Row("every task fails at once on a broken host", "the breaker stops claims after K, a canary reopens", (7,)),
    "F54": Row(
        "a stranger holds GPU memory; a run leaves a process with a context",
        "not given out, the holder named; released only when proven clean",
        (5, 6),
        Part.GPUS,
    ),
    "F55": Row(
        "loss of contact shorter than the lease",
        "nothing is killed, nothing is reported twice",
        (3, 4),
        figure="with the default config a loss of 60 s kills nothing from a lease of 229 s on (300 s is the default), "
        "from 167 s on where connections are refused (`simulation/test_contact.py`)",
    ),
}
