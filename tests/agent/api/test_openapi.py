"""The description of the API is whole, true to the code, and the same wherever it is found."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import schemathesis

from remotegpu_agent.api.context import Route
from remotegpu_agent.api.descriptions import CALLS
from remotegpu_agent.api.handlers import ping
from remotegpu_agent.api.openapi import codes_of, document, text
from remotegpu_agent.api.routes import ROUTES
from remotegpu_schemas.errors import CODES, Code
from tests.agent.api.conftest import Api

ROOT = Path(__file__).resolve().parents[3]
COPY = ROOT / "schemas" / "remotegpu_schemas" / "jsonschema" / "openapi.json"

each_route = pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The document."""
    return document(ROUTES)


def operation(whole: dict[str, Any], route: Route) -> dict[str, Any]:
    """What it says of a route."""
    found: dict[str, Any] = whole["paths"][route.path][route.method.lower()]
    return found


def check(whole: dict[str, Any], schema: dict[str, Any], value: object) -> None:
    """Raise jsonschema_rs.ValidationError unless the value fits."""
    jsonschema_rs.validator_for({**schema, "components": whole["components"]}, validate_formats=True).validate(value)


def test_every_route_has_a_description_and_every_description_a_route() -> None:
    """A route without a line in `CALLS`, or the other way round, is a mistake."""
    assert set(CALLS) == {route.name for route in ROUTES}


def test_a_route_without_a_description_is_no_document() -> None:
    """It is not left out in silence."""
    with pytest.raises(KeyError, match="novelty"):
        document((Route(name="novelty", method="GET", path="/novelty", handler=ping),))


@each_route
def test_a_description_says_something_of_all_parts(whole: dict[str, Any], route: Route) -> None:
    """The call, each parameter and each answer has a sentence."""
    told = operation(whole, route)
    for part in (told["summary"], told["description"], *(each["description"] for each in told["parameters"])):
        assert part.endswith((".", "!")), part
    placed = {each["name"] for each in told["parameters"] if each["in"] == "path"}
    assert placed == set(re.findall(r"\{(\w+)\}", route.path))


def test_the_copy_is_current() -> None:
    """If not: `remotegpu-agent openapi >schemas/remotegpu_schemas/jsonschema/openapi.json`."""
    assert COPY.read_text("utf-8") == text(ROUTES)


def test_it_is_openapi(whole: dict[str, Any]) -> None:
    """The document fits the schema that the OpenAPI Initiative publishes for 3.1."""
    schemathesis.openapi.from_dict(whole).validate()


@each_route
def test_examples_fit_what_they_are_examples_of(whole: dict[str, Any], route: Route) -> None:
    """Of parameters, bodies and answers."""
    told = operation(whole, route)
    for parameter in told["parameters"]:
        if "example" in parameter:
            check(whole, parameter["schema"], parameter["example"])
    contents = [told.get("requestBody", {}).get("content", {}), told["responses"]["200"]["content"]]
    for content in contents:
        for about in content.values():
            check(whole, about["schema"], about["example"])


def _failures(whole: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    for answer in whole["components"]["responses"].values():
        for content in answer["content"].values():
            for example in content["examples"].values():
                name = example["$ref"].rpartition("/")[2]
                yield content["schema"], whole["components"]["examples"][name]["value"]


def test_examples_of_errors_fit(whole: dict[str, Any]) -> None:
    """Each error that is told has an envelope as the agent sends it."""
    found = list(_failures(whole))
    assert len(found) > 15
    for schema, example in found:
        check(whole, schema, example)


@each_route
def test_codes_stand_under_their_status(whole: dict[str, Any], route: Route) -> None:
    """Each code that a route can give is in the answer with the status of the table, and in no other."""
    answers = operation(whole, route)["responses"]
    told = {
        (int(status), code)
        for status, answer in answers.items()
        if status != "200"
        for code in _enum(whole, answer["$ref"])
    }
    assert told == {(CODES[code].http_status, code.value) for code in codes_of(route, CALLS[route.name])}


def _enum(whole: dict[str, Any], ref: str) -> list[int]:
    answer = whole["components"]["responses"][ref.rpartition("/")[2]]
    codes: list[int] = answer["content"]["application/json"]["schema"]["allOf"][1]["properties"]["code"]["enum"]
    return codes


def test_every_refusal_in_the_code_is_told() -> None:
    """A code that the agent refuses with, and that no route tells of, is a mistake."""
    sources = [
        path.read_text("utf-8")
        for package in ("agent/remotegpu_agent", "queue/remotegpu_queue")
        for path in (ROOT / package).rglob("*.py")
        if "cli" not in path.parts
    ]
    refused = {Code[name] for source in sources for name in re.findall(r"Refused\(\s*Code\.([A-Z_]+)", source)}
    assert len(refused) > 15
    told = {code for route in ROUTES for code in codes_of(route, CALLS[route.name])}
    assert refused - told == set()


def test_what_is_special_is_told(whole: dict[str, Any]) -> None:
    """System figures are not wrapped, metrics are text, logs also a stream, a task file also YAML; ping is public."""
    answers = {route.name: operation(whole, route)["responses"]["200"]["content"] for route in ROUTES}
    assert answers["system_info"]["application/json"]["schema"] == {"$ref": "#/components/schemas/SystemInfo"}
    assert set(answers["metrics"]) == {"text/plain"}
    assert set(answers["task_logs"]) == {"application/json", "text/event-stream"}
    told = {route.name: operation(whole, route) for route in ROUTES}
    assert set(told["task_submit"]["requestBody"]["content"]) == {"application/json", "application/yaml"}
    assert told["ping"]["security"] == []
    assert {scheme["type"] for scheme in whole["components"]["securitySchemes"].values()} == {"apiKey", "http"}


@pytest.mark.parametrize(
    ("task", "fits"),
    [
        ({"command": "true"}, True),
        ({"script": "true", "interpreter": "sh", "command": None}, True),
        ({"command": "true", "timeout": "24h", "warn": {"before": "5m", "signal": "USR1"}, "name": 7}, True),
        ({"command": "true", "labels": {"a": True}, "env": {"A": 1.5}, "resources": {"gpus": None}}, True),
        ({}, False),
        ({"command": None}, False),
        ({"command": " "}, False),
        ({"command": "true", "script": "true"}, False),
        ({"command": "true", "interpreter": "sh"}, False),
        ({"command": "true", "type": "container"}, False),
        ({"command": "a\0b"}, False),
        ({"command": "true", "env": {"A=B": "c"}}, False),
        ({"command": "true", "timeout": "90 s"}, False),
        ({"command": "true", "warn": {"before": 0}}, False),
        ({"command": "true", "warn": {"before": "0.0m"}}, False),
        ({"command": "true", "stop_signal": 65}, False),
        ({"command": "true", "retry": {"on": []}}, False),
        ({"command": "true", "bogus": 1}, False),
    ],
)
async def test_task_files_fit_where_the_agent_takes_them(
    api: Api, whole: dict[str, Any], task: dict[str, Any], fits: bool
) -> None:
    """The schema of a task file and the agent agree."""
    validator = jsonschema_rs.validator_for(
        {"$ref": "#/components/schemas/DocumentForm", "components": whole["components"]}
    )
    assert validator.is_valid({"task": task}) is fits
    status, _ = await api.call("POST", "/api/v1/tasks", data=json.dumps({"task": task}))
    assert (status == 200) is fits


async def test_it_is_served_to_who_has_a_token(api: Api) -> None:
    """GET /openapi.json is the document itself, without an envelope."""
    assert await api.call("GET", "/api/v1/openapi.json") == (200, document(ROUTES))
    status, _ = await api.call("GET", "/api/v1/openapi.json", headers={})
    assert status == 401
