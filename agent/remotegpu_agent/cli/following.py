"""Waiting for tasks and following their output, over restarts of the agent: runs outlive it, so a wait must too."""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from remotegpu_agent.cli.client import Client, Json, task_path
from remotegpu_agent.cli.context import say
from remotegpu_agent.cli.exits import INVALID_PARAMETERS, UNAVAILABLE, Exit, RefusedByAgent, Unreachable

FINAL_STATES: Final = frozenset({"completed", "failed", "cancelled"})
_LONG_POLL_S: Final = 60.0
_NEXT_RUN_POLL_S: Final = (0.1, 2.0)
"""The first time and the longest one."""
_RECONNECT_FOR_S: Final = 120.0
_RECONNECT_PAUSE_S: Final = 0.5
_EXIT_TIMED_OUT: Final = 124


class Patience:
    """Lets an agent be away for a while, as when it is upgraded, and says so once each time.

    May be shared by the threads that follow the streams of one task.
    """

    def __init__(self) -> None:
        self._away_since: float | None = None
        self._lock = threading.Lock()

    def is_back(self) -> None:
        """The agent answers: the next absence is a new one."""
        self._away_since = None

    @contextmanager
    def for_absence(self) -> Generator[None]:
        """Swallow that the agent cannot be reached, after a pause, unless it has been so for too long."""
        try:
            yield
        except (Unreachable, RefusedByAgent) as error:
            if isinstance(error, RefusedByAgent) and error.business_code != UNAVAILABLE:
                raise
            if self._absence_s(error) > _RECONNECT_FOR_S:
                raise
            time.sleep(_RECONNECT_PAUSE_S)
        else:
            self.is_back()

    def _absence_s(self, error: Exception) -> float:
        """For how long the agent has been away; says so when that is news."""
        now = time.monotonic()
        with self._lock:
            is_news = self._away_since is None
            since = self._away_since = now if self._away_since is None else self._away_since
        if is_news:
            say(f"{error}. Trying again for {_RECONNECT_FOR_S:.0f} s; the task goes on meanwhile.")
        return now - since


def wait_for(client: Client, detail: Json) -> Json:
    """The task's detail once it has ended; `detail` is what it is now. Raises Stop."""
    path = task_path(str(detail.get("id")))
    patience = Patience()
    while detail.get("state") not in FINAL_STATES:
        with patience.for_absence():
            detail = client.get(path, (("wait", _LONG_POLL_S),), wait_s=_LONG_POLL_S)
    return detail


def exit_code_of(detail: Json) -> int:
    """The exit code that stands for an ended task: its own, 128 + n for a signal, 124 for a timeout, else OURS."""
    if detail.get("state") == "completed":
        return 0
    cause, code = detail.get("cause"), detail.get("exit_code")
    if cause == "timed_out":
        return _EXIT_TIMED_OUT
    if isinstance(code, int) and 0 < code < 256:
        return code
    runs = detail.get("runs")
    last = runs[-1] if isinstance(runs, list) and runs else {}
    signal = last.get("signal") if isinstance(last, dict) else None
    return 128 + signal if isinstance(signal, int) and cause == "signal" else int(Exit.OURS)


def worst(codes: Sequence[int]) -> int:
    """The exit code for several tasks: the highest."""
    return max(codes, default=0)


def describe_end(detail: Json) -> str:
    """One line on how a task ended."""
    line = f"task {detail.get('id')} {detail.get('state')}"
    if detail.get("state") == "completed":
        return line
    cause, code = detail.get("cause"), detail.get("exit_code")
    line += f": {cause}" if cause else ""
    line += f", exit code {code}" if code is not None else ""
    return line + (f" ({detail['error']})" if detail.get("error") else "")


def follow(client: Client, task_id: str, streams: Sequence[str], write: Callable[[str, str], None]) -> None:
    """Hand each piece of output to `write(stream, text)` as it comes, over all further runs, until the task ended.

    `write` is called from this thread only. Raises Stop.
    """
    pieces: queue.SimpleQueue[tuple[str, str] | BaseException | None] = queue.SimpleQueue()
    path, patience = task_path(task_id), Patience()

    def pump(stream: str) -> None:
        try:
            for text in _texts(client, path, stream, patience):
                pieces.put((stream, text))
            pieces.put(None)
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits for it
            pieces.put(error)

    for stream in streams:
        threading.Thread(target=pump, args=(stream,), daemon=True, name=f"follow-{stream}").start()
    still_open = len(streams)
    while still_open:
        piece = pieces.get()
        if piece is None:
            still_open -= 1
        elif isinstance(piece, BaseException):
            raise piece
        else:
            write(*piece)


def _texts(client: Client, path: str, stream: str, patience: Patience) -> Iterator[str]:
    run_no = 0
    while (run_no := _next_run(client, path, run_no, patience)) > 0:
        yield from follow_run(client, path, stream, 0, run_no, patience)


def _next_run(client: Client, path: str, after: int, patience: Patience) -> int:
    """The number of the run that follows, once there is one; 0 when the task ended without it."""
    wait_s, longest_s = _NEXT_RUN_POLL_S
    query: tuple[tuple[str, object], ...] = ()
    while True:
        with patience.for_absence():
            began = time.monotonic()
            detail = client.get(path, query, wait_s=wait_s if query else 0.0)
            numbers = [number for number in _run_numbers(detail) if number > after]
            if numbers:
                return min(numbers)
            if detail.get("state") in FINAL_STATES:
                return 0
            if query:
                # An agent that answers early (it stops, or cannot wait) is not asked in a tight loop.
                time.sleep(max(0.0, began + wait_s - time.monotonic()))
                wait_s = min(wait_s * 2, longest_s)
            query = (("wait", wait_s),)


def last_run(client: Client, path: str, run_no: int | None) -> tuple[str, int | None]:
    """The task's path by its whole id, and the run to follow: the last one, or the first as soon as it begins.

    A task that ended without a run keeps None, and the agent says what is the matter. Raises Stop.
    """
    detail = client.get(path)
    path = task_path(str(detail.get("id")))
    if run_no is None:
        run_no = max(_run_numbers(detail), default=0) or _next_run(client, path, 0, Patience()) or None
    return path, run_no


def _run_numbers(detail: Json) -> list[int]:
    runs = detail.get("runs")
    numbers = [run.get("run_no") for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []
    return [number for number in numbers if isinstance(number, int)]


def follow_run(
    client: Client, path: str, stream: str, offset: int, run_no: int | None, patience: Patience | None = None
) -> Iterator[str]:
    """The output of one run from `offset` (negative counts from the end) until it ends; resumes where it broke off."""
    patience = patience or Patience()
    is_ended = False
    while not is_ended:
        with patience.for_absence():
            query: list[tuple[str, Any]] = [("stream", stream), ("offset", offset), ("follow", 1)]
            if run_no is not None:
                query.append(("run", run_no))
            with client.follow(f"{path}/logs", query) as chunks:
                patience.is_back()
                for chunk in chunks:
                    offset, run_no = int(chunk["next_offset"]), int(chunk["run_no"])
                    is_ended = bool(chunk.get("is_end"))
                    if chunk.get("text"):
                        yield str(chunk["text"])
            if not is_ended:
                raise Unreachable("the agent ended the stream of output early")


def read_run(client: Client, path: str, stream: str, offset: int, run_no: int | None) -> Iterator[Json]:
    """The output of one run that is there now, chunk by chunk."""
    while True:
        query: list[tuple[str, Any]] = [("stream", stream), ("offset", offset)]
        if run_no is not None:
            query.append(("run", run_no))
        chunk = client.get(f"{path}/logs", query)
        yield chunk
        is_empty = not chunk.get("text") or int(chunk["next_offset"]) <= int(chunk["offset"])
        if is_empty or chunk.get("is_end"):
            return
        offset, run_no = int(chunk["next_offset"]), int(chunk["run_no"])


def tail_of(client: Client, path: str, stream: str, lines: int) -> list[str]:
    """The last lines of the last run's output; nothing if it has none."""
    try:
        chunks = list(read_run(client, path, stream, -64 * 1024, None))
    except RefusedByAgent as refusal:
        if refusal.business_code == INVALID_PARAMETERS:
            return []
        raise
    return "".join(str(chunk.get("text", "")) for chunk in chunks).splitlines()[-lines:]


def write_output(stream: str, text: str) -> None:
    """Standard output to standard output, standard error to standard error, at once."""
    target = sys.stderr if stream == "stderr" else sys.stdout
    target.write(text)
    target.flush()
