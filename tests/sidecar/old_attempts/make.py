"""Makes the attempt directories of this release, which every later one must load.

Run `python -m tests.sidecar.old_attempts.make` once, when a release is made; what it has written under the release's
number is checked in and never made again. `expected.json` beside them is what the release's own reader found in each.
Boot ids become one that no host has.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from remotegpu_agent import VERSION
from remotegpu_schemas.attempt import AttemptId, Memo, RunNo, RunSpec, TaskUser
from remotegpu_schemas.task import Task, TaskId
from remotegpu_sidecar import record
from remotegpu_sidecar.identity import boot_id, boottime_ns
from remotegpu_sidecar.launcher import Launcher, LaunchError, Run
from remotegpu_sidecar.output import read_output

FOLDER: Final = Path(__file__).parent
FAKE_BOOT: Final = "00000000-0000-4000-8000-000000000000"
S: Final = 1_000_000_000
_LOUD: Final = (
    "i=0; while [ $i -lt 3000 ]; do echo line $i of many, many lines of output; i=$((i+1)); done; echo bad >&2"
)


def spec(name: str, script: str, **changes: Any) -> RunSpec:
    """A run of a shell script, with nothing of this host in it."""
    task = Task(id=f"task-{name}", command=script)
    values: dict[str, Any] = {
        "task_id": TaskId(task.id),
        "attempt_id": AttemptId(name),
        "run_no": RunNo(1),
        "argv": ("/bin/sh", "-c", script),
        "env": {"PATH": "/usr/bin:/bin", "REMOTEGPU_ATTEMPT_ID": name, "REMOTEGPU_RUN_NUMBER": "1"},
        "cwd": "/",
        "grace_period_s": 1.0,
        "memo": Memo(task=task, origin="local", submitted_at_ms=1_000, started_at_ms=2_000).model_dump(mode="json"),
    }
    return RunSpec(**{**values, **changes})


async def make(attempts: Path) -> None:
    """One directory for each way that a run may be found."""
    async with _launcher(attempts) as launcher:
        await _ended(launcher, spec("ended", f"{_LOUD}; exit 3", output_limit_bytes=64 * 1024, output_segments=8))
        await _ended(launcher, spec("signal", "kill -9 $$"))
        await _ended(launcher, spec("timeout", "sleep 60", timeout_s=0.2))
        user = TaskUser(name="root", uid=0, gid=0, groups=(0,), home="/root")
        await _ended(launcher, spec("user", "id -u", user=user, umask=0o077))
        await _ended(launcher, spec("no-program", "none", argv=("/no/such/program",)))
        warned = spec("warned", "trap 'echo warned' USR1; sleep 0.5; sleep 0.5", timeout_s=20, warn_signal=10)
        await _ended(launcher, warned.model_copy(update={"warn_before_s": 19.8}))
        leased = await launcher.launch(spec("lease", "sleep 60"), boottime_ns() + S // 2)
        await _end_of(leased)
        paused = await launcher.launch(spec("suspended", "sleep 0.3; exit 4"))
        await paused.wait_started()
        paused.suspend()
        await _until(lambda: "suspended" in _lines(paused.directory))
        paused.resume()
        await _end_of(paused)
        await _abandoned(launcher, attempts)
        open_run = await launcher.launch(spec("open", "echo begun; sleep 600"), boottime_ns() + 600 * S)
        await open_run.wait_started()
        await _until(lambda: bool(read_output(open_run.directory, "stdout", 0, 10)[1]))
        open_run.suspend()
        shutil.copytree(open_run.directory, attempts.parent / "open")
        open_run.kill()
        await _end_of(open_run)
        shutil.rmtree(open_run.directory)
        (attempts.parent / "open").rename(open_run.directory)
    never = attempts / "never.1"
    never.mkdir()
    line = record.encode("spec", spec("never", "true").model_dump_json().encode())
    (never / record.FILE_NAME).write_bytes(line)
    shutil.copytree(attempts / "signal.1", attempts / "torn.1")
    content = (
        (attempts / "torn.1" / record.FILE_NAME).read_text().replace('"attempt_id":"signal"', '"attempt_id":"torn"')
    )
    _rewrite(attempts / "torn.1", content.encode())
    whole = (attempts / "torn.1" / record.FILE_NAME).read_bytes()
    (attempts / "torn.1" / record.FILE_NAME).write_bytes(whole[:-40])


async def _ended(launcher: Launcher, what: RunSpec) -> None:
    await _end_of(await launcher.launch(what))


async def _end_of(run: Run) -> None:
    await run.wait()
    run.close()


async def _abandoned(launcher: Launcher, attempts: Path) -> None:
    async def refuse(_shim: object) -> str | None:
        raise OSError(1, "no place")

    try:
        await launcher.launch(spec("abandoned", "true"), place=refuse)
    except LaunchError:
        await _until(lambda: "ended" in _lines(attempts / "abandoned.1"))


def _lines(directory: Path) -> dict[str, dict[str, object]]:
    return record.read(directory / record.FILE_NAME)[0]


async def _until(fact: Any) -> None:
    async with asyncio.timeout(20):
        while not fact():  # noqa: ASYNC110 - other processes set no event of ours
            await asyncio.sleep(0.02)


@asynccontextmanager
async def _launcher(attempts: Path) -> AsyncGenerator[Launcher]:
    launcher = Launcher(attempts)
    await launcher.start()
    yield launcher
    await launcher.stop()


def _rewrite(directory: Path, content: bytes) -> None:
    """Each line anew, with the boot id that no host has, and its checksum."""
    lines = []
    for line in content.splitlines():
        value = json.loads(line)
        data = json.dumps(value["data"]).replace(boot_id(), FAKE_BOOT)
        lines.append(record.encode(value["kind"], data.encode()))
    (directory / record.FILE_NAME).write_bytes(b"".join(lines))


def describe(directory: Path) -> dict[str, object]:
    """What the test holds against what a later release finds."""
    lines = _lines(directory)
    out, err = (read_output(directory, stream, 0, 1 << 20) for stream in ("stdout", "stderr"))
    tail = read_output(directory, "stdout", -20, 20)
    return {
        "lines": lines,
        "stdout": [out[0], len(out[1]), out[2]],
        "stderr": err[1].decode(),
        "tail": tail[1].decode(),
    }


def main() -> None:
    """Make the release's directory; an existing one is left alone."""
    target = FOLDER / VERSION
    if target.exists():
        raise SystemExit(f"{target} is there; a release's attempts are made once")
    os.umask(0o022)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as name:
        attempts = Path(name) / "attempts"
        asyncio.run(make(attempts))
        for directory in attempts.iterdir():
            if directory.name != "torn.1":
                _rewrite(directory, (directory / record.FILE_NAME).read_bytes())
        expected = {each.name: describe(each) for each in sorted(attempts.iterdir())}
        shutil.copytree(attempts, target / "attempts")
        (target / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
