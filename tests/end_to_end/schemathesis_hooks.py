"""What schemathesis must know of the agent beyond its description; its own process loads this (`hooks`).

Calls that wait by design end soon, and what no JSON Schema can foresee may be refused: nothing else.
"""

from __future__ import annotations

import os
from http import HTTPStatus
from typing import Any, Final

import requests
import schemathesis
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.openapi.checks import IgnoredAuth, RejectedPositiveData

LONGEST_WAIT_S: Final = 0.05
_TIMEOUT_S: Final = 10.0
LISTS: Final = ("state", "label")
"""The query parameters that may be repeated."""
_EXACT_MAX: Final = 2**53

UNFORESEEABLE: Final = (
    "nothing was submitted. Submit it there",  # for another machine
    "one thing, two values; keep one",  # retry.max and max_retries
    "is not shorter than 'timeout'",  # warn.before
    "fits several tasks",  # the beginning of an id
    "has no run",
)
"""In the message of INVALID_PARAMETERS: what a request that fits its schema may still be refused for."""


def _with_whole_numbers(value: Any) -> Any:
    """To JSON Schema 7.0 is an integer; the agent takes none for one, so that nobody's 7.9 counts as 7."""
    match value:
        case float() if value.is_integer() and abs(value) < _EXACT_MAX:
            return int(value)
        case dict():
            return {name: _with_whole_numbers(item) for name, item in value.items()}
        case list():
            return [_with_whole_numbers(item) for item in value]
        case _:
            return value


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Whole numbers are written as such, and nobody waits for the end of a task that never begins."""
    body = _with_whole_numbers(case.body)
    if repr(body) != repr(case.body):  # a case whose body is set, even to the same, counts as another case
        case.body = body
    query = case.query
    if isinstance(wait := query.get("wait"), int | float) and wait > LONGEST_WAIT_S:
        query["wait"] = LONGEST_WAIT_S
    if query.get("follow") and case.operation.path.endswith("/logs"):
        # The stream of a task that ends comes to its end as well.
        _post(case.operation, case.formatted_path.removesuffix("/logs") + "/cancel")
    if case.operation.path.endswith("/resume") and case.method == "POST":
        # What runs can be suspended, and then there is something to resume.
        _post(case.operation, case.formatted_path.removesuffix("/resume") + "/suspend")


@schemathesis.hook
def after_call(
    context: schemathesis.HookContext, case: schemathesis.Case[Any], response: schemathesis.Response
) -> None:
    """A drain ends when it has been answered: else all that is submitted from then on would be refused."""
    if case.operation.path == "/drain" and case.method == "POST" and response.status_code == HTTPStatus.OK:
        _post(case.operation, "/undrain")


def _post(operation: Any, path: str) -> None:
    token = os.environ["REMOTEGPU_TEST_TOKEN"]
    requests.post(operation.base_url + path, headers={"X-Agent-Token": token}, timeout=_TIMEOUT_S)


def _single_values(query: dict[str, Any]) -> list[Any]:
    return [value for name, value in query.items() if name not in LISTS]


@schemathesis.hook
def filter_failure(
    context: schemathesis.HookContext, failure: Exception, case: schemathesis.Case[Any], response: Any
) -> bool:
    """Keep every failure but refusals that no schema foresees, 429 for a wrong token, a list of one for one value."""
    if isinstance(failure, AcceptedNegativeData):
        # On the wire `wait=[1]` is `wait=1`; where another part is bad as well, schemathesis forgets that.
        return not any(isinstance(value, list) and len(value) == 1 for value in _single_values(case.query))
    if not isinstance(failure, RejectedPositiveData | IgnoredAuth):
        return True
    if isinstance(failure, IgnoredAuth):
        # A wrong token once too often is refused with 429. `response` is the one to the right token.
        return "got `429 " not in failure.message
    message = str(response.json().get("message"))
    return not any(sentence in message for sentence in UNFORESEEABLE)
