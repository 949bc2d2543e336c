"""The daemon: builds the parts, starts them in order, stops them in the reverse one. Decides nothing.

Read `Agent.__init__` and `Agent.start` from top to bottom to know what the agent consists of. What runs when it stops
goes on, and is adopted by the next one.

Long, because it is the one list of all parts and of who tells whom.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import urllib.parse
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from remotegpu_agent import VERSION, host
from remotegpu_agent.agent_operations import AgentOperations
from remotegpu_agent.announcer import Announcer
from remotegpu_agent.api import ApiServer, ApiSettings, Endpoints, LegacyCall, LegacyCaller, TlsPair
from remotegpu_agent.api.endpoints_file import write_endpoints
from remotegpu_agent.audit import AuditEntry, AuditLog
from remotegpu_agent.bookkeeping import Books
from remotegpu_agent.canary import BreakerKeeper
from remotegpu_agent.capacity import capacity_of
from remotegpu_agent.claims import Claimer, ClaimSettings
from remotegpu_agent.clock import Clock, SystemClock
from remotegpu_agent.config import Config, token_path
from remotegpu_agent.config_check import NO_ROOM
from remotegpu_agent.control_plane import ControlPlane
from remotegpu_agent.dead_letters import DeadLetters
from remotegpu_agent.directory_watch import DirectoryWatcher
from remotegpu_agent.dispatch import Dispatcher
from remotegpu_agent.draining import Drain
from remotegpu_agent.executor import Active, Executor
from remotegpu_agent.host_sleep import SleepWatch
from remotegpu_agent.host_watch import HostWatch, read_host
from remotegpu_agent.leases import LeaseKeeper, LeaseSettings
from remotegpu_agent.names import Names, name_agent
from remotegpu_agent.presence import HostState, Presence, cancelled_attempts
from remotegpu_agent.progress import ProgressFollower
from remotegpu_agent.proxies import proxy_for
from remotegpu_agent.recovery import recover
from remotegpu_agent.reporter import Fate, Reporter
from remotegpu_agent.reports import Reports
from remotegpu_agent.restoration import Restoration, Restored, names_on_record
from remotegpu_agent.retention import Retention, RetentionSettings
from remotegpu_agent.runspec import RunSettings
from remotegpu_agent.standing import Standing
from remotegpu_agent.supervise import Loops
from remotegpu_agent.task_user import SUBMITTER, find_user
from remotegpu_agent.tls import TlsFiles
from remotegpu_queue import damage, units, views
from remotegpu_queue.admission import Floors, Readings
from remotegpu_queue.breaker import Rules
from remotegpu_queue.outbox import Report
from remotegpu_queue.store import DATABASE_NAME, Store, StoreDamaged, StoreUnavailable
from remotegpu_queue.units import ClaimResult
from remotegpu_schemas import limits
from remotegpu_schemas.attempt import AttemptId
from remotegpu_schemas.errors import Misconfigured
from remotegpu_schemas.states import Cause
from remotegpu_schemas.task import OnUnreachable
from remotegpu_schemas.wire import HeartbeatAnswer, JsonObject, RegisterRequest
from remotegpu_sidecar import identity
from remotegpu_sidecar.adoption import directory_name
from remotegpu_sidecar.launcher import Adopted, Launcher, LaunchError
from remotegpu_sidecar.placement import choose

log = structlog.get_logger(__name__)

_ANNOUNCE_AGAIN_S: Final = 5.0
_STARTS_MAX: Final = 3
"""So often one process rebuilds a damaged database: a disk that damages every one is for an operator."""


def run(config: Config, environ: Mapping[str, str] = os.environ) -> int:
    """Be the agent until SIGTERM or SIGINT; a second one ends it at once. Returns the exit code.

    Raises Misconfigured when it cannot start as it is told to.
    """
    with asyncio.Runner() as runner:
        return runner.run(_run(config, environ))


async def _run(config: Config, environ: Mapping[str, str]) -> int:
    stopping = asyncio.Event()
    _on_signals(stopping)
    for _ in range(_STARTS_MAX):
        if await _live(config, environ, stopping):
            return 0
        log.critical("starting again, to rebuild the database; tasks that run go on")
    return 1


async def _live(config: Config, environ: Mapping[str, str], stopping: asyncio.Event) -> bool:
    """One agent, from its start to its end; False if that was a damaged database."""
    async with contextlib.AsyncExitStack() as stack:
        try:
            agent = await Agent.start(config, environ, stack)
        except StoreDamaged:
            return False
        except (OSError, LaunchError, StoreUnavailable) as error:
            raise Misconfigured(
                f"the agent cannot start on {config.agent.state_dir}: {error}; move away what is in the way"
            ) from error
        log.info("ready", url=agent.endpoints.url, socket=str(agent.endpoints.socket or ""), version=VERSION)
        if await _is_first(agent.store_damaged, than=stopping):
            return False
        log.info("stopping; tasks that run go on")
    return True


async def _is_first(event: asyncio.Event, *, than: asyncio.Event) -> bool:
    """Wait for either; whether it was `event` alone."""
    waiting = [asyncio.ensure_future(each.wait()) for each in (event, than)]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    return not than.is_set()


def _on_signals(stopping: asyncio.Event) -> None:
    def ask_to_stop(number: signal.Signals) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ask_to_stop, number)


@dataclass(frozen=True)
class Surroundings:
    """What the agent meets outside of itself: time, chance, ids, processes, the host. The simulator has its own."""

    clock: Clock
    random: Callable[[], float]
    new_id: Callable[[], str]
    launcher: Launcher
    watcher: DirectoryWatcher
    metrics: Callable[[], Awaitable[JsonObject]]
    read_host: Callable[[], Readings]


class Agent:
    """All the parts of a running agent. Made by `start`; whatever is on the exit stack stops them."""

    def __init__(self, config: Config, names: Names, store: Store, loops: Loops, outside: Surroundings) -> None:
        self._config = config
        self._names = names
        self._store = store
        self._loops = loops
        self._outside = outside
        self._clock = outside.clock
        self._state_dir = config.agent.state_dir
        self._attempts_dir = self._state_dir / "attempts"
        self._audit = AuditLog(self._state_dir / "audit")
        self._notices = damage.notices(self._state_dir / DATABASE_NAME)
        self._announcer = Announcer()
        self._watcher = outside.watcher
        self._launcher = outside.launcher
        self._standing = Standing(config.control_plane.url)
        self._draining = Drain(store, self._clock, on_changed=self._on_free)
        self._host_watch = self._make_host_watch()
        inline_limit_bytes = config.results.inline_limit_kb * limits.KIB
        self._reports = Reports(names.agent_id, self._attempts_dir, inline_limit_bytes)
        self._books = Books(store, self._reports, self._clock, names.boot_id)
        self._executor = self._make_executor()
        self._leases = self._make_leases()
        self._executor.leases = self._books.leases = self._leases
        self._dispatcher = Dispatcher(
            store,
            self._executor,
            self._clock,
            capacity_of(config.capacity),
            holds_start=self._standing.holds_start,
            on_decided=self._on_decided,
        )
        self._breaker = self._make_breaker()
        self._retention = self._make_retention()
        self._progress = ProgressFollower(loops, self._watcher, self._executor.store_progress)
        self._executor.watch(started=self._follow_progress, ended=lambda run: self._progress.forget(run.attempt_id))
        self._executor.watch(started=self._breaker.started, ended=self._breaker.ended)
        self._executor.watch(started=_ignore, ended=lambda _: self._draining.look_again())
        self._standing.drain_sentence = lambda: self._draining.sentence
        self._standing.host_blocks = lambda: self._host_watch.blocks
        self._standing.notices = lambda: [*self._notices, *self._api.problems]
        self._standing.breaker_block = lambda: self._breaker.block
        self._operations = self._make_operations()
        self._api = self._make_api()
        self._plane: ControlPlane | None = None
        self._presence: Presence | None = None
        self._claimer: Claimer | None = None
        self._reporter: Reporter | None = None

    @classmethod
    async def start(cls, config: Config, environ: Mapping[str, str], stack: contextlib.AsyncExitStack) -> Agent:
        """Start every part, each undone by `stack`. Raises Misconfigured, with nothing left behind."""
        store = await Store.open(config.agent.state_dir)
        stack.push_async_callback(store.close)
        boot_id = identity.boot_id()
        if store.is_new:
            kept = await asyncio.to_thread(names_on_record, config.agent.state_dir / "attempts")
            kept = {**kept, **(store.set_aside.meta if store.set_aside is not None else {})}
            await store.insist(lambda db: units.keep_meta(db, kept), "what was known before")
        names = await store.insist(lambda db: name_agent(db, config.agent, boot_id), "the agent's name")
        loops = Loops()
        placement = await choose(config.tasks.placement)
        log.info("placement of runs", kind=placement.kind, missing=placement.missing)
        outside = Surroundings(
            clock=SystemClock(),
            random=random.random,
            new_id=_new_id,
            launcher=Launcher(config.agent.state_dir / "attempts", placement),
            watcher=DirectoryWatcher(),
            metrics=host.HostMetrics(config.agent.state_dir).heartbeat_metrics,
            read_host=lambda: read_host(config.agent.state_dir),
        )
        stack.callback(outside.watcher.close)
        agent = cls(config, names, store, loops, outside)
        await agent._launcher.start()
        stack.push_async_callback(agent._launcher.stop)
        await agent._open_plane(environ, stack)
        stack.push_async_callback(loops.close)
        loops.run_forever("watch", agent._watcher.run)
        loops.run_forever("sleep", SleepWatch(outside.clock, agent._on_woken).run)
        await agent._take_over()
        await agent._api.start()
        stack.push_async_callback(agent._api.stop)
        await agent._announce_endpoints()
        agent._start_loops()
        return agent

    async def _announce_endpoints(self) -> None:
        """A full disk does not keep the agent from its work; the file comes when there is room."""
        try:
            write_endpoints(self._state_dir, self.endpoints)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            log.error("where the API listens cannot be written yet", error=str(error))
            self._loops.spawn("endpoints", self._announce_endpoints_later)

    async def _announce_endpoints_later(self) -> None:
        await asyncio.sleep(_ANNOUNCE_AGAIN_S)
        await self._announce_endpoints()

    @property
    def store_damaged(self) -> asyncio.Event:
        """Set when the database turns out to be damaged."""
        return self._store.damaged

    @property
    def endpoints(self) -> Endpoints:
        """Where the API listens."""
        return self._api.endpoints

    # --- making the parts ---

    def _make_executor(self) -> Executor:
        config = self._config
        run_as = config.tasks.run_as
        settings = RunSettings(
            agent_id=self._names.agent_id,
            machine_id=self._names.machine_id,
            state_dir=self._state_dir,
            default_timeout_s=config.tasks.default_timeout,
            grace_period_s=config.tasks.grace_period,
            output_limit_bytes=config.output.max_size_mb * limits.MIB,
            output_segments=config.output.segments,
            user=find_user(run_as) if run_as is not None and run_as != SUBMITTER else None,
            runs_as_submitter=run_as == SUBMITTER,
            env=config.tasks.env,
            api_socket=config.api.socket,
            cpu_weight=config.tasks.cpu_weight,
            io_weight=config.tasks.io_weight,
            allowed_cpus=config.tasks.allowed_cpus,
            processes_max=config.tasks.processes_max,
        )
        return Executor(
            self._books,
            self._launcher,
            self._clock,
            settings,
            self._loops,
            self._announcer,
            continues_when_unreachable=config.lease.on_unreachable is OnUnreachable.CONTINUE,
            on_free=self._on_free,
            on_report=self._on_report,
        )

    def _make_host_watch(self) -> HostWatch:
        admission = self._config.admission
        floors = Floors(
            disk_bytes=round(admission.disk_free_gb * limits.GIB),
            inodes=admission.inodes_free,
            memory_bytes=round(admission.memory_free_gb * limits.GIB),
        )
        return HostWatch(floors, self._outside.read_host, on_changed=self._on_free)

    def _make_breaker(self) -> BreakerKeeper:
        section = self._config.breaker
        return BreakerKeeper(
            self._store,
            self._clock,
            self._loops,
            Rules(section.failures, section.within, section.probe_interval, section.probe_max_interval),
            boot_id=self._names.boot_id,
            command=section.canary_command,
            new_id=self._outside.new_id,
            active=self._executor.active.values,
            on_changed=self._on_decided,
            on_submitted=self._on_free,
        )

    def _make_retention(self) -> Retention:
        retention = self._config.retention
        settings = RetentionSettings(
            max_age_s=retention.max_age,
            size_max_bytes=round(retention.max_size_gb * limits.GIB),
            audit_max_age_s=self._config.audit.retention,
            audit_size_max_bytes=round(self._config.audit.max_size_gb * limits.GIB),
        )
        return Retention(
            self._store,
            self._state_dir,
            self._audit,
            settings,
            wall_s=lambda: self._clock.wall_ms() / 1000,
            is_live=lambda task_id: any(run.task_id == task_id for run in list(self._executor.active.values())),
        )

    def _make_leases(self) -> LeaseKeeper:
        lease = self._config.lease
        settings = LeaseSettings(
            agent_id=self._names.agent_id,
            boot_id=self._names.boot_id,
            ttl_s=lease.ttl,
            renew_interval_s=lease.renew_interval,
            margin_s=lease.margin,
            continues_when_unreachable=lease.on_unreachable is OnUnreachable.CONTINUE,
        )
        return LeaseKeeper(
            self._store,
            self._clock,
            settings,
            self._loops,
            self._outside.random,
            extend=self._executor.extend,
            stop=self._executor.stop,
            has_process=lambda attempt_id: attempt_id in self._executor.active,
        )

    def _make_operations(self) -> AgentOperations:
        return AgentOperations(
            agent_id=self._names.agent_id,
            machine_id=self._names.machine_id,
            boot_id=self._names.boot_id,
            state_dir=self._state_dir,
            attempts_dir=self._attempts_dir,
            started_boottime_ns=self._clock.boottime_ns(),
            store=self._store,
            executor=self._executor,
            dispatcher=self._dispatcher,
            leases=self._leases,
            announcer=self._announcer,
            watcher=self._watcher,
            standing=self._standing,
            draining=self._draining,
            letters=DeadLetters(self._store, self._names.boot_id, on_changed=self._on_letters),
            breaker=self._breaker,
            host_watch=self._host_watch,
            loops=self._loops,
            clock=self._clock,
            new_id=self._outside.new_id,
            runs_as_submitter=self._config.tasks.run_as == SUBMITTER,
            api_figures=lambda: self._api.figures,
        )

    def _make_api(self) -> ApiServer:
        api = self._config.api
        settings = ApiSettings(
            state_dir=self._state_dir,
            machine_id=self._names.machine_id,
            listen=api.listen,
            socket=api.socket,
            socket_group=api.socket_group,
            tokens_file=api.tokens_file,
            tls=TlsPair(api.tls_cert_file, api.tls_key_file) if api.tls_cert_file and api.tls_key_file else None,
            allowed_hosts=tuple(api.allowed_hosts),
            legacy_callers=tuple(
                LegacyCaller(caller.network, frozenset(LegacyCall(call) for call in caller.allow))
                for caller in api.legacy_callers
            ),
        )
        return ApiServer(self._operations, settings, self._audit)

    async def _open_plane(self, environ: Mapping[str, str], stack: contextlib.AsyncExitStack) -> None:
        """The control plane and the three loops that talk to it; none for a stand-alone agent."""
        plane = self._config.control_plane
        if plane.url is None:
            return
        opened = await stack.enter_async_context(
            ControlPlane(
                plane.url,
                token_file=token_path(self._config, environ),
                timeout_s=plane.timeout,
                clock=self._clock,
                tls=TlsFiles(plane.ca_file, plane.client_cert_file, plane.client_key_file),
                proxy=proxy_for(plane.url, environ),
                on_reconnect=self._on_reconnect,
            )
        )
        self._use_plane(opened)

    def _use_plane(self, opened: ControlPlane) -> None:
        plane = self._config.control_plane
        self._plane = self._leases.plane = self._standing.plane = opened
        self._presence = Presence(
            self._plane,
            interval_s=plane.heartbeat_interval,
            random=self._outside.random,
            describe=self._describe,
            metrics=self._outside.metrics,
            state=lambda: HostState(self._standing.state, self._standing.reasons),
            on_registered=self._on_registered,
            on_answer=self._on_heartbeat,
        )
        self._standing.is_registered = self._presence.registered.is_set
        self._standing.is_outbox_full = lambda: self._dispatcher.is_outbox_full
        self._books.can_release = self._can_release
        self._reporter = Reporter(
            self._store,
            self._plane,
            self._clock,
            self._loops,
            self._outside.random,
            on_settled=self._on_settled,
            on_refused=self._executor.stop,
        )
        self._claimer = Claimer(
            self._store,
            self._plane,
            self._dispatcher,
            self._reports,
            self._clock,
            ClaimSettings(
                agent_id=self._names.agent_id,
                machine_id=self._names.machine_id,
                boot_id=self._names.boot_id,
                poll_interval_s=plane.poll_interval,
                long_poll_s=plane.long_poll,
                default_ttl_s=self._config.lease.ttl,
                margin_s=self._config.lease.margin,
            ),
            random=self._outside.random,
            new_id=self._outside.new_id,
            blocked=self._standing.blocked,
            bound=self._breaker.room,
            can_release=self._can_release,
            on_claimed=self._on_claimed,
        )

    # --- starting ---

    async def _take_over(self) -> None:
        await self._store.insist(lambda db: units.rebase(db, self._names.boot_id), "this boot of the host")
        await self._draining.load()
        await self._breaker.load()
        await self._host_watch.look()
        ended = await self._store.read(views.ended_runs)
        found = await self._launcher.adopt(settled=frozenset(directory_name(*key) for key in ended))
        restoration = Restoration(
            self._store,
            self._reports,
            self._names.boot_id,
            self._clock.wall_ms(),
            is_rebuild=self._store.is_new,
            default_ttl_s=self._config.lease.ttl,
        )
        restored = await restoration.restore(found)
        recovered = await recover(self._store, self._executor, found)
        log.info("took stock", adopted=recovered.adopted, finished=recovered.finished)
        self._loops.spawn("restoration", lambda: self._restore_later(restoration, restored, found))

    async def _restore_later(self, restoration: Restoration, restored: Restored, found: Sequence[Adopted]) -> None:
        """What is over does not hold up the start. What cannot be known is stated."""
        restored = await restoration.restore_later(restored)
        strays = await restoration.strays(found)
        self._retention.strays, self._retention.spared_tasks = strays.directories, strays.living
        self._loops.run_forever("retention", self._retention.run)
        self._on_report()
        aside = self._store.set_aside
        if aside is None:
            return
        log.critical(
            "the database was rebuilt; local tasks that waited, and ends that were not yet reported and have no "
            "directory, are lost",
            set_aside=str(aside.path),
            reason=aside.reason,
            alive=restored.alive,
            over=restored.over,
            left=restored.left,
        )
        detail: dict[str, str | int | None] = {"set_aside": str(aside.path), "reason": aside.reason}
        detail |= {"alive": restored.alive, "over": restored.over, "left": restored.left}
        await self._audit.record(
            AuditEntry(who="agent", what="database_rebuilt", source="local", outcome="ok", detail=detail)
        )

    def _start_loops(self) -> None:
        self._loops.run_forever("host-watch", self._host_watch.run)
        self._loops.run_forever("dispatch", self._dispatcher.run)
        if self._presence and self._claimer and self._reporter:
            self._loops.run_forever("presence", self._presence.run)
            self._loops.run_forever("claims", self._claimer.run)
            self._loops.run_forever("canary", self._breaker.run)
            self._loops.run_forever("reports", self._reporter.run)

    # --- who tells whom ---

    def _on_free(self) -> None:
        self._dispatcher.changed()

    def _on_decided(self) -> None:
        """What waits here goes first; what is free after that is for the control plane."""
        if self._claimer is not None:
            self._claimer.changed()

    def _on_report(self) -> None:
        if self._reporter is not None:
            self._reporter.changed()

    def _on_letters(self) -> None:
        self._on_report()
        self._on_free()  # the outbox may have been full of them

    def _on_woken(self) -> None:
        """The host was suspended: whoever waits for a time has waited longer than it knows."""
        self._leases.renew_all_now()
        self._on_free()
        self._on_report()

    def _on_reconnect(self) -> None:
        self._leases.renew_all_now()
        if self._reporter is not None:
            self._loops.spawn("hasten", self._reporter.contact_is_back)

    def _on_registered(self) -> None:
        self._on_free()
        if self._reporter is not None:
            self._reporter.registered()

    def _can_release(self) -> bool:
        return self._presence is not None and "release" in self._presence.features

    def _on_settled(self, report: Report, fate: Fate) -> None:
        # A start that was refused for good is renewed all the same: better asked in vain than not at all.
        if report.kind == "start" and fate in {Fate.DELIVERED, Fate.DEAD}:
            self._leases.start_accepted(report.attempt_id)
        if self._dispatcher.is_outbox_full:
            self._dispatcher.changed()

    async def _on_claimed(self, results: Sequence[ClaimResult]) -> None:
        for result in results:
            for attempt_id in result.superseded:
                try:
                    await self._executor.stop(attempt_id, Cause.SUPERSEDED)
                except StoreUnavailable as error:  # it has ended meanwhile; that it is to end was stored with the claim
                    log.error("a superseded attempt cannot be stopped", attempt_id=attempt_id, error=str(error))
        self._on_report()  # what was refused or given back
        await self._dispatcher.decide()
        for result in results:
            if result.is_new and result.attempt_id not in self._executor.active:
                await self._hold_waiting(result.attempt_id)

    async def _hold_waiting(self, attempt_id: AttemptId) -> None:
        """What cannot start at once must not outlive its lease either."""
        attempt = await self._store.read(lambda db: views.attempt(db, attempt_id))
        if attempt is not None:
            self._executor.hold_lease(attempt)

    async def _on_heartbeat(self, answer: HeartbeatAnswer) -> None:
        for attempt_id in cancelled_attempts(answer):
            try:
                await self._executor.stop(attempt_id, Cause.CANCELLED)
            except StoreUnavailable as error:
                log.error("a cancellation cannot be stored; it comes again", attempt_id=attempt_id, error=str(error))
        self._draining.plane_wants(answer.wants_drain)

    def _follow_progress(self, active: Active) -> None:
        self._progress.follow(active.attempt_id, *self._executor.progress_file(active))

    async def _describe(self) -> RegisterRequest:
        """What the control plane is told at register."""
        info = await host.system_info(
            agent_id=self._names.agent_id, machine_id=self._names.machine_id, disk_path=self._state_dir
        )
        url = self.endpoints.url
        return RegisterRequest(
            agent_id=self._names.agent_id,
            machine_id=self._names.machine_id,
            version=VERSION,
            hostname=info.hostname,
            ip_address=info.ip_addresses[0] if info.ip_addresses else "127.0.0.1",
            agent_port=urllib.parse.urlsplit(url).port or 0 if url else 0,
            max_workers=self._dispatcher.capacity.slots,
            features=["long-poll", "release"],
            labels=self._config.agent.labels,
            hardware=info.model_dump(mode="json"),
        )


def _ignore(_active: Active) -> None:
    """Not everybody cares for starts."""


def _new_id() -> str:
    return str(uuid.uuid4())
