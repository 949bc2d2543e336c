"""A task is warned some time before its timeout and before its lease's stop, if it listens."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from remotegpu_schemas.attempt import EndedBy
from remotegpu_sidecar.identity import boottime_ns
from remotegpu_sidecar.launcher import Launcher
from remotegpu_sidecar.output import read_output
from tests.sidecar.support import launched, make_spec, sh, until, until_file
from tests.sidecar.test_shim import ended_of

S = 1_000_000_000
WARN: dict[str, Any] = {"warn_signal": int(signal.SIGUSR1)}
LISTENS = "trap 'echo warned' USR1; trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done"


async def test_warned_before_the_timeout_once(launcher: Launcher) -> None:
    """The warning comes first, the stop signal at the timeout; the cause is the timeout."""
    spec = make_spec(*sh(LISTENS), timeout_s=1.0, warn_before_s=0.5, **WARN)
    run = await launched(launcher, spec)
    ended = await ended_of(run)
    assert read_output(run.directory, "stdout", 0, 100)[1] == b"up\nwarned\nbye\n"
    assert (ended.ended_by, ended.exit_code) == (EndedBy.TIMEOUT, 0)


async def test_warned_before_the_lease_ends(launcher: Launcher) -> None:
    """Before its stop, which is a grace before the deadline."""
    spec = make_spec(*sh(LISTENS), lease_grace_s=0.5, lease_warn_s=0.5, **WARN)
    run = await launched(launcher, spec, boottime_ns() + 2 * S)
    ended = await ended_of(run)
    assert read_output(run.directory, "stdout", 0, 100)[1] == b"up\nwarned\nbye\n"
    assert ended.ended_by is EndedBy.LEASE


async def test_renewal_in_time_takes_the_warning_back(launcher: Launcher, tmp_path: Path) -> None:
    """The shim reads the deadline again before it warns; the renewed one has a warning of its own."""
    script = f"trap 'echo warned' USR1; trap 'exit 0' TERM; until [ -e {tmp_path}/go ]; do sleep 0.01; done"
    spec = make_spec(*sh(script), lease_warn_s=59.5, **WARN)
    run = await launched(launcher, spec, boottime_ns() + 60 * S)
    run.extend(boottime_ns() + 120 * S)
    before_ns = boottime_ns()
    await until(lambda: boottime_ns() > before_ns + S, "the first warning's time to pass")
    (tmp_path / "go").touch()
    ended = await ended_of(run)
    assert (ended.ended_by, ended.exit_code, ended.stdout_bytes) == (EndedBy.EXIT, 0, 0)


async def test_who_does_not_listen_is_not_killed_by_a_warning(launcher: Launcher, tmp_path: Path) -> None:
    """The shell that has no handler, its child and a daemon live on; only the one with a handler hears it."""
    listener = "trap 'echo warned >&2' USR1; while :; do sleep 0.01; done"
    script = f'setsid sh -c "{listener}" & setsid sleep 1000 & sleep 1000 & echo up >{tmp_path}/up; wait; echo no'
    spec = make_spec(*sh(script), timeout_s=1.5, warn_before_s=1.0, grace_period_s=5, **WARN)
    run = await launched(launcher, spec)
    await until_file(tmp_path / "up")
    await until(lambda: read_output(run.directory, "stderr", 0, 100)[1] == b"warned\n", "the warning")
    assert run.started is not None
    assert run.contains(run.started.process.pid)
    ended = await ended_of(run)
    assert (ended.ended_by, ended.signal, ended.stdout_bytes) == (EndedBy.TIMEOUT, signal.SIGTERM, 0)
