"""F29: a loud task within `output: {max_size_mb: 1, retain: 1}`, followed from before its first line to its last."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, Final

from remotegpu_schemas import limits
from tests.end_to_end.agent_process import AgentProcess, agent
from tests.end_to_end.gates import Gate
from tests.waiting import until_so

RETAIN: Final = 1
FILES_MAX: Final = 2 * (RETAIN + 1)
LINE_BYTES: Final = 64
PART_BYTES: Final = limits.MIB // FILES_MAX
"""One file's worth: a reader who has a part whole loses nothing by the next one."""
LINES: Final = PART_BYTES // LINE_BYTES
PARTS, PACED_PARTS = 32, 16
END: Final = PARTS * PART_BYTES
WHOLE: Final = b"".join(b"%063d\n" % number for number in range(PARTS * LINES))
"""8 MiB on each stream, of which at most one of both is kept."""


class Follower:
    """What has come to somebody who follows standard output, piece by piece, and whether it was true."""

    def __init__(self) -> None:
        self.next_offset = 0
        self.gaps = 0
        self.is_end = False

    def take(self, chunk: dict[str, Any]) -> None:
        """One event: it does not go back, and has the bytes of its offset."""
        offset, text = chunk["offset"], chunk["text"].encode()
        assert chunk["next_offset"] == offset + len(text)
        assert offset >= self.next_offset
        assert text == WHOLE[offset : chunk["next_offset"]], offset
        self.gaps += offset > self.next_offset
        self.next_offset, self.is_end = chunk["next_offset"], chunk["is_end"]

    async def take_all(self, events: AsyncIterator[dict[str, Any]]) -> None:
        """Until the output ends."""
        async for chunk in events:
            self.take(chunk)


@contextlib.asynccontextmanager
async def events(host: AgentProcess, task_id: str) -> AsyncGenerator[AsyncIterator[dict[str, Any]]]:
    """The Server-Sent Events of a task's output; what is not asked for is not read."""
    async with host.session().get(f"http://localhost/api/v1/tasks/{task_id}/logs?follow=1") as answer:
        assert answer.content_type == "text/event-stream"

        async def read() -> AsyncGenerator[dict[str, Any]]:
            left = b""
            async for data in answer.content.iter_any():
                *whole, left = (left + data).split(b"\n\n")
                for event in whole:
                    for line in event.splitlines():
                        if line.startswith(b"data: "):
                            yield json.loads(line.removeprefix(b"data: "))

        async with contextlib.aclosing(read()) as found:
            yield found


class PrintedOutput:
    """What `logs -f` prints."""

    def __init__(self) -> None:
        self.text = bytearray()

    async def take_all(self, command: list[str]) -> int:
        """Until it ends; its exit code."""
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert child.stdout is not None
        try:
            while data := await child.stdout.read(limits.MIB):
                self.text += data
            return await child.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()

    def check(self) -> None:
        """Whole lines, each further on than the one before, up to the last; nothing lost of what was paced."""
        assert self.text[: PACED_PARTS * PART_BYTES] == WHOLE[: PACED_PARTS * PART_BYTES]
        lines = self.text.splitlines(keepends=True)
        assert {len(line) for line in lines} == {LINE_BYTES}
        numbers = [int(line) for line in lines]
        assert all(before < after for before, after in itertools.pairwise(numbers))
        assert numbers[-1] == PARTS * LINES - 1


def have_all(fast: Follower, printed: PrintedOutput, end: int) -> bool:
    """Whether both have come up to here."""
    return fast.next_offset >= end and len(printed.text) >= end


async def assert_bounded(host: AgentProcess, task_id: str, end: int) -> None:
    """Once both streams are on disk up to here: their files are as many as `retain` says, and within the bound."""
    for stream in ("stdout", "stderr"):
        await host.until_shown(
            f"/tasks/{task_id}/logs?stream={stream}&offset=-1", lambda piece: bool(piece["next_offset"] >= end)
        )
    sizes: dict[str, list[int]] = {"stdout": [], "stderr": []}
    for path in (host.state_dir / "attempts").rglob("std*.*"):
        sizes[path.name.partition(".")[0]].append(path.stat().st_size)
    parts = end // PART_BYTES
    assert {stream: len(files) for stream, files in sizes.items()} == dict.fromkeys(sizes, min(parts, RETAIN + 1))
    assert sum(map(sum, sizes.values())) <= limits.MIB


async def test_f29_followers_of_a_flood_get_true_lines_up_to_its_end(tmp_path: Path) -> None:
    """F29: who keeps up misses nothing, who does not has a gap; every line is at its offset; `retain` bounds files."""
    gates = [Gate(tmp_path / f"gate-{part}") for part in range(PARTS)]
    script = "\n".join(
        f"{gate.wait}; for to in 1 2; do seq -f %063.0f {part * LINES} {part * LINES + LINES - 1} >&$to; done"
        for part, gate in enumerate(gates)
    )
    fast, slow, printed = Follower(), Follower(), PrintedOutput()
    async with agent(tmp_path / "host", output={"max_size_mb": 1, "retain": RETAIN}) as host:
        task_id = await host.submit(script=script)
        async with events(host, task_id) as fast_events, events(host, task_id) as slow_events:
            async with asyncio.TaskGroup() as readers:
                readers.create_task(fast.take_all(fast_events))
                program = readers.create_task(printed.take_all(host.command("logs", "-f", task_id)))
                for end, gate in enumerate(gates[:PACED_PARTS], start=1):
                    gate.open()
                    await until_so(functools.partial(have_all, fast, printed, end * PART_BYTES))
                    await assert_bounded(host, task_id, end * PART_BYTES)
                assert fast.gaps == 0
                for gate in gates[PACED_PARTS:]:
                    gate.open()
            assert (program.result(), fast.next_offset, fast.is_end) == (0, END, True)
            printed.check()
            assert (await host.wait_for(task_id))["state"] == "completed"
            await slow.take_all(slow_events)
            assert (slow.next_offset, slow.is_end) == (END, True)
            assert slow.gaps > 0
        await assert_bounded(host, task_id, END)
