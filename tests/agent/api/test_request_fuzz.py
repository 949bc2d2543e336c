"""Whatever is asked of the API, in query, path and body, is understood or `Refused`: never a crash."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Callable
from typing import Any, Final

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from remotegpu_agent.api.administration import PageQuery
from remotegpu_agent.api.parsing import ListQuery, LogQuery, ShowQuery, invalid, parse_query, task_id_of
from remotegpu_agent.api.submission import parse_submission
from remotegpu_schemas import limits
from remotegpu_schemas.api import DrainRequest, Message, ProcessStopRequest
from remotegpu_schemas.errors import Code, Refused
from remotegpu_schemas.task import Task
from tests.scale import scaled
from tests.schemas.garbage import EDGES, cut_bytes, encoded, fuzz, near, odd_values, with_cut

pytestmark = pytest.mark.timeout(scaled(120, 1800))

QUERIES: Final[dict[type[Message], dict[str, Any]]] = {
    ListQuery: {"state": ["running", "failed,completed"], "label": ["team=vision"], "limit": 10, "offset": 0},
    ShowQuery: {"wait": 1.5},
    LogQuery: {"stream": "stderr", "offset": -100, "limit": 1000, "run": 1, "follow": True},
    PageQuery: {"limit": 10, "offset": 20},
}
BODIES: Final[dict[type[Message], dict[str, Any]]] = {
    ProcessStopRequest: {"process_id": 4711, "signal": "SIGKILL", "host_id": "h"},
    DrainRequest: {"reason": "new driver"},
}
TASK_FILE: Final = {
    "task": {"id": "t", "command": "python", "args": ["a.py"], "env": {"A": "b"}, "targets": {"ips": ["10.0.0.1"]}}
}
edge_texts: Final = st.sampled_from([str(edge) for edge in EDGES]) | st.text(max_size=20)


def refused(ask: Callable[[], object]) -> bool:
    """Whether it was refused, in a way that can be sent; anything else that is raised is a crash."""
    try:
        ask()
    except Refused as refusal:
        found = refusal
    else:
        return False
    assert found.code is Code.INVALID_PARAMETERS
    assert str(found)
    return True


def url_of(query: Any, raw: bytes) -> str:
    """A query string as a client would make it, and then some bytes of anything."""
    pairs = query if isinstance(query, dict) else {"": query}
    told = urllib.parse.urlencode(pairs, doseq=True, errors="replace")
    return f"/x?{told}{urllib.parse.quote(raw, safe='&=%+;')}"


@fuzz(6_000)
@given(
    kind_and_query=st.sampled_from(list(QUERIES)).flatmap(lambda kind: st.tuples(st.just(kind), near(QUERIES[kind]))),
    raw=st.binary(max_size=8),
)
def test_queries_with_slips(kind_and_query: tuple[type[Message], Any], raw: bytes) -> None:
    """A query string is read within its bounds, or refused."""
    kind, query = kind_and_query
    request = make_mocked_request("GET", url_of(query, raw))
    refused(lambda: parse_query(kind, request))


@fuzz(4_000)
@given(
    kind_and_body=st.sampled_from(list(BODIES)).flatmap(
        lambda kind: st.tuples(st.just(kind), near(BODIES[kind]) | odd_values)
    ),
    encode=encoded,
    cut=cut_bytes,
)
def test_bodies_with_slips(kind_and_body: tuple[type[Message], Any], encode: Any, cut: tuple[int, bytes]) -> None:
    """A body is read, or refused with its fields; what was read can be said in JSON again."""
    kind, body = kind_and_body

    def read() -> None:
        try:
            found = kind.model_validate_json(with_cut(encode(body), cut))
        except ValidationError as error:
            raise invalid(error, "body") from error
        json.dumps(found.model_dump(mode="json")).encode()

    refused(read)


@fuzz(4_000)
@given(task_id=edge_texts)
def test_any_task_id(task_id: str) -> None:
    """What is no id never gets to the store."""
    request = make_mocked_request("GET", "/x", match_info={"task_id": task_id})
    if not refused(lambda: task_id_of(request)):
        assert len(task_id) <= limits.ID_MAX_CHARS
        assert "/" not in task_id
        assert task_id.isascii()


@fuzz(6_000)
@given(document=near(TASK_FILE), encode=encoded, cut=cut_bytes)
def test_submissions_with_slips(document: Any, encode: Any, cut: tuple[int, bytes]) -> None:
    """A task file is tasks that can be stored, or refused as a whole."""

    def submit() -> None:
        tasks = parse_submission(with_cut(encode(document), cut), machine_id="m", own_addresses=lambda: ["10.0.0.1"])
        assert tasks
        for task in tasks:
            assert Task.model_validate_json(task.model_dump_json()) == task

    refused(submit)


@pytest.mark.parametrize("kind", [*QUERIES], ids=lambda kind: kind.__name__)
def test_the_queries_without_slips_are_taken(kind: type[Message]) -> None:
    """Else the slips would prove little."""
    assert not refused(lambda: parse_query(kind, make_mocked_request("GET", url_of(QUERIES[kind], b""))))
