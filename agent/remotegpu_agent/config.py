"""The config of the agent: file, then environment, then flags; checked as a whole, every mistake named at its place.

`interface.md` lists the keys. Attributes are called as the keys are; durations are seconds. Knows no part of the agent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, ValidationError

from remotegpu_agent.config_check import check_files, read_control_plane_token, token_path
from remotegpu_agent.config_sources import Sources, is_verbatim, later_keys, not_supported, take_out_later
from remotegpu_agent.config_values import (
    SUBMITTER,
    AbsolutePath,
    AutoAmount,
    AutoCount,
    CpuList,
    Environment,
    GroupName,
    Id,
    Listen,
    Network,
    SocketPath,
    Span,
    Url,
    UserName,
    split_listen,
)
from remotegpu_schemas import limits
from remotegpu_schemas import problems as report
from remotegpu_schemas.attempt import PlacementKind
from remotegpu_schemas.errors import Misconfigured
from remotegpu_schemas.explain import Wording, explain
from remotegpu_schemas.forms import Form, Text
from remotegpu_schemas.problems import Finding, InvalidFile, Problem
from remotegpu_schemas.quantities import Duration
from remotegpu_schemas.strict_yaml import Document, load
from remotegpu_schemas.task import OnUnreachable

__all__ = [
    "Config",
    "InvalidConfig",
    "Loaded",
    "check_files",
    "load_config",
    "read_config",
    "read_config_text",
    "read_control_plane_token",
    "split_listen",
    "token_path",
]

DEFAULT_PATH: Final = Path("/etc/remotegpu-agent/config.yaml")
CONSEQUENCE: Final = "this configuration cannot be used"


class InvalidConfig(Misconfigured):
    """The config has mistakes; the message is the whole report."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(report.render_report(problems, CONSEQUENCE))
        self.problems = tuple(problems)


class AgentSection(Form):
    """`agent:`; `id` and `machine_id` None are derived at the first start."""

    id: Id = None
    machine_id: Id = None
    state_dir: AbsolutePath = Path("/var/lib/remotegpu-agent")
    labels: dict[str, Text] = Field(default={}, max_length=limits.LABELS_MAX_COUNT)


class ControlPlaneSection(Form):
    """`control_plane:`; without `url` the agent stands alone. Durations are seconds; `long_poll` 0 is off."""

    url: Url | None = None
    token_file: AbsolutePath | None = None
    ca_file: AbsolutePath | None = None
    client_cert_file: AbsolutePath | None = None
    client_key_file: AbsolutePath | None = None
    timeout: Span = 30.0
    poll_interval: Span = 5.0
    long_poll: Duration = 25.0
    heartbeat_interval: Span = 30.0


class LeaseSection(Form):
    """`lease:`; durations are seconds."""

    ttl: Span = 300.0
    renew_interval: Span = 60.0
    margin: Duration = 5.0
    on_unreachable: Annotated[OnUnreachable, Field(strict=False)] = OnUnreachable.STOP


class CapacitySection(Form):
    """`capacity:`; None is `auto`."""

    max_concurrent: AutoCount = None
    cpus: AutoAmount = None
    memory_gb: AutoAmount = None


class TasksSection(Form):
    """`tasks:`; durations are seconds, `default_timeout` 0 is none, `run_as` None is the agent's own user.

    Weights are those of systemd.resource-control(5), 100 being usual; `allowed_cpus` is a list such as `0-3,8`. Each
    run gets them where its placement can enforce them; None leaves them as they are.
    """

    default_timeout: Duration = 0.0
    grace_period: Duration = 30.0
    run_as: UserName = None
    placement: Annotated[PlacementKind, Field(strict=False)] = PlacementKind.AUTO
    env: Environment = Field(default={})
    cpu_weight: Annotated[int, Field(ge=1, le=10_000)] | None = None
    io_weight: Annotated[int, Field(ge=1, le=10_000)] | None = None
    allowed_cpus: CpuList = None
    processes_max: Annotated[int, Field(ge=1, le=limits.PID_MAX)] = limits.TASK_PROCESSES_MAX


class AdmissionSection(Form):
    """`admission:`; with less free than this no task is claimed or started. In GiB and inodes; 0 switches one off."""

    disk_free_gb: Annotated[float, Field(ge=0, le=65536, allow_inf_nan=False)] = 1.0
    inodes_free: Annotated[int, Field(ge=0, le=10**9)] = 10_000
    memory_free_gb: Annotated[float, Field(ge=0, le=65536, allow_inf_nan=False)] = 0.25


class BreakerSection(Form):
    """`breaker:`; after so many different claimed tasks in a row that failed `within` (s) nothing is claimed; 0 is off.

    A canary (`canary_command`, a shell string; None is a built-in one) probes after `probe_interval` (s), doubled up
    to `probe_max_interval`.
    """

    failures: Annotated[int, Field(ge=0, le=1000)] = 5
    within: Span = 10.0
    probe_interval: Span = 30.0
    probe_max_interval: Span = 600.0
    canary_command: Text | None = None


class OutputSection(Form):
    """`output:`; the bound of what is kept of one run's output, in MiB, and in how large pieces the oldest goes.

    `retain` is how many of its newest files are kept of each stream beside the first: the bound is cut into
    2 * (retain + 1) files.
    """

    max_size_mb: Annotated[int, Field(ge=1, le=1024 * 1024)] = 100
    retain: Annotated[int, Field(ge=1, le=limits.OUTPUT_RETAIN_MAX)] = 7

    @property
    def segments(self) -> int:
        """Files in all."""
        return 2 * (self.retain + 1)


class RetentionSection(Form):
    """`retention:`; how long what has ended is kept (seconds), and how much of it; `max_size_gb` 0 is no bound."""

    max_age: Span = 7 * 86400.0
    max_size_gb: Annotated[float, Field(ge=0, le=1024 * 1024, allow_inf_nan=False)] = 10.0


class AuditSection(Form):
    """`audit:`; how long a day's file is kept, in seconds, and how much of all of them, in GiB.

    Above `max_size_gb` (0 is no bound) the oldest days go first; today's file stays.
    """

    retention: Span = 90 * 86400.0
    max_size_gb: Annotated[float, Field(ge=0, le=1024 * 1024, allow_inf_nan=False)] = 1.0


class LegacyCallerSection(Form):
    """An entry of `api.legacy_callers`."""

    network: Network
    allow: list[Literal["system_info", "process_stop"]]


class ApiSection(Form):
    """`api:`; null switches `listen` or `socket` off, `tokens_file` None is `<state_dir>/api-token`.

    Members of `socket_group`, if this host has it, may use the socket.
    With `tls_cert_file` (its chain behind it) and `tls_key_file` TCP is https. These files are read again on change.
    """

    listen: Listen = "127.0.0.1:8090"
    socket: SocketPath = Path("/run/remotegpu-agent/agent.sock")
    socket_group: GroupName = "remotegpu"
    tokens_file: AbsolutePath | None = None
    allowed_hosts: list[Text] = Field(default=[], max_length=1024)
    legacy_callers: list[LegacyCallerSection] = Field(default=[], max_length=1024)
    tls_cert_file: AbsolutePath | None = None
    tls_key_file: AbsolutePath | None = None


class ResultsSection(Form):
    """`results:`; output above the limit is cut in the completion."""

    inline_limit_kb: Annotated[int, Field(ge=1, le=limits.INLINE_OUTPUT_MAX_BYTES // limits.KIB)] = 64


class LogSection(Form):
    """`log:`; `auto` is console on a terminal, else JSON."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class Config(Form):
    """The whole config. Every key has a default: `Config()` is a stand-alone agent for local tasks."""

    agent: AgentSection = AgentSection()
    control_plane: ControlPlaneSection = ControlPlaneSection()
    lease: LeaseSection = LeaseSection()
    capacity: CapacitySection = CapacitySection()
    admission: AdmissionSection = AdmissionSection()
    breaker: BreakerSection = BreakerSection()
    tasks: TasksSection = TasksSection()
    output: OutputSection = OutputSection()
    retention: RetentionSection = RetentionSection()
    api: ApiSection = ApiSection()
    results: ResultsSection = ResultsSection()
    audit: AuditSection = AuditSection()
    log: LogSection = LogSection()


@dataclass(frozen=True)
class Loaded:
    """The config, and by dotted key where each value that is no default came from."""

    config: Config
    origins: Mapping[str, str]


def load_config(path: Path | None, environ: Mapping[str, str], sets: Sequence[str] = ()) -> Config:
    """The config from file, environment and flags (`section.key=value`). A missing default file counts as empty.

    Raises InvalidConfig with every mistake. Looks at no other file: see `check_files`.
    """
    return read_config(path, environ, sets).config


def read_config(path: Path | None, environ: Mapping[str, str], sets: Sequence[str] = ()) -> Loaded:
    """As `load_config`, with the origin of each value."""
    name = path or DEFAULT_PATH
    text = _read_file(name, is_optional=path is None)
    return read_config_text(text, str(name), environ, sets)


def read_config_text(text: bytes | None, name: str, environ: Mapping[str, str], sets: Sequence[str] = ()) -> Loaded:
    """As `read_config`, of a file's content; `name` is what the file is called in messages."""
    document = _parse(text, name) if text is not None else None
    file_data = document.data(is_verbatim) if document is not None else {}
    if document is not None and not isinstance(file_data, dict):
        raise InvalidConfig(
            [document.problem(Finding((), "the config must be a mapping of sections, such as 'agent:'"))]
        )
    source = Sources(document, file_data if isinstance(file_data, dict) else {})
    problems = [*source.override_by_environment(environ), *source.override_by_flags(sets)]
    findings = list(take_out_later(source.data))
    config: Config | None = None
    try:
        config = Config.model_validate(source.data)
    except ValidationError as error:
        findings += explain(error, Config, Wording(other_keys=later_keys, refuse_key=not_supported))
    if config is not None:
        findings += _conflicts(config)
    problems += [source.problem(finding) for finding in findings]
    if problems or config is None:
        raise InvalidConfig(problems)
    return Loaded(config, source.origins())


def _read_file(name: Path, *, is_optional: bool) -> bytes | None:
    try:
        with name.open("rb") as file:
            return file.read(limits.CONFIG_MAX_BYTES + 1)
    except FileNotFoundError:
        if is_optional:
            return None
        raise Misconfigured(f"{name}: there is no such config file; make one with `remotegpu-agent setup`") from None
    except OSError as error:
        raise Misconfigured(
            f"{name}: the config file cannot be read: {error.strerror or error}; run as its owner, or name another "
            "with --config"
        ) from None


def _parse(text: bytes, name: str) -> Document | None:
    try:
        documents = load(text, name, max_bytes=limits.CONFIG_MAX_BYTES)
    except InvalidFile as error:
        raise InvalidConfig(error.problems) from None
    if len(documents) > 1:
        mark = documents[1].value_mark(())
        raise InvalidConfig([documents[1].problem_at(mark, "the config is one document; remove the '---' above this")])
    return documents[0] if documents else None


def _conflicts(config: Config) -> Iterator[Finding]:
    plane, lease, api = config.control_plane, config.lease, config.api
    for key, other in (("tls_cert_file", "tls_key_file"), ("tls_key_file", "tls_cert_file")):
        if getattr(api, key) is not None and getattr(api, other) is None:
            yield Finding(
                ("api", key),
                f"'api.{key}' needs 'api.{other}' beside it: TLS takes a certificate and its key",
                at_key=True,
            )
    for key, other in (("client_cert_file", "client_key_file"), ("client_key_file", "client_cert_file")):
        if getattr(plane, key) is not None and getattr(plane, other) is None:
            yield Finding(
                ("control_plane", key),
                f"'control_plane.{key}' needs 'control_plane.{other}' beside it: a client certificate has both",
                at_key=True,
            )
    if lease.margin >= lease.ttl / 2:
        yield Finding(
            ("lease", "margin"),
            f"'lease.margin' ({lease.margin:g} s) must be less than half of 'lease.ttl' ({lease.ttl:g} s)",
        )
    elif lease.renew_interval >= lease.ttl - lease.margin:
        yield Finding(
            ("lease", "renew_interval"),
            f"'lease.renew_interval' ({lease.renew_interval:g} s) must be less than 'lease.ttl' without 'lease.margin' "
            f"({lease.ttl - lease.margin:g} s), or every lease ends before it is renewed",
        )
    if api.listen is not None and api.tokens_file is None and not split_listen(api.listen)[0].is_loopback:
        yield Finding(
            ("api", "listen"),
            "'api.listen' is reachable from other hosts: name the accepted tokens in 'api.tokens_file' "
            "(`remotegpu-agent token new` makes one), or listen on 127.0.0.1",
        )
    if config.tasks.run_as == SUBMITTER:
        yield from _submitter_conflicts(config)
    if api.listen is None and api.socket is None:
        yield Finding(
            ("api", "listen"), "'api.listen' and 'api.socket' are both null: nobody could reach the agent; set one"
        )


def _submitter_conflicts(config: Config) -> Iterator[Finding]:
    """Only a caller of the Unix socket is a user of this host."""
    where, said = ("tasks", "run_as"), f"'tasks.run_as: {SUBMITTER}' runs each task as the user who submits it"
    if config.control_plane.url is not None:
        yield Finding(where, f"{said}, and those of 'control_plane.url' come from no user of this host: name a user")
    if config.api.socket is None:
        yield Finding(where, f"{said} over the Unix socket, and 'api.socket' is null: set it, or name a user")
