"""The task file: from YAML (or JSON) that a person wrote to submissions.

Unknown keys are errors, and so are the keys that the format names but this version does not act on: one table
(`_NOT_SUPPORTED`) says which. A file is accepted whole or not at all. Pure: makes no ids, reads no disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic.config import JsonDict

from remotegpu_schemas import limits
from remotegpu_schemas.explain import Wording, explain, sentences
from remotegpu_schemas.forms import Form, admit_null
from remotegpu_schemas.problems import Finding, InvalidFile, Path, Problem, dotted
from remotegpu_schemas.strict_yaml import Document, load
from remotegpu_schemas.task import Task, TaskId, TaskType
from remotegpu_schemas.task_form import Labels, Name, TaskForm, contradictions, task_from_mapping, to_task

__all__ = [
    "DocumentForm",
    "InvalidFile",
    "Submission",
    "TaskForm",
    "load_task_file",
    "override_tasks",
    "task_from_mapping",
    "to_task",
]

CONSEQUENCE: Final = "nothing was submitted"
"""The last words of a report on a task file."""

_PROBLEMS_MAX: Final = 1000
"""Documents behind so many problems are not looked at: the report shows fewer anyway."""

_NOT_SUPPORTED: Final[Mapping[Path, frozenset[str]]] = {
    (): frozenset({"group", "repeat", "template", "schedule", "vars"}),
    ("task",): frozenset(
        {
            "artifacts",
            "depends_on",
            "env_file",
            "hooks",
            "image",
            "matrix",
            "notify",
            "on_reboot",
            "on_unreachable",
            "preemptible",
            "repeat_count",
            "when",
        }
    ),
}
"""By the place of the mapping: keys of taskfile.md that later versions act on. A claimed task may carry them."""

_VERBATIM: Final = frozenset({"id", "name", "args", "env", "labels", "group_id", "parent_id", "machine_id", "targets"})
"""Keys of a task whose numbers are text, and stay as they are written."""

_SUBSTITUTION: Final = re.compile(r"\{\{\s*(?:matrix|vars|tasks|run)\.[\w.-]+\s*\}\}")
_SUBSTITUTED: Final = ("name", "command", "args", "script", "workdir", "env")


def _version(value: int) -> int:
    if value != 1:
        raise ValueError("must be 1, the one version of the format that this program knows")
    return value


def _need_task(schema: JsonDict, model: type[BaseModel]) -> None:
    """The form admits that there is no task, to say more than that it is missing; a file needs one."""
    admit_null(schema, model)
    schema["required"] = ["task"]
    schema["not"] = {"properties": {"task": {"type": "null"}}}


class DocumentForm(Form):
    """One document of a task file."""

    model_config = ConfigDict(json_schema_extra=_need_task)

    version: Annotated[int, AfterValidator(_version), WithJsonSchema({"const": 1})] = 1
    name: Name | None = None
    labels: Labels = Field(default={})
    task: TaskForm | None = None


@dataclass(frozen=True)
class Submission:
    """One accepted document. `machine_ids` and `ips` name where it is meant to run; both empty means here."""

    form: TaskForm
    defaults: TaskForm
    line: int

    def task(self, task_id: TaskId) -> Task:
        """The task under an id; `form.id` is the one that the file asks for, if it does."""
        return to_task(self.form, task_id, self.defaults)

    @property
    def machine_ids(self) -> tuple[str, ...]:
        """The machines that the file names, in its order."""
        own = (self.form.machine_id,) if self.form.machine_id is not None else ()
        return own + tuple(self.form.targets.machine_ids if self.form.targets is not None else ())

    @property
    def ips(self) -> tuple[str, ...]:
        """The addresses that the file names, in its order."""
        return tuple(self.form.targets.ips if self.form.targets is not None else ())


def load_task_file(
    text: bytes, name: str = "task file", *, max_bytes: int = limits.TASK_FILE_MAX_BYTES
) -> list[Submission]:
    """The submissions of a task file, in its order. `name` is what the file is called in messages.

    Raises InvalidFile with every problem of the file, and nothing else whatever the bytes are.
    """
    try:
        documents = load(text, name, max_bytes=max_bytes)
    except InvalidFile as error:
        raise InvalidFile(error.problems, CONSEQUENCE) from error
    if not documents:
        empty = Problem(name, 0, 0, 0, "has no document; the smallest is: task: {command: nvidia-smi}")
        raise InvalidFile([empty], CONSEQUENCE)
    if len(documents) > limits.TASK_FILE_MAX_DOCUMENTS:
        one_more = documents[limits.TASK_FILE_MAX_DOCUMENTS]
        message = f"more than {limits.TASK_FILE_MAX_DOCUMENTS} documents in one file; split it"
        raise InvalidFile([one_more.problem_at(one_more.key_mark(()), message)], CONSEQUENCE)
    problems: list[Problem] = []
    submissions: list[Submission] = []
    for document in documents:
        submission, findings = _read_document(document)
        problems.extend(document.problem(finding) for finding in findings)
        if submission is not None and not findings:
            submissions.append(submission)
        if len(problems) >= _PROBLEMS_MAX:
            break
    problems.extend(_repeated_ids(documents))
    if problems:
        raise InvalidFile(problems, CONSEQUENCE)
    return submissions


def override_tasks(text: bytes, name: str, changes: Mapping[str, object]) -> bytes:
    """A task file that is known to be valid, as YAML again, with these keys of each task replaced."""
    parts = []
    for document in load(text, name):
        data: Any = document.data(_is_verbatim)
        data["task"].update(changes)
        parts.append(json.dumps(data))
    return "\n---\n".join(parts).encode()


def _read_document(document: Document) -> tuple[Submission | None, list[Finding]]:
    data = document.data(_is_verbatim)
    if not isinstance(data, dict):
        return None, [Finding((), "a document must be a mapping; the smallest is: task: {command: nvidia-smi}")]
    findings: list[Finding] = []
    form: DocumentForm | None = None
    try:
        form = DocumentForm.model_validate(data)
    except ValidationError as error:
        findings = explain(error, DocumentForm, _wording(data))
    if "task" not in data and not any(finding.at_key and len(finding.path) == 1 for finding in findings):
        findings.append(Finding((), "a document needs a 'task'", at_key=True))
    raw = data.get("task")
    if isinstance(raw, dict):
        for key in _SUBSTITUTED:
            findings.extend(_substitutions(raw.get(key), ("task", key)))
    elif raw is None and "task" in data:
        findings.append(Finding(("task",), "'task' is empty; write for example: task: {command: nvidia-smi}"))
    if form is None or form.task is None:
        return None, findings
    for finding in (*contradictions(form.task), *_omissions(form.task)):
        findings.append(Finding(("task", *finding.path), finding.message, finding.at_key))
    line = document.key_mark(("task",)).line
    submission = Submission(form.task, TaskForm(name=form.name, labels=form.labels), line)
    return submission, findings or _last_check(submission)


def _last_check(submission: Submission) -> list[Finding]:
    """Whatever `Task` would still refuse, so that an accepted file cannot fail later."""
    try:
        submission.task(TaskId("check"))
    except ValidationError as error:
        return [Finding(("task",), message, at_key=True) for message in sentences(error)]
    return []


def _repeated_ids(documents: list[Document]) -> Iterator[Problem]:
    seen: dict[str, int] = {}
    for document in documents:
        data = document.data(_is_verbatim)
        task = data.get("task") if isinstance(data, dict) else None
        task_id = task.get("id") if isinstance(task, dict) else None
        if not isinstance(task_id, str):
            continue
        mark = document.value_mark(("task", "id"))
        if task_id in seen:
            message = f"the id {task_id[:40]!r} is taken by the task in line {seen[task_id]}"
            yield document.problem_at(mark, message)
        else:
            seen[task_id] = mark.line


def _is_verbatim(path: Path) -> bool:
    return (len(path) >= 2 and path[0] == "task" and path[1] in _VERBATIM) or path[:1] in {("labels",), ("name",)}


def _wording(data: Mapping[str, Any]) -> Wording:
    task = data.get("task")
    title = (task.get("id") or task.get("name")) if isinstance(task, dict) else None
    label = f"task {title[:40]!r}" if isinstance(title, str) else "the task"

    def place(path: Path) -> str:
        if path[:1] != ("task",):
            return f"in '{dotted(path)}'" if path else ""
        return f"in {label}" if len(path) == 1 else f"in '{dotted(path[1:])}' of {label}"

    def name(path: Path) -> str:
        return f"'{dotted(path[1:] if path[:1] == ('task',) and len(path) > 1 else path)}'"

    def other_keys(path: Path) -> frozenset[str]:
        return _NOT_SUPPORTED.get(path, frozenset())

    def refuse_key(path: Path) -> str:
        return f"'{path[-1]}' is not supported by this version"

    def refuse_value(path: Path, value: object) -> str | None:
        if path == ("task", "resources", "gpus") and isinstance(value, dict):
            return "the long form of 'gpus' is not supported by this version; write a number"
        return None

    return Wording(place, name, other_keys, refuse_key, refuse_value)


def _omissions(form: TaskForm) -> Iterator[Finding]:
    """What no single value shows. Said of files only; `Task` itself refuses what cannot run."""
    if form.command is None and form.script is None:
        yield Finding((), "a task needs a 'command' or a 'script'", True)
    if form.command is not None and form.script is not None:
        yield Finding(("script",), "a task has either a 'command' or a 'script', not both", True)
    if form.command is not None and not form.command.strip():
        yield Finding(("command",), "'command' is empty")
    if form.script is not None and not form.script.strip():
        yield Finding(("script",), "'script' is empty")
    if form.interpreter is not None and form.script is None:
        yield Finding(("interpreter",), "'interpreter' is for a 'script', and this task has none", True)
    if form.type is TaskType.CONTAINER:
        yield Finding(("type",), "a task of type 'container' is not supported by this version")
    if form.warn is not None and form.timeout and form.warn.before >= form.timeout:
        yield Finding(("warn", "before"), "'warn.before' is not shorter than 'timeout': nobody would be warned")
    if form.retry is not None and form.retry.on == []:
        yield Finding(("retry", "on"), "'retry.on' is empty: no cause is retried; name some, or leave it out")


def _substitutions(value: object, path: Path) -> Iterator[Finding]:
    match value:
        case str():
            found = _SUBSTITUTION.search(value)
            if found is not None:
                yield Finding(path, f"the substitution {found[0]} is not supported by this version")
        case list():
            for index, item in enumerate(value):
                yield from _substitutions(item, (*path, index))
        case dict():
            for key, item in value.items():
                yield from _substitutions(item, (*path, key))
        case _:
            pass
