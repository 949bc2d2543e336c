"""What each call takes, gives and refuses, by the name of its route: the source of the OpenAPI document.

What every call may refuse stands in `EVERY_CALL`. A test fails when a route has no description here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from remotegpu_agent.api import examples
from remotegpu_agent.api.administration import PageQuery
from remotegpu_agent.api.parsing import OFFSET_MAX, ListQuery, LogQuery, ShowQuery, SubmitQuery
from remotegpu_schemas import limits
from remotegpu_schemas.api import DrainRequest, LogChunk, Message, ProcessStopRequest
from remotegpu_schemas.errors import Code
from remotegpu_schemas.taskfile import DocumentForm

JSON: Final = "application/json"
YAML: Final = "application/yaml"
TEXT: Final = "text/plain"
EVENTS: Final = "text/event-stream"

EVERY_CALL: Final = (
    Code.INVALID_PARAMETERS,
    Code.UNAUTHORIZED,
    Code.FORBIDDEN,
    Code.PAYLOAD_TOO_LARGE,
    Code.RATE_LIMITED,
    Code.REQUEST_TIMEOUT,
    Code.HEADERS_TOO_LARGE,
    Code.UNAVAILABLE,
    Code.INTERNAL,
)
"""Refused in front of the handlers, or by any of them: a body that is badly or too slowly sent, no token, or a wrong
one once too often, a Host that is not ours, a store that is locked, a mistake in the program."""


@dataclass(frozen=True, kw_only=True)
class Body:
    """What a call reads. `types` are the media types in which it may be sent."""

    model: type[Message | DocumentForm]
    example: dict[str, Any]
    types: tuple[str, ...] = (JSON,)
    is_required: bool = True


@dataclass(frozen=True)
class Wrapped:
    """An answer inside of the envelope; `events`: or, on demand, a stream of events with the same data."""

    example: Message
    events: dict[str, str] | None = None


@dataclass(frozen=True)
class Bare:
    """An answer without the envelope."""

    example: Message


@dataclass(frozen=True)
class Plain:
    """An answer that is no message of ours: text, or a document."""

    media_type: str
    schema: dict[str, Any]
    example: Any


Answer: TypeAlias = Wrapped | Bare | Plain


@dataclass(frozen=True)
class Parameter:
    """A part of the path, or a header."""

    text: str
    schema: dict[str, Any]
    example: str | int


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call. `links` leads from its answer on: by name of the other call the place of that one's path parameter."""

    tag: str
    summary: str
    text: str
    answer: Answer
    query: type[Message] | None = None
    headers: dict[str, Parameter] = field(default_factory=dict)
    body: Body | None = None
    refuses: tuple[Code, ...] = ()
    links: dict[str, str] = field(default_factory=dict)


PATH_PARAMETERS: Final = {
    "task_id": Parameter(
        "The task's id, or the beginning of one that fits no other task.",
        {"type": "string", "pattern": f"^{limits.ID_PATTERN}$"},
        examples.TASK_ID,
    ),
    "letter_id": Parameter(
        "The number of the dead letter.",
        {"type": "integer", "minimum": 0, "maximum": OFFSET_MAX},
        examples.DEAD_LETTER.id,
    ),
}

_ON_A_TASK: Final = ("task_show", "task_logs", "task_cancel", "task_suspend", "task_resume")
_ON_A_LETTER: Final = ("dead_letter_show", "dead_letter_resend", "dead_letter_drop")
_FIND_TASK: Final = (Code.TASK_NOT_FOUND, Code.ROUTE_NOT_FOUND)
_FIND_LETTER: Final = (Code.DEAD_LETTER_NOT_FOUND, Code.ROUTE_NOT_FOUND)

CALLS: Final[dict[str, Call]] = {
    "ping": Call(
        tag="agent",
        summary="Whether the agent answers, and which version it is.",
        text="Needs no token. Touches neither disk nor hardware.",
        answer=Wrapped(examples.PING),
    ),
    "system_info": Call(
        tag="agent",
        summary="Hardware and system figures of the host.",
        text="Not wrapped in an envelope: deployed control planes read it from the top level. CPU, memory and disk "
        "figures are never zero; what could not be had is named in `warnings`. Callers in `api.legacy_callers` may "
        "make this call without a token.",
        answer=Bare(examples.SYSTEM_INFO),
    ),
    "process_stop": Call(
        tag="agent",
        summary="Stop the run that a process belongs to, its whole tree.",
        text="Answers when the tree is gone, or after 8 s with `state: stopping`. Never signals a process that this "
        "agent did not start, nor one whose number was given to another. Safe to repeat. Callers in "
        "`api.legacy_callers` may make this call without a token.",
        body=Body(model=ProcessStopRequest, example={"process_id": 4711, "signal": "SIGTERM"}),
        answer=Wrapped(examples.STOPPED),
        refuses=(Code.PROCESS_NOT_MANAGED, Code.PROCESS_GONE),
    ),
    "queue_status": Call(
        tag="agent",
        summary="Counts per state, capacity, what keeps the agent from claiming, and the control plane.",
        text="`blocks` has a word for machines and a sentence for people.",
        answer=Wrapped(examples.QUEUE_STATUS),
    ),
    "metrics": Call(
        tag="agent",
        summary="All figures in the text format of Prometheus.",
        text="Not wrapped. Also at `/metrics`, outside of the base path.",
        answer=Plain(TEXT, {"type": "string"}, examples.METRICS),
    ),
    "openapi": Call(
        tag="agent",
        summary="This document.",
        text="Not wrapped. `remotegpu-agent openapi` prints it without a running agent.",
        answer=Plain(
            JSON,
            {"type": "object", "required": ["openapi", "info", "paths"]},
            {"openapi": "3.1.0", "info": {"title": "remotegpu-agent", "version": "0.1.0"}, "paths": {}},
        ),
    ),
    "task_submit": Call(
        tag="tasks",
        summary="Submit the tasks of a task file, all or none.",
        text="The body is a task file, as YAML (with several documents: several tasks) or JSON (one document), "
        "whatever its Content-Type says. What is answered is on disk. Not idempotent, unless the task has an `id`: "
        "then a repeat is refused as ALREADY_EXISTS. A task that names other machines is refused. Beyond what the "
        "schema says: two forms of one thing (`retry.max` and `max_retries`) must not differ, and `warn.before` is "
        "shorter than `timeout`.",
        query=SubmitQuery,
        body=Body(model=DocumentForm, example=examples.TASK_FILE, types=(JSON, YAML)),
        answer=Wrapped(examples.SUBMITTED),
        refuses=(
            Code.POLICY_REFUSED,
            Code.DRAINING,
            Code.QUEUE_FULL,
            Code.HOST_FULL,
            Code.ALREADY_EXISTS,
            Code.NOT_SUPPORTED,
        ),
        links=dict.fromkeys(_ON_A_TASK, "/data/task_ids/0"),
    ),
    "task_list": Call(
        tag="tasks",
        summary="One page of the tasks, newest first.",
        text="`total` counts all that match.",
        query=ListQuery,
        answer=Wrapped(examples.TASK_PAGE),
        links=dict.fromkeys(_ON_A_TASK, "/data/tasks/0/id"),
    ),
    "task_show": Call(
        tag="tasks",
        summary="One task with its runs; on demand once it has ended.",
        text="Values of the task's environment are left out.",
        query=ShowQuery,
        answer=Wrapped(examples.TASK_DETAIL),
        refuses=_FIND_TASK,
    ),
    "task_cancel": Call(
        tag="tasks",
        summary="Ask for the end of a task.",
        text="A running one is stopped with its grace period after the answer.",
        answer=Wrapped(examples.TASK),
        refuses=(*_FIND_TASK, Code.TASK_FINISHED),
        links={"task_show": "/data/id"},
    ),
    "task_suspend": Call(
        tag="tasks",
        summary="Let a running task stand still, with all that it holds.",
        text="Its timeout stands still too, its lease is renewed meanwhile.",
        answer=Wrapped(examples.TASK_SUSPENDED),
        refuses=(*_FIND_TASK, Code.STATE_CONFLICT),
        links={"task_resume": "/data/id"},
    ),
    "task_resume": Call(
        tag="tasks",
        summary="Let a suspended task go on.",
        text="Only a task that `suspend` has stopped.",
        answer=Wrapped(examples.TASK),
        refuses=(*_FIND_TASK, Code.STATE_CONFLICT),
    ),
    "task_logs": Call(
        tag="tasks",
        summary="A piece of a task's output, or all of it as it is written.",
        text="With `follow` the answer is a stream of Server-Sent Events: the `data` of each is a `LogChunk`, its `id` "
        "the next offset; a comment comes while nothing is written; the last chunk has `is_end`. A stream that "
        "breaks ends with an event named `error`, its data the envelope of the error.",
        query=LogQuery,
        headers={
            "Last-Event-ID": Parameter(
                "Where a stream that broke goes on: the `id` of the last event. Sent by browsers; what is no offset "
                "is ignored.",
                {"type": "string"},
                "14",
            )
        },
        answer=Wrapped(examples.LOG_CHUNK, events=examples.LOG_EVENT),
        refuses=_FIND_TASK,
    ),
    "drain_state": Call(
        tag="host",
        summary="How far the host is emptied; on demand once it is.",
        text="`is_drained`: nothing runs and nothing claimed waits any more.",
        query=ShowQuery,
        answer=Wrapped(examples.DRAINING),
    ),
    "drain": Call(
        tag="host",
        summary="Claim and start nothing more; what runs goes on.",
        text="Kept over restarts. Safe to repeat: the first order stays. The body may be empty.",
        body=Body(model=DrainRequest, example={"reason": "new driver"}, is_required=False),
        answer=Wrapped(examples.DRAINING),
    ),
    "undrain": Call(
        tag="host",
        summary="Take back the order of `drain`.",
        text="One of the control plane stays. Safe to repeat.",
        answer=Wrapped(examples.NOT_DRAINING),
    ),
    "dead_letter_list": Call(
        tag="dead letters",
        summary="One page of the reports that the control plane refused for good, oldest first.",
        text="Without their bodies.",
        query=PageQuery,
        answer=Wrapped(examples.DEAD_LETTER_PAGE),
        links=dict.fromkeys(_ON_A_LETTER, "/data/dead_letters/0/id"),
    ),
    "dead_letter_show": Call(
        tag="dead letters",
        summary="One of them, with all that it says.",
        text="`error` is what the control plane answered.",
        answer=Wrapped(examples.DEAD_LETTER),
        refuses=_FIND_LETTER,
    ),
    "dead_letter_resend": Call(
        tag="dead letters",
        summary="Put it up for delivery as if it had never been tried.",
        text="It is no dead letter any more, unless it is refused again.",
        answer=Wrapped(examples.DEAD_LETTER),
        refuses=_FIND_LETTER,
    ),
    "dead_letter_drop": Call(
        tag="dead letters",
        summary="Forget it for good.",
        text="The answer is the last that is seen of it.",
        answer=Wrapped(examples.DEAD_LETTER),
        refuses=_FIND_LETTER,
    ),
}

STREAMED: Final = LogChunk
"""What the events hold."""

TAGS: Final = {
    "agent": "The agent and its host.",
    "tasks": "Local tasks, and those of the control plane.",
    "host": "Emptying the host.",
    "dead letters": "Reports that were refused for good.",
}
