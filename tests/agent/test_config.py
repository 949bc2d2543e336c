"""The config: file, environment and flags, each mistake named at its place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from remotegpu_agent.config import (
    Config,
    InvalidConfig,
    Loaded,
    load_config,
    read_config,
    read_config_text,
    split_listen,
)
from remotegpu_schemas import limits
from remotegpu_schemas.errors import Misconfigured

DOCUMENTED = """
agent:
  id: null
  machine_id: null
  state_dir: /var/lib/remotegpu-agent
  labels: {}
control_plane:
  url: null
  token_file: null
  ca_file: null
  client_cert_file: null
  client_key_file: null
  timeout: 30s
  poll_interval: 5s
  long_poll: 25s
  heartbeat_interval: 30s
  allow_services: false
lease: {ttl: 300s, renew_interval: 60s, margin: 5s, on_unreachable: stop}
capacity: {max_concurrent: auto, cpus: auto, memory_gb: auto, prefetch: 0, ageing: 0}
gpus: {enabled: auto, exclude: [], sample_interval: 1s, check_command: null, idle_action: none, idle_after: 30m}
tasks:
  default_timeout: 0
  grace_period: 30s
  run_as: null
  isolation: {readonly_paths: [], writable_paths: []}
  placement: auto
  on_reboot: fail
  env: {}
  policy: {allowed_commands: [], blocked_patterns: [], allowed_workdirs: []}
output: {max_size_mb: 100, retain: 7}
retention: {max_age: 7d, max_size_gb: 10}
spool: {enabled: true, dir: null, run_as_owner: false}
services_dir: /etc/remotegpu-agent/services.d
api:
  listen: "127.0.0.1:8090"
  socket: /run/remotegpu-agent/agent.sock
  tokens_file: null
  allowed_hosts: []
  legacy_callers: []
  tls_cert_file: null
  tls_key_file: null
results: {inline_limit_kb: 64, s3: null}
webhooks: []
audit: {retention: 90d, max_size_gb: 1}
host_operations: {}
log: {level: info, format: auto}
"""
"""Every key of the operator's interface, at its documented default."""

DOCUMENTED_KEYS = {
    "agent.id": "null",
    "lease.ttl": "5m",
    "capacity.prefetch": "0",
    "capacity.max_concurrent": "auto",
    "gpus.enabled": "auto",
    "gpus.exclude": "[]",
    "gpus.idle_after": "30m",
    "tasks.isolation.readonly_paths": "[]",
    "tasks.isolation": "{readonly_paths: [], writable_paths: []}",
    "tasks.policy.allowed_commands": "[]",
    "retention.max_age": "168h",
    "spool.enabled": "true",
    "spool.dir": "null",
    "services_dir": "/etc/remotegpu-agent/services.d",
    "api.tls_cert_file": "null",
    "results.s3": "null",
    "webhooks": "[]",
    "audit.retention": "90d",
    "audit.max_size_gb": "1",
    "host_operations": "{}",
}


def read(text: str, environ: Mapping[str, str] | None = None, sets: Sequence[str] = ()) -> Loaded:
    """The config of a file's text, and of nothing else unless it is given."""
    return read_config_text(text.encode(), "config.yaml", environ or {}, sets)


def refusal(text: str, environ: Mapping[str, str] | None = None, sets: Sequence[str] = ()) -> str:
    """The report on a config that cannot be used."""
    with pytest.raises(InvalidConfig) as caught:
        read(text, environ, sets)
    return str(caught.value)


# --- the documented keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "agent:\n", "{}", DOCUMENTED], ids=["empty", "comment", "section", "flow", "all"]
)
def test_defaults(text: str) -> None:
    """An empty file, and every documented key at its documented default, are the default config."""
    assert read(text).config == Config()


def test_default_values() -> None:
    """The defaults are those of the interface; durations are seconds."""
    config = Config()
    assert config.agent.state_dir == Path("/var/lib/remotegpu-agent")
    plane = config.control_plane
    assert (plane.url, plane.timeout, plane.poll_interval, plane.long_poll, plane.heartbeat_interval) == (
        None, 30.0, 5.0, 25.0, 30.0,
    )  # fmt: skip
    lease = config.lease
    assert (lease.ttl, lease.renew_interval, lease.margin, lease.on_unreachable) == (300.0, 60.0, 5.0, "stop")
    assert (config.capacity.max_concurrent, config.capacity.cpus, config.capacity.memory_gb) == (None, None, None)
    assert (config.tasks.default_timeout, config.tasks.grace_period, config.tasks.run_as) == (0.0, 30.0, None)
    assert (config.api.listen, config.api.socket) == ("127.0.0.1:8090", Path("/run/remotegpu-agent/agent.sock"))
    assert (config.output.retain, config.output.segments) == (7, 16)
    assert (config.output.max_size_mb, config.results.inline_limit_kb) == (100, 64)
    assert (config.log.level, config.log.format) == ("info", "auto")


@pytest.mark.parametrize(("key", "value"), DOCUMENTED_KEYS.items())
def test_documented_default_by_flag_and_environment(key: str, value: str) -> None:
    """A documented default is accepted as a flag and as a variable, too."""
    assert read("", sets=[f"{key}={value}"]).config == Config()
    name = "REMOTEGPU_AGENT__" + key.upper().replace(".", "__")
    assert read("", {name: value}).config == Config()


def test_durations() -> None:
    """Durations take seconds, or a number with a unit."""
    config = read(
        "lease: {ttl: 10m, renew_interval: 90s, margin: 2}\ntasks: {default_timeout: 1.5h, grace_period: 1d}"
    ).config
    assert (config.lease.ttl, config.lease.renew_interval, config.lease.margin) == (600.0, 90.0, 2.0)
    assert (config.tasks.default_timeout, config.tasks.grace_period) == (5400.0, 86400.0)


def test_values() -> None:
    """Each kind of value arrives as what it means."""
    config = read(
        "agent: {id: 007, labels: {rack: 12, team: vision}}\n"
        "capacity: {max_concurrent: 4, cpus: 2.5, memory_gb: 64}\n"
        "tasks: {run_as: remotegpu-task, env: {VERSION: 1.10, DEBUG: true}}\n"
        "api: {listen: null, legacy_callers: [{network: 10.0.0.0/8, allow: [system_info]}]}\n"
        "control_plane: {url: 'https://plane.example:8443/', long_poll: 0}\n"
    ).config
    assert config.agent.id == "007"
    assert config.agent.labels == {"rack": "12", "team": "vision"}
    assert (config.capacity.max_concurrent, config.capacity.cpus, config.capacity.memory_gb) == (4, 2.5, 64.0)
    assert config.tasks.env == {"VERSION": "1.10", "DEBUG": "true"}
    assert config.api.listen is None
    assert str(config.api.legacy_callers[0].network) == "10.0.0.0/8"
    assert config.control_plane.url == "https://plane.example:8443"


@pytest.mark.parametrize("text", ["0-3,8", "5", "0", "8191", "2-2", "0-8191"])
def test_lists_of_cpus(text: str) -> None:
    """A list of CPUs stays as it is written, also where it looks like a number."""
    assert read(f"tasks: {{allowed_cpus: '{text}'}}").config.tasks.allowed_cpus == text
    assert read("", sets=[f"tasks.allowed_cpus={text}"]).config.tasks.allowed_cpus == text


def test_what_every_run_gets() -> None:
    """The bounds of weights and processes are values; null leaves a weight as it is."""
    tasks = read("tasks: {cpu_weight: 1, io_weight: 10000, processes_max: 4194304}").config.tasks
    assert (tasks.cpu_weight, tasks.io_weight, tasks.processes_max) == (1, 10_000, 4_194_304)
    tasks = read("tasks: {cpu_weight: null, io_weight: null, allowed_cpus: null}").config.tasks
    assert (tasks.cpu_weight, tasks.io_weight, tasks.allowed_cpus) == (None, None, None)
    assert tasks.processes_max == limits.TASK_PROCESSES_MAX


# --- order and origin ----------------------------------------------------------------------------------------------


def test_order() -> None:
    """A flag wins over the environment, and the environment over the file; each origin is told."""
    loaded = read(
        "log:\n  level: error\n  format: json\nlease: {ttl: 200}\n",
        {"REMOTEGPU_AGENT__LOG__LEVEL": "warning", "REMOTEGPU_AGENT__LEASE__TTL": "250"},
        ["log.level=debug"],
    )
    assert (loaded.config.log.level, loaded.config.log.format, loaded.config.lease.ttl) == ("debug", "json", 250.0)
    assert loaded.origins["log.level"] == "--set log.level"
    assert loaded.origins["log.format"] == "config.yaml:3"
    assert loaded.origins["lease.ttl"] == "environment variable REMOTEGPU_AGENT__LEASE__TTL"
    assert "api.listen" not in loaded.origins


def test_last_flag_wins() -> None:
    """Of a flag that is given twice the last one counts."""
    assert read("", sets=["log.level=debug", "log.level=error"]).config.log.level == "error"


def test_flag_may_hold_equals_signs() -> None:
    """Only the first `=` of a flag parts key from value; what looks like a number stays a text where text is meant."""
    config = read("", sets=["tasks.env.OPTS=a=b=c", "agent.labels.v1.2=x", "agent.machine_id=0012"]).config
    assert config.tasks.env == {"OPTS": "a=b=c"}
    assert config.agent.labels == {"v1.2": "x"}
    assert config.agent.machine_id == "0012"


@pytest.mark.parametrize("name", ["http_proxy", "NCCL_DEBUG", "A__B", "__A", "A__"])
def test_environment_of_tasks_by_environment(name: str) -> None:
    """The name of a tasks' variable stays as it is, with its case and its underscores."""
    config = read("tasks: {env: {KEPT: x}}", {f"REMOTEGPU_AGENT__TASKS__ENV__{name}": "1.0"}).config
    assert config.tasks.env == {"KEPT": "x", name: "1.0"}


def test_lists_by_environment() -> None:
    """Lists and mappings are written as in YAML's flow style."""
    config = read(
        "",
        {
            "REMOTEGPU_AGENT__API__ALLOWED_HOSTS": "[gpu-1.example, gpu-2.example]",
            "REMOTEGPU_AGENT__TASKS__ENV": "{A: 1.0}",
        },
    ).config
    assert config.api.allowed_hosts == ["gpu-1.example", "gpu-2.example"]
    assert config.tasks.env == {"A": "1.0"}


def test_null_by_flag() -> None:
    """`null` switches off what null switches off."""
    assert read("", sets=["api.listen=null"]).config.api.listen is None


def test_other_variables_are_ignored() -> None:
    """Variables of the command line itself are no settings."""
    assert read("", {"REMOTEGPU_AGENT_SOCKET": "/x", "REMOTEGPU_AGENT_DEBUG": "1", "PATH": "/bin"}).config == Config()


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_place_of_a_mistake() -> None:
    """A mistake is told with file, line and column, the line itself, and a caret under what is meant."""
    assert refusal("log:\n  level: loud\n") == (
        "config.yaml:2:10: 'log.level' must be debug, info, warning or error, not the text 'loud'\n"
        "    2 |   level: loud\n"
        "      |          ^^^^\n"
        "1 problem; this configuration cannot be used."
    )


@pytest.mark.parametrize(
    ("text", "place", "nearest"),
    [
        ("agnet: {id: x}", "1:1: unknown key 'agnet'", "agent"),
        ("agent:\n  state-dir: /x", "2:3: unknown key 'state-dir' in 'agent'", "state_dir"),
        ("lease: {renew_intervall: 3}", "1:9: unknown key 'renew_intervall' in 'lease'", "renew_interval"),
        ("gpus: {enabeld: auto}", "1:8: unknown key 'enabeld' in 'gpus'", "enabled"),
        (
            "tasks: {policy: {allowed_comands: []}}",
            "1:18: unknown key 'allowed_comands' in 'tasks.policy'",
            "allowed_commands",
        ),
        ("retentoin: {max_age: 7d}", "1:1: unknown key 'retentoin'", "retention"),
        ("api: {tls_cert: /x}", "1:7: unknown key 'tls_cert' in 'api'", "tls_cert_file"),
    ],
)
def test_unknown_keys(text: str, place: str, nearest: str) -> None:
    """An unknown key is refused at its place, with the nearest known one."""
    report = refusal(text)
    assert f"config.yaml:{place}" in report
    assert f"did you mean '{nearest}'?" in report


def test_unknown_keys_outside_of_the_file() -> None:
    """A misspelt variable or flag is named as such, with the nearest key."""
    report = refusal("", {"REMOTEGPU_AGENT__LOG__LEVL": "debug"}, ["leese.ttl=3"])
    assert (
        "environment variable REMOTEGPU_AGENT__LOG__LEVL: unknown key 'levl' in 'log'; did you mean 'level'?" in report
    )
    assert "--set leese.ttl: unknown key 'leese'; did you mean 'lease'?" in report


@pytest.mark.parametrize("text", ["log.level", "=x", "log", ""])
def test_flag_without_value(text: str) -> None:
    """A flag that is no `section.key=value` is told how to be one."""
    assert "must be section.key=value, such as log.level=debug" in refusal("", sets=[text])


def test_duplicate_keys() -> None:
    """A key that stands twice is refused with both lines."""
    report = refusal("log:\n  level: info\n  level: debug\n")
    assert "config.yaml:3:3: duplicate key 'level'; it stands in line 2 already" in report


def test_duplicate_sections() -> None:
    """So is a section that stands twice."""
    assert "duplicate key 'log'" in refusal("log: {level: info}\nlease: {ttl: 100}\nlog: {format: json}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agent: 5", "'agent' must be a mapping (key: value), not the number 5"),
        ("agent: [a]", "'agent' must be a mapping (key: value), not a list"),
        ("- a\n- b", "the config must be a mapping of sections, such as 'agent:'"),
        ("just text", "the config must be a mapping of sections"),
        (
            "agent: {state_dir: var/lib}",
            "'agent.state_dir' must be an absolute path, beginning with '/', not 'var/lib'",
        ),
        ("agent: {state_dir: 5}", "'agent.state_dir' must be an absolute path"),
        ("agent: {id: 'a b'}", "'agent.id' must begin with a letter or digit"),
        ("agent: {labels: [a]}", "'agent.labels' must be a mapping"),
        ("tasks: {cpu_weight: 0}", "'tasks.cpu_weight' must be at least 1, not 0"),
        ("tasks: {io_weight: 10001}", "'tasks.io_weight' must be at most 10000, not 10001"),
        ("tasks: {processes_max: 0}", "'tasks.processes_max' must be at least 1, not 0"),
        ("tasks: {allowed_cpus: all}", "'tasks.allowed_cpus' must be a list of CPUs such as 0-3,8, not 'all'"),
        ("tasks: {allowed_cpus: '3-1'}", "'tasks.allowed_cpus' must be a list of CPUs such as 0-3,8: 3-1 ends before"),
        ("tasks: {allowed_cpus: '0,'}", "'tasks.allowed_cpus' must be a list of CPUs such as 0-3,8, not '0,'"),
        ("tasks: {allowed_cpus: 8192}", "must be a list of CPUs such as 0-3,8, with numbers below 8192, not 8192"),
        ("tasks: {allowed_cpus: '0,7-9999'}", "with numbers below 8192, not 7-9999"),
        ("tasks: {processes_max: 4194305}", "'tasks.processes_max' must be at most 4194304, not 4194305"),
        ("output: {retain: 0}", "'output.retain' must be at least 1, not 0"),
        ("output: {retain: 100}", "'output.retain' must be at most 99, not 100"),
        ("output: {retain: 7d}", "'output.retain' must be a whole number, not the text '7d'"),
        ("output: {max_size_mb: 0}", "'output.max_size_mb' must be at least 1, not 0"),
        ("output: {max_size_mb: 1.5}", "'output.max_size_mb' must be a whole number"),
        ("output: {max_size_mb: '100'}", "'output.max_size_mb' must be a whole number, not the text '100'"),
        ("output: {max_size_mb: true}", "'output.max_size_mb' must be a whole number, not true"),
        ("results: {inline_limit_kb: 65}", "'results.inline_limit_kb' must be at most 64, not 65"),
        ("lease: {ttl: soon}", "'lease.ttl' must be a duration, not 'soon'"),
        ("lease: {ttl: 5 minutes}", "write seconds, or a number with s, m, h or d"),
        ("lease: {ttl: 0}", "'lease.ttl' must be more than 0"),
        ("lease: {ttl: -1}", "'lease.ttl' must not be negative"),
        ("lease: {ttl: true}", "'lease.ttl' must be a duration"),
        ("lease: {ttl: .inf}", "'lease.ttl' must be a finite duration"),
        ("lease: {ttl: 400d}", "'lease.ttl' must be at most 366d"),
        ("lease: {on_unreachable: stopp}", "did you mean 'stop'?"),
        (
            "capacity: {max_concurrent: many}",
            "'capacity.max_concurrent' must be auto or a whole number, not the text 'many'",
        ),
        ("capacity: {max_concurrent: 0}", "'capacity.max_concurrent' must be from 1 to 4096, or auto"),
        ("capacity: {cpus: -1}", "'capacity.cpus' must be more than 0"),
        ("tasks: {run_as: 'a b'}", "'tasks.run_as' must be the name of a user"),
        (
            "tasks: {run_as: submitter}\ncontrol_plane: {url: 'https://plane'}",
            "'tasks.run_as: submitter' runs each task as the user who submits it, and those of 'control_plane.url'",
        ),
        (
            "tasks: {run_as: submitter}\napi: {socket: null}",
            "'tasks.run_as: submitter' runs each task as the user who submits it over the Unix socket, and",
        ),
        ("api: {socket_group: 'a b'}", "'api.socket_group' must be the name of a group"),
        ("tasks: {env: {'A=B': x}}", "A=B"),
        ("api: {listen: localhost}", "'api.listen' must be ADDRESS:PORT with a port from 0 to 65535"),
        ("api: {listen: '127.0.0.1:99999'}", "'api.listen' must be ADDRESS:PORT with a port from 0 to 65535"),
        ("api: {listen: '::1:80'}", "'api.listen' must have an IPv6 address in brackets"),
        ("api: {listen: 'gpu-1:8090'}", "'api.listen' must be ADDRESS:PORT with an IP address of this host"),
        ("api: {listen: 8090}", "'api.listen' must be text, not the number 8090"),
        (f"api: {{socket: /{'x' * 120}}}", "'api.socket' is longer than 107 bytes"),
        ("api: {legacy_callers: [{network: 10.0.0.1/8, allow: []}]}", "must be a network such as 10.0.0.0/8"),
        ("api: {legacy_callers: [{network: 10.0.0.0/8, allow: [exec]}]}", "must be system_info or process_stop"),
        ("api: {legacy_callers: [{allow: []}]}", "'network' is missing"),
        ("control_plane: {url: plane.example}", "'control_plane.url' must be a URL with http or https and a host"),
        ("control_plane: {url: 'ftp://plane'}", "must be a URL with http or https"),
        ("control_plane: {url: 'http://plane:port'}", "'control_plane.url' is not a URL"),
        ("control_plane: {url: 'http://plane:99999'}", "'control_plane.url' is not a URL"),
        ("control_plane: {url: 'http://plane:0'}", "has the port 0"),
        ("control_plane: {url: 'http://[::1'}", "'control_plane.url' is not a URL"),
        ("control_plane: {url: 'http://user:pass@plane'}", "must not hold a user or a password"),
        ("control_plane: {url: 'http://plane/api/v1/agent'}", "must end before /api/v1/agent"),
        ("control_plane: {url: 'http://plane/?x=1'}", "must not have a '?' or '#' part"),
        ("control_plane: {timeout: 0}", "'control_plane.timeout' must be more than 0"),
        ("audit: {max_size_gb: -1}", "'audit.max_size_gb' must be at least 0, not -1"),
        ("log: {level: trace}", "'log.level' must be debug, info, warning or error"),
        ("log: {level: [info]}", "'log.level' must be"),
    ],
)
def test_wrong_values(text: str, message: str) -> None:
    """A value of the wrong kind, or out of bounds, is refused by its key with what would be right."""
    report = refusal(text)
    assert message in report
    assert report.endswith("problem; this configuration cannot be used.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lease: {ttl: 10, margin: 5}", "'lease.margin' (5 s) must be less than half of 'lease.ttl' (10 s)"),
        ("lease: {ttl: 60}", "'lease.renew_interval' (60 s) must be less than 'lease.ttl' without 'lease.margin'"),
        (
            "control_plane: {client_cert_file: /x}",
            "'control_plane.client_cert_file' needs 'control_plane.client_key_file'",
        ),
        (
            "control_plane: {client_key_file: /x}",
            "'control_plane.client_key_file' needs 'control_plane.client_cert_file'",
        ),
        ("api: {listen: '0.0.0.0:8090'}", "'api.listen' is reachable from other hosts"),
        ("api: {listen: '[::]:8090'}", "name the accepted tokens in 'api.tokens_file'"),
        ("api: {listen: null, socket: null}", "nobody could reach the agent"),
        ("api: {tls_cert_file: /x}", "'api.tls_cert_file' needs 'api.tls_key_file' beside it"),
        ("api: {tls_key_file: /x}", "'api.tls_key_file' needs 'api.tls_cert_file' beside it"),
    ],
)
def test_contradictions(text: str, message: str) -> None:
    """Values that do not go together are refused, with what to change."""
    assert message in refusal(text)


def test_off_loopback_with_tokens() -> None:
    """With a tokens file the API may listen everywhere."""
    assert read("api: {listen: '0.0.0.0:8090', tokens_file: /etc/tokens}").config.api.listen == "0.0.0.0:8090"


def test_contradiction_is_traced_to_its_source() -> None:
    """A contradiction that a flag brings in is told of the file's place where it is in the file."""
    assert "config.yaml:1:17: 'lease.margin'" in refusal("lease: {margin: 50}", sets=["lease.ttl=80"])


def test_all_mistakes_at_once() -> None:
    """All mistakes are told in one report, whatever their source, and counted."""
    report = refusal("log: {level: x}\nlease: {ttl: y}\n", {"REMOTEGPU_AGENT__OUTPUT__MAX_SIZE_MB": "z"}, ["nope=1"])
    assert report.endswith("4 problems; this configuration cannot be used.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("webhooks: [{url: 'http://x'}]", "1:1: 'webhooks' is not supported by this version"),
        ("gpus: {enabled: true}", "1:8: 'gpus.enabled' is not supported by this version"),
        ("tasks:\n  isolation:\n    readonly_paths: [/data]", "3:5: 'tasks.isolation.readonly_paths' is not supported"),
        ("tasks: {policy: {allowed_commands: [python]}}", "'tasks.policy.allowed_commands' is not supported"),
        ("control_plane: {allow_services: true}", "leave it out, or at false"),
        ("capacity: {prefetch: 1}", "leave it out, or at 0"),
        ("spool: {enabled: false}", "leave it out, or at true"),
        ("spool: {enabled: 1}", "leave it out, or at true"),
        ("host_operations: {ssh: {enabled: true}}", "'host_operations' is not supported"),
        ("gpus: off", "'gpus' is not supported by this version"),
    ],
)
def test_keys_of_later_versions(text: str, message: str) -> None:
    """A key that this version does not act on is refused unless it is at its default: nothing is ignored silently."""
    assert message in refusal(text)


def test_later_default_written_differently() -> None:
    """A later key's default may be written in another unit."""
    assert read("retention: {max_age: 168h}\ngpus: {idle_after: 1800, sample_interval: 1}").config == Config()


def test_secrets_stay_out_of_reports() -> None:
    """The excerpt of a line hides what stands behind a word for a secret."""
    assert "hush" not in refusal("tasks: {env: {API_TOKEN: hush}, grace_period: x}")


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02",
        b"\xff\xfe\x00x",
        b"log: {level: \xe9}",
        b"\x7fELF\x02\x01\x01" + b"\x00" * 64,
        b"a: b: c",
        b"{",
        b"\t- x",
        b"&a [*a]",
        b"!!python/object:os.system x",
        b"[" * 1000,
        b"9" * 5000,
        b"log: {level: " + b"9" * 5000 + b"}",
    ],
)
def test_garbage(raw: bytes) -> None:
    """Whatever the bytes are, the answer is a report."""
    with pytest.raises(Misconfigured):
        read_config_text(raw, "config.yaml", {})


@pytest.mark.parametrize("value", ["9" * 5000, "1e999", "[", "{a", "\udcff", "[\udcff]", "!x", "&a", "\x00"])
def test_garbage_by_flag(value: str) -> None:
    """Whatever a flag says, the answer is a report."""
    with pytest.raises(Misconfigured):
        read("", sets=[f"log.level={value}"])


def test_two_documents() -> None:
    """The config is one document."""
    assert "config.yaml:3:1: the config is one document" in refusal("log: {}\n---\nlease: {}\n")


def test_too_large(tmp_path: Path) -> None:
    """A file above the bound is refused, and not read whole."""
    path = tmp_path / "config.yaml"
    with path.open("wb") as file:
        file.truncate(limits.CONFIG_MAX_BYTES * 100)
    with pytest.raises(Misconfigured, match="is larger than"):
        load_config(path, {})


def test_endless_file() -> None:
    """A device without end is no config."""
    with pytest.raises(Misconfigured, match="is larger than"):
        load_config(Path("/dev/zero"), {})


def test_missing_file(tmp_path: Path) -> None:
    """A file that was named and is not there is an error with its mend."""
    with pytest.raises(
        Misconfigured, match=re.escape("there is no such config file; make one with `remotegpu-agent setup`")
    ):
        load_config(tmp_path / "none.yaml", {})


def test_unreadable_file(tmp_path: Path) -> None:
    """What cannot be read is told with the reason."""
    with pytest.raises(Misconfigured, match="cannot be read: Is a directory"):
        load_config(tmp_path, {})


def test_no_default_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the default file the agent stands alone with the defaults."""
    monkeypatch.setattr("remotegpu_agent.config.DEFAULT_PATH", tmp_path / "config.yaml")
    assert read_config(None, {}) == Loaded(Config(), {})


def test_default_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The default file is read if it is there."""
    path = tmp_path / "config.yaml"
    path.write_text("log: {level: debug}")
    monkeypatch.setattr("remotegpu_agent.config.DEFAULT_PATH", path)
    assert load_config(None, {}).log.level == "debug"


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [("127.0.0.1:8090", "127.0.0.1", 8090), ("[::1]:0", "::1", 0), ("localhost:1", "127.0.0.1", 1)],
)
def test_split_listen(text: str, address: str, port: int) -> None:
    """An address to listen on has two parts; port 0 is a free one."""
    found, number = split_listen(text)
    assert (str(found), number) == (address, port)
