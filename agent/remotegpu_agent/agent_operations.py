"""What may be asked of the running agent, answered from its parts: `Operations` for the API.

Reads the store for everything that has been written down, and the parts for what is only in memory (reasons, leases).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from remotegpu_agent import VERSION, host, metrics, output_reading, process_stop
from remotegpu_agent.announcer import Announcer
from remotegpu_agent.canary import BreakerKeeper
from remotegpu_agent.clock import Clock
from remotegpu_agent.dead_letters import DeadLetters
from remotegpu_agent.directory_watch import DirectoryWatcher
from remotegpu_agent.dispatch import Dispatcher
from remotegpu_agent.draining import Drain
from remotegpu_agent.executor import Executor
from remotegpu_agent.host_watch import HostWatch
from remotegpu_agent.leases import LeaseKeeper
from remotegpu_agent.operations import Stream
from remotegpu_agent.output_reading import RunOutput
from remotegpu_agent.runspec import check_runnable
from remotegpu_agent.standing import Standing
from remotegpu_agent.supervise import Loops
from remotegpu_agent.task_user import Submitter, as_submitted
from remotegpu_agent.task_views import task_detail, task_view
from remotegpu_queue import units, views
from remotegpu_queue.rows import Attempt, Run
from remotegpu_queue.store import Store
from remotegpu_queue.units import NewAttempt
from remotegpu_schemas.api import (
    BlockView,
    Capacity,
    DeadLetter,
    DeadLetterPage,
    DrainAnswer,
    LogChunk,
    Ping,
    ProcessStopAnswer,
    ProcessStopRequest,
    QueueStatus,
    SystemInfo,
    TaskDetail,
    TaskPage,
    TaskView,
)
from remotegpu_schemas.attempt import AttemptId, RunNo
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.limits import STORE_PATIENCE_S
from remotegpu_schemas.states import Cause, RunState, TaskState
from remotegpu_schemas.task import Task
from remotegpu_schemas.wire import format_time


@dataclass(frozen=True, kw_only=True)
class AgentOperations:
    """See `remotegpu_agent.operations.Operations`, which says what each call does and refuses."""

    agent_id: str
    machine_id: str
    boot_id: str
    state_dir: Path
    attempts_dir: Path
    started_boottime_ns: int
    store: Store
    executor: Executor
    dispatcher: Dispatcher
    leases: LeaseKeeper
    announcer: Announcer
    watcher: DirectoryWatcher
    standing: Standing
    draining: Drain
    letters: DeadLetters
    breaker: BreakerKeeper
    host_watch: HostWatch
    loops: Loops
    clock: Clock
    new_id: Callable[[], str]
    runs_as_submitter: bool

    def ping(self) -> Ping:
        """Version and state."""
        return Ping(version=VERSION, agent_id=self.agent_id, state=self.standing.state)

    async def system_info(self) -> SystemInfo:
        """Hardware and system figures."""
        return await host.system_info(agent_id=self.agent_id, machine_id=self.machine_id, disk_path=self.state_dir)

    async def queue_status(self) -> QueueStatus:
        """Counts, capacity, reports, and how the agent stands with the control plane."""
        counts = await self.store.read(views.counts)
        total, free = self.dispatcher.capacity, self.dispatcher.free()
        return QueueStatus(
            agent_id=self.agent_id,
            machine_id=self.machine_id,
            version=VERSION,
            state=self.standing.state,
            reasons=self.standing.reasons,
            blocks=[BlockView(kind=block.kind, reason=block.reason) for block in self.standing.blocks()],
            uptime_s=round((self.clock.boottime_ns() - self.started_boottime_ns) / 1e9, 1),
            tasks=counts.by_state,
            capacity=Capacity(
                slots=total.slots,
                slots_used=total.slots - free.slots,
                cpus=total.cpus,
                cpus_used=round(total.cpus - free.cpus, 3),
                memory_mb=total.memory_mb,
                memory_mb_used=total.memory_mb - free.memory_mb,
            ),
            reports_waiting=counts.reports_waiting,
            dead_letters=counts.dead_letters,
            control_plane=self.standing.control_plane(),
        )

    # --- tasks ---

    async def submit(self, tasks: Sequence[Task], submitter: Submitter | None) -> list[str]:
        """Store local tasks, all or none."""
        if self.draining.is_on:
            raise Refused(Code.DRAINING, f"this agent takes no new tasks: {self.draining.sentence}; submit elsewhere")
        full = self.standing.refuses_submission()
        if full is not None:
            raise Refused(Code.HOST_FULL, f"this agent takes no new tasks: {full}")
        for task in tasks:
            check_runnable(task)
        if self.runs_as_submitter:
            tasks = as_submitted(tasks, submitter)
        uid = submitter.uid if submitter is not None else None
        attempts = [
            NewAttempt(task, AttemptId(self.new_id()), origin="local", boot_id=self.boot_id, submitter_uid=uid)
            for task in tasks
        ]
        now_ms = self.clock.wall_ms()
        await self.store.write(lambda db: units.submit(db, attempts, now_ms), patience_s=STORE_PATIENCE_S)
        self.dispatcher.changed()
        return [task.id for task in tasks]

    async def list_tasks(
        self, *, states: Sequence[TaskState], labels: Mapping[str, str], limit: int, offset: int
    ) -> TaskPage:
        """One page, newest first."""
        page, total = await self.store.read(lambda db: views.list_attempts(db, states, labels, limit, offset))
        return TaskPage(
            tasks=[self._view(attempt, run) for attempt, run in page], total=total, limit=limit, offset=offset
        )

    async def show_task(self, task_id: str, *, wait_s: float = 0.0) -> TaskDetail:
        """The task and its runs, at its end if that comes within `wait_s`."""
        attempt, runs = await self._find(task_id)
        give_up_at_s = asyncio.get_running_loop().time() + wait_s
        while not attempt.state.is_final and wait_s > 0:
            announced = self.announcer.listen(attempt.task_id)
            try:
                attempt, runs = await self._find(attempt.task_id)
                if attempt.state.is_final:
                    break
                async with asyncio.timeout_at(give_up_at_s):
                    await announced
            except TimeoutError:
                break
            finally:
                announced.cancel()
        return task_detail(self._view(attempt, runs[-1] if runs else None), attempt, runs)

    async def cancel_task(self, task_id: str) -> TaskView:
        """Ask for the end of a task."""
        attempt, _ = await self._find(task_id)
        if attempt.state.is_final or not await self.executor.stop(attempt.attempt_id, Cause.CANCELLED):
            raise Refused(Code.TASK_FINISHED, f"task {attempt.task_id} has ended already")
        attempt, runs = await self._find(attempt.task_id)
        return self._view(attempt, runs[-1] if runs else None)

    async def suspend_task(self, task_id: str) -> TaskView:
        """Let a running task stand still."""
        return await self._ask(task_id, "suspended", self.executor.suspend)

    async def resume_task(self, task_id: str) -> TaskView:
        """Let a suspended task go on."""
        return await self._ask(task_id, "resumed", self.executor.resume)

    async def _ask(self, task_id: str, word: str, ask: Callable[[AttemptId], Awaitable[None]]) -> TaskView:
        attempt, _ = await self._find(task_id)
        try:
            await ask(attempt.attempt_id)
        except Refused as refusal:
            attempt, _ = await self._find(attempt.task_id)
            reason = f"task {attempt.task_id} is {attempt.state} and cannot be {word}: {refusal}"
            raise Refused(refusal.code, reason) from None
        attempt, runs = await self._find(attempt.task_id)
        return self._view(attempt, runs[-1] if runs else None)

    async def stop_process(self, request: ProcessStopRequest) -> ProcessStopAnswer:
        """Stop the run whose process id that is."""
        return await process_stop.stop_process(self.store, self.executor, self.boot_id, request)

    # --- the host as a whole ---

    async def drain(self, by: str, reason: str) -> DrainAnswer:
        """Take on no more tasks."""
        await self.draining.begin(by, reason)
        return await self.drain_state()

    async def undrain(self) -> DrainAnswer:
        """Take on tasks again."""
        await self.draining.end()
        return await self.drain_state()

    async def drain_state(self, *, wait_s: float = 0.0) -> DrainAnswer:
        """How far the host is emptied."""
        if wait_s > 0:
            await self.draining.wait_until(self._is_drained_or_not_asked, wait_s)
        order, running = self.draining.order, len(self.executor.active)
        waiting = await self.store.read(views.count_claimed_waiting)
        return DrainAnswer(
            is_draining=self.draining.is_on,
            is_drained=self.draining.is_on and not running and not waiting,
            reason=self.draining.sentence,
            by=order.by if order is not None else None,
            since=format_time(order.at_ms / 1000) if order is not None else None,
            running=running,
            waiting=waiting,
        )

    async def _is_drained_or_not_asked(self) -> bool:
        if not self.draining.is_on:
            return True
        return not self.executor.active and not await self.store.read(views.count_claimed_waiting)

    async def metrics(self) -> bytes:
        """All figures."""
        counts = await self.store.read(views.counts)
        total, free, readings = self.dispatcher.capacity, self.dispatcher.free(), self.host_watch.readings
        return metrics.render(
            metrics.Snapshot(
                version=VERSION,
                uptime_s=(self.clock.boottime_ns() - self.started_boottime_ns) / 1e9,
                tasks=counts.by_state,
                slots=total.slots,
                slots_used=total.slots - free.slots,
                blocks=frozenset(block.kind for block in self.standing.blocks()),
                breaker=self.breaker.breaker.phase,
                is_connected=self.standing.control_plane().is_connected,
                contact_problem=self.standing.contact_problem,
                reports_waiting=counts.reports_waiting,
                dead_letters=counts.dead_letters,
                loop_failures=self.loops.failures,
                disk_free_bytes=readings.disk_free_bytes if readings is not None else None,
                inodes_free=readings.inodes_free if readings is not None else None,
                memory_available_bytes=readings.memory_available_bytes if readings is not None else None,
            )
        )

    # --- dead letters ---

    async def dead_letters(self, *, limit: int, offset: int) -> DeadLetterPage:
        """One page."""
        return await self.letters.page(limit, offset)

    async def show_dead_letter(self, letter_id: int) -> DeadLetter:
        """One, whole."""
        return await self.letters.show(letter_id)

    async def resend_dead_letter(self, letter_id: int) -> DeadLetter:
        """Due at once."""
        return await self.letters.resend(letter_id)

    async def drop_dead_letter(self, letter_id: int) -> DeadLetter:
        """Gone for good."""
        return await self.letters.drop(letter_id)

    # --- output ---

    async def read_log(self, task_id: str, *, stream: Stream, offset: int, limit: int, run_no: int | None) -> LogChunk:
        """A piece of output; a task that has not run yet has none."""
        attempt, run = await self._find_run(task_id, run_no)
        return await output_reading.read_piece(self._output(attempt, run), stream, offset, limit)

    async def follow_log(
        self, task_id: str, *, stream: Stream, offset: int, run_no: int | None
    ) -> AsyncGenerator[LogChunk, None]:
        """Pieces as they are written; of a task that has not run yet, once it does."""
        attempt, run = await self._find_run(task_id, run_no)
        while run is None and not attempt.state.is_final:
            announced = self.announcer.listen(attempt.task_id)
            attempt, run = await self._find_run(attempt.task_id, run_no)
            if run is None and not attempt.state.is_final:
                await announced
            announced.cancel()
        chunks = output_reading.follow(
            self._output(attempt, run),
            stream,
            offset,
            watcher=self.watcher,
            ended=lambda: self.announcer.listen(attempt.task_id),
        )
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    def _output(self, attempt: Attempt, run: Run | None) -> RunOutput:
        """Of a task without a run: that of the run that would be its first."""
        attempt_id, run_no = (run.attempt_id, run.run_no) if run is not None else (attempt.attempt_id, RunNo(1))

        async def has_ended() -> bool:
            if run is None:
                return attempt.state.is_final
            active = self.executor.active.get(attempt_id)
            if active is not None and active.run_no == run_no:
                return False
            now = await self.store.read(lambda db: views.run(db, attempt_id, run_no))
            return now is None or now.state is RunState.ENDED

        return RunOutput(self.attempts_dir / f"{attempt_id}.{run_no}", run_no, has_ended)

    # --- the store ---

    async def _find(self, task_id: str) -> tuple[Attempt, list[Run]]:
        return await self.store.read(lambda db: views.find_task(db, task_id))

    async def _find_run(self, task_id: str, run_no: int | None) -> tuple[Attempt, Run | None]:
        """The newest run of the task, or the newest with this number."""
        attempt, runs = await self._find(task_id)
        wanted = [run for run in runs if run_no in {None, run.run_no}]
        if not wanted and run_no is not None:
            raise Refused(Code.INVALID_PARAMETERS, f"task {attempt.task_id} has no run {run_no}; it has {len(runs)}")
        return attempt, wanted[-1] if wanted else None

    def _view(self, attempt: Attempt, run: Run | None) -> TaskView:
        return task_view(
            attempt,
            run,
            lease=self.leases.current(attempt.attempt_id) or attempt.lease,
            reason=self._reason(attempt),
            now_boottime_ns=self.clock.boottime_ns(),
        )

    def _reason(self, attempt: Attempt) -> str | None:
        if not attempt.state.is_waiting:
            return None
        if attempt.attempt_id in self.executor.active:
            return "is being started"
        return self.dispatcher.reason(attempt)
