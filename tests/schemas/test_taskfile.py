"""Task files: what is accepted means what taskfile.md says; what is refused is refused whole, with every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from remotegpu_schemas import limits
from remotegpu_schemas.problems import InvalidFile
from remotegpu_schemas.task import Backoff, RetryOn, TaskId, TaskType
from remotegpu_schemas.task_form import RetryForm
from remotegpu_schemas.taskfile import load_task_file, override_tasks
from tests.schemas.support import load, load_task, messages, report

# --- accepted ------------------------------------------------------------------------------------------------------


def test_smallest() -> None:
    """The smallest task file of taskfile.md: a shell string."""
    task = load_task("task: {command: nvidia-smi}")
    assert (task.command, task.args, task.type, task.priority, task.retry.max) == ("nvidia-smi", None, "shell", 5, 0)


def test_one_task_with_everything_that_this_version_acts_on() -> None:
    """The example of taskfile.md, as far as it is supported."""
    task = load_task("""
        task:
          name: pytorch-train
          type: python
          command: python
          args: [train.py, --epochs=100]
          workdir: /workspace
          env: {SEED: "1"}
          resources: {gpus: 2, cpus: 8, memory_gb: 64}
          timeout: 24h
          grace_period: 30s
          priority: 3
          stop_signal: SIGINT
          retry: {max: 3, delay: 60s, backoff: exponential, max_delay: 10m,
                  on: [exit_code, out_of_memory, gpu_fault, timed_out], exit_codes: [75]}
          labels: {team: vision}
        """)
    assert (task.name, task.type, task.command, task.args) == (
        "pytorch-train",
        TaskType.PYTHON,
        "python",
        ("train.py", "--epochs=100"),
    )
    assert (task.workdir, task.env, task.labels) == ("/workspace", {"SEED": "1"}, {"team": "vision"})
    assert (task.resources.gpus, task.resources.cpus, task.resources.memory_mb) == (2, 8.0, 65536)
    assert (task.timeout_s, task.grace_period_s, task.priority, task.stop_signal) == (86400, 30, 3, 2)
    retry = task.retry
    assert (retry.max, retry.delay_s, retry.backoff, retry.max_delay_s) == (3, 60, Backoff.EXPONENTIAL, 600)
    assert retry.on == {RetryOn.EXIT_CODE, RetryOn.OUT_OF_MEMORY, RetryOn.GPU_FAULT, RetryOn.TIMED_OUT}
    assert retry.exit_codes == {75}


def test_script_of_its_own() -> None:
    """A script keeps its lines, with an interpreter if one is named."""
    task = load_task("task:\n  interpreter: python3\n  script: |\n    import os\n    print(1)\n")
    assert (task.script, task.interpreter, task.command) == ("import os\nprint(1)\n", "python3", None)


def test_empty_arguments_are_a_vector() -> None:
    """`args: []` starts the program itself, without a shell."""
    assert load_task("task: {command: nvidia-smi, args: []}").args == ()


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        pytest.param("max_retries: 3", "retry: {max: 3}", id="max_retries"),
        pytest.param("retry_delay: 60", "retry: {delay: 1m}", id="retry_delay"),
        pytest.param("max_retries: 2, retry_delay: 5s", "retry: {max: 2, delay: 5}", id="both"),
        pytest.param("grace_period_sec: 30", "grace_period: 30s", id="grace_period_sec"),
        pytest.param("max_retries: 3, retry: {max: 3}", "retry: {max: 3}", id="max_retries-said-twice"),
        pytest.param("grace_period: 30s, grace_period_sec: 30", "grace_period: 30", id="grace-said-twice"),
        pytest.param("max_retries: 3, retry: {delay: 5}", "retry: {max: 3, delay: 5}", id="mixed"),
    ],
)
def test_older_keys_mean_the_same(older: str, newer: str) -> None:
    """The flat keys of older files stay valid and make the same task."""
    assert load_task(f"task: {{command: x, {older}}}") == load_task(f"task: {{command: x, {newer}}}")


def test_older_keys_without_a_newer_form_are_kept() -> None:
    """Where it is meant to run, which group it belongs to, and the keys of a lease."""
    (submission,) = load("""
        task: {command: x, id: t-1, machine_id: m1, targets: {machine_ids: [m2], ips: [10.0.0.1]},
               group_id: g, parent_id: p, lease_ttl_sec: 60, renew_interval_sec: 20, heartbeat_interval_sec: 5}
        """)
    task = submission.task(TaskId("t-1"))
    assert (submission.form.id, submission.machine_ids, submission.ips) == ("t-1", ("m1", "m2"), ("10.0.0.1",))
    assert (task.group_id, task.parent_id) == ("g", "p")


@pytest.mark.parametrize(
    ("older", "message"),
    [
        ("max_retries: 1, retry: {max: 2}", "'max_retries' is 1 and 'retry.max' is 2"),
        ("retry_delay: 1m, retry: {delay: 90s}", "'retry_delay' is 60 and 'retry.delay' is 90"),
        ("grace_period_sec: 20, grace_period: 10s", "'grace_period_sec' is 20 and 'grace_period' is 10"),
        ("retry_delay: 1234567, retry: {delay: 1234568}", "'retry_delay' is 1234567 and 'retry.delay' is 1234568"),
        ("max_retries: 0, retry: {max: 2}", "'max_retries' is 0 and 'retry.max' is 2"),
    ],
)
def test_contradictions_are_errors(older: str, message: str) -> None:
    """Old and new forms of one thing with different values; the error stands at the older key."""
    assert messages(f"task: {{command: x, {older}}}") == [f"job.yaml:1:20: {message}: one thing, two values; keep one"]


def test_numbers_in_arguments_stay_as_they_are_written() -> None:
    """`1.10` and `1e3` are what the program gets; true and false are words."""
    task = load_task(
        "task: {command: x, args: [1.10, 1e3, 007, true], env: {V: 1.10, F: false}, name: 1.20, labels: {v: 2.0}}"
    )
    assert task.args == ("1.10", "1e3", "007", "true")
    assert (task.env, task.name, task.labels) == ({"V": "1.10", "F": "false"}, "1.20", {"v": "2.0"})


def test_null_means_not_given() -> None:
    """A key without a value is as good as none."""
    assert load_task(
        """
        task:
          command: x
          args:
          env:
          resources:
          priority: null
          labels: ~
        """
    ) == load_task("task: {command: x}")


def test_name_and_labels_of_the_document_are_defaults() -> None:
    """The task's own name wins, labels are merged key by key."""
    task = load_task("version: 1\nname: outer\nlabels: {a: 1, b: 2}\ntask: {command: x, labels: {b: 3}}")
    assert (task.name, task.labels) == ("outer", {"a": "1", "b": "3"})
    assert load_task("name: outer\ntask: {command: x, name: inner}").name == "inner"


def test_several_documents() -> None:
    """Each document is one submission, in order, with the line where its task stands."""
    submissions = load("task: {command: a}\n---\n# nothing here\n---\nname: n\ntask:\n  command: b\n")
    assert [(s.form.command, s.line) for s in submissions] == [("a", 1), ("b", 6)]


def test_json_is_a_task_file() -> None:
    """As the API gets it."""
    body = {"task": {"command": "python", "args": ["\U0001f600", "a/b"], "env": {"A": "1"}, "timeout": 90}}
    task = load_task(json.dumps(body, indent="\t").encode())
    assert (task.args, task.env, task.timeout_s) == (("\U0001f600", "a/b"), {"A": "1"}, 90)


def test_keys_of_a_single_task_are_overridden() -> None:
    """What the command line changes makes a file that means the same otherwise."""
    text = b"name: n\ntask: {command: x, args: [1.10], priority: 5}\n---\ntask: {command: y}\n"
    changed = override_tasks(text, "job.yaml", {"priority": 1, "name": "\U0001f600"})
    first, second = (submission.task(TaskId("t")) for submission in load_task_file(changed))
    assert (first.args, first.priority, first.name, second.priority) == (("1.10",), 1, "\U0001f600", 1)


ID_RULE = "must begin with a letter or digit and have only letters, digits and . _ : - (at most 128 characters)"

# --- refused -------------------------------------------------------------------------------------------------------


def test_report_as_the_format_shows_it() -> None:
    """All errors in file order, each with line, column, the line and a caret, and the count at the end."""
    text = """\
        name: nightly
        task:
          command: ./report.sh
          id: report
          dependson: [eval]
          priority: 11
        """
    assert report(text) == (
        "job.yaml:5:3: unknown key 'dependson' in task 'report'; did you mean 'depends_on'?\n"
        "    5 |   dependson: [eval]\n"
        "      |   ^^^^^^^^^\n"
        "job.yaml:6:13: 'priority' must be at most 10, not 11\n"
        "    6 |   priority: 11\n"
        "      |             ^^\n"
        "2 problems; nothing was submitted."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # unknown keys
        ("task: {command: x, timout: 5}", "1:20: unknown key 'timout' in the task; did you mean 'timeout'?"),
        ("task: {command: x, gpus: 2}", "1:20: unknown key 'gpus' in the task; did you mean 'resources.gpus'?"),
        (
            "task: {command: x, resources: {gpu: 2}}",
            "1:32: unknown key 'gpu' in 'resources' of the task; did you mean 'gpus'?",
        ),
        (
            "task: {command: x, resources: {tpus: 2}}",
            "1:32: unknown key 'tpus' in 'resources' of the task; did you mean 'gpus'?",
        ),
        (
            "task: {command: x, name: n, retry: {zzz: 2}}",
            f"1:37: unknown key 'zzz' in 'retry' of task 'n'; known keys: {', '.join(RetryForm.model_fields)}",
        ),
        ("tasks: {command: x}", "1:1: unknown key 'tasks'; did you mean 'task'?"),
        # not in this version
        ("group: {tasks: []}", "1:1: 'group' is not supported by this version"),
        ("task: {command: x, preemptible: true}", "1:20: 'preemptible' is not supported by this version"),
        (
            "task: {command: x, resources: {gpus: {count: 2}}}",
            "1:38: the long form of 'gpus' is not supported by this version; write a number",
        ),
        ("task: {command: x, type: container}", "1:26: a task of type 'container' is not supported by this version"),
        (
            "task: {command: x, args: ['{{ matrix.lr }}']}",
            "1:27: the substitution {{ matrix.lr }} is not supported by this version",
        ),
        (
            "task: {command: x, env: {A: '{{vars.b}}'}}",
            "1:29: the substitution {{vars.b}} is not supported by this version",
        ),
        # wrong types
        ("task: [x]", "1:7: 'task' must be a mapping (key: value), not a list"),
        ("task: {command: 5}", "1:17: 'command' must be text, not the number 5; put it in quotes"),
        ("task: {command: [a]}", "1:17: 'command' must be text, not a list"),
        ("task: {command: x, args: hello}", "1:26: 'args' must be a list, not the text 'hello'"),
        ("task: {command: x, env: [A=1]}", "1:25: 'env' must be a mapping (key: value), not a list"),
        ("task: {command: x, env: {A: [1]}}", "1:29: 'env.A' must be text, not a list"),
        ("task: {command: x, priority: high}", "1:30: 'priority' must be a whole number, not the text 'high'"),
        ("task: {command: x, priority: 3.0}", "1:30: 'priority' must be a whole number, not the number 3.0"),
        ("task: {command: x, priority: '3'}", "1:30: 'priority' must be a whole number, not the text '3'"),
        (
            "task: {command: x, resources: {gpus: 1.5}}",
            "1:38: 'resources.gpus' must be a whole number, not the number 1.5",
        ),
        ("task: {command: x, labels: {a: {b: c}}}", "1:32: 'labels.a' must be text, not a mapping"),
        # values out of bounds
        ("task: {command: x, resources: {gpus: -1}}", "1:38: 'resources.gpus' must be at least 0, not -1"),
        ("task: {command: x, resources: {memory_gb: .inf}}", "1:43: 'resources.memory_gb' must be a finite number"),
        ("task: {command: x, resources: {cpus: 4096.5}}", "1:38: 'resources.cpus' must be at most 4096, not 4096.5"),
        ("task: {command: x, timeout: 400d}", "1:29: 'timeout' must be at most 366d"),
        ("task: {command: x, max_retries: 1001}", "1:33: 'max_retries' must be at most 1000, not 1001"),
        (
            "task: {command: x, id: ../x}",
            f"1:24: 'id' {ID_RULE}",
        ),
        (
            "task: {command: x, group_id: t\u0430sk}",
            f"1:30: 'group_id' {ID_RULE}",
        ),
        (
            "task: {command: x, timeout: 60, warn: {signal: SIGUSR1, before: 5m}}",
            "1:65: 'warn.before' is not shorter than 'timeout': nobody would be warned",
        ),
        (
            "task: {command: x, warn: {signal: SIGKILL, before: 5m}}",
            "1:35: 'warn.signal' must be a signal that a task can hear, such as SIGUSR1; SIGKILL and SIGSTOP are none",
        ),
        (
            "task: {command: x, stop_signal: SIGFOO}",
            "1:33: 'stop_signal' must be a signal: write a name such as SIGINT, or a number from 1 to 64",
        ),
        (
            "task: {command: x, env: {'A=B': 1}}",
            "1:26: 'env.A=B': an environment name must not be empty or contain '='",
        ),
        ('task: {command: x, workdir: "a\\0b"}', "1:29: 'workdir' must not contain a NUL character"),
        ('task: {command: x, labels: {"a\\0": b}}', "1:29: 'labels.a\ufffd': must not contain a NUL character"),
        (
            "version: 2\ntask: {command: x}",
            "1:10: 'version' must be 1, the one version of the format that this program knows",
        ),
        # choices
        (
            "task: {command: x, type: shel}",
            "1:26: 'type' must be shell, python, script or container, not the text 'shel'; did you mean 'shell'?",
        ),
        (
            "task: {command: x, retry: {backoff: linear}}",
            "1:37: 'retry.backoff' must be fixed or exponential, not the text 'linear'",
        ),
        (
            "task: {command: x, retry: {on: []}}",
            "1:32: 'retry.on' is empty: no cause is retried; name some, or leave it out",
        ),
        # what is missing
        ("task:", "1:1: 'task' is empty; write for example: task: {command: nvidia-smi}"),
        ("task: {}", "1:1: a task needs a 'command' or a 'script'"),
        ("name: x", "1:1: a document needs a 'task'"),
        ("task: {command: null}", "1:1: a task needs a 'command' or a 'script'"),
        ("task: {command: '  '}", "1:17: 'command' is empty"),
        ("task: {script: ''}", "1:16: 'script' is empty"),
        ("task: {command: x, script: y}", "1:20: a task has either a 'command' or a 'script', not both"),
        ("task: {command: x, interpreter: y}", "1:20: 'interpreter' is for a 'script', and this task has none"),
        # documents
        ("hello", "1:1: a document must be a mapping; the smallest is: task: {command: nvidia-smi}"),
        ("- task", "1:1: a document must be a mapping; the smallest is: task: {command: nvidia-smi}"),
        (
            "task: {command: x, id: a}\n---\ntask: {command: y, id: a}",
            "3:24: the id 'a' is taken by the task in line 1",
        ),
    ],
)
def test_refused_with_its_place(text: str, message: str) -> None:
    """One mistake gives one sentence with line, column, and what to do."""
    assert messages(text) == [f"job.yaml:{message}"]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n---\n", "\n"])
def test_empty_file_shows_the_smallest(text: str) -> None:
    """A file without a document says what one looks like."""
    assert report(text) == (
        "job.yaml: has no document; the smallest is: task: {command: nvidia-smi}\n1 problem; nothing was submitted."
    )


def test_file_is_refused_whole() -> None:
    """One mistake in one document refuses all of them, and every document's mistakes are told."""
    text = "task: {command: a}\n---\ntask: {comand: b}\n---\ntask: {command: c, priority: 0}\n"
    assert messages(text) == [
        "job.yaml:3:8: unknown key 'comand' in the task; did you mean 'command'?",
        "job.yaml:5:30: 'priority' must be at least 1, not 0",
    ]


def test_f49_report_shows_no_secret() -> None:
    """Reports are stored beside rejected files; what a name gives away as a secret is starred out."""
    text = report(
        "task: {command: x, env: 'API_TOKEN=hunter2'}\n---\ntask: {command: x, env: {DB_PASSWORD: [hunter2]}}\n"
    )
    assert "hunter2" not in text
    assert text.endswith("2 problems; nothing was submitted.")


def test_labels_are_bounded_also_when_merged() -> None:
    """An accepted file cannot fail later: what only the whole task shows is checked too."""
    outer = ", ".join(f"a{number}: x" for number in range(40))
    inner = ", ".join(f"b{number}: x" for number in range(40))
    assert messages(f"labels: {{{outer}}}\ntask: {{command: x, labels: {{{inner}}}}}") == [
        "job.yaml:2:1: 'labels' has more than 64 entries"
    ]


def test_100_mb_are_refused() -> None:
    """By their size, at once."""
    assert messages(bytes(100 * limits.MIB)) == [
        "job.yaml: is larger than 1048576 bytes (104857600); is it the right file?"
    ]


def test_file_of_nothing_but_mistakes_gives_a_short_report() -> None:
    """Bounded, and without looking for the nearest key 50,000 times."""
    text = report("task:\n" + "".join(f"  key{number}: 1\n" for number in range(20_000)))
    assert len(text) < 20_000
    assert text.endswith("20000 problems; nothing was submitted.")


@pytest.mark.parametrize("size", [limits.ARGUMENT_MAX_BYTES - 1, limits.ARGUMENT_MAX_BYTES])
def test_argument_that_linux_refuses(size: int) -> None:
    """128 KiB with the final NUL is the most for one argument, counted in bytes."""
    text = "task: {command: x, args: [" + "\u00e9" * (size // 2) + "x" * (size % 2) + "]}"
    if size < limits.ARGUMENT_MAX_BYTES:
        assert load_task(text).args is not None
    else:
        assert messages(text) == ["job.yaml:1:27: 'args[0]' is longer than 131071 bytes, which Linux refuses"]


def test_name_of_the_file_is_shown_safely(tmp_path: Path) -> None:
    """A name with control characters does not reach the terminal."""
    with pytest.raises(InvalidFile) as caught:
        load_task_file(b"task:", "a\x1b[2Jb.yaml")
    assert str(caught.value).startswith("a\ufffd[2Jb.yaml:1:1: ")


def test_documents_are_bounded() -> None:
    """A thousand submissions in one file are fine, one more is refused where it stands."""
    document = "---\ntask: {command: x}\n"
    assert len(load(document * limits.TASK_FILE_MAX_DOCUMENTS)) == limits.TASK_FILE_MAX_DOCUMENTS
    assert messages(document * (limits.TASK_FILE_MAX_DOCUMENTS + 1)) == [
        "job.yaml:2002:1: more than 1000 documents in one file; split it"
    ]
