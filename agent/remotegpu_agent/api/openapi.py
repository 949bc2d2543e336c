"""The OpenAPI 3.1 document of the API, from the routes, their descriptions, the models and the table of codes. Pure.

A copy is kept in the schemas, for whoever makes a client without an agent at hand; to write it anew:

    remotegpu-agent openapi >schemas/remotegpu_schemas/jsonschema/openapi.json
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from remotegpu_agent import VERSION
from remotegpu_agent.api.context import Route
from remotegpu_agent.api.descriptions import (
    CALLS,
    EVENTS,
    EVERY_CALL,
    JSON,
    PATH_PARAMETERS,
    STREAMED,
    TAGS,
    Bare,
    Body,
    Call,
    Parameter,
    Plain,
    Wrapped,
)
from remotegpu_agent.api.examples import TIMESTAMP, plain
from remotegpu_agent.api.settings import BASE_PATH
from remotegpu_schemas.api import Envelope
from remotegpu_schemas.errors import CODES, Code

Json: TypeAlias = dict[str, Any]

_ABOUT: Final = """\
What the agent on a GPU host can be asked: by control planes, by operators, and by its own command line.

Every answer is an envelope, on success (`code` 0) and on error alike, except where a call says otherwise. A code has
one HTTP status; the codes are listed with the schema `Code`. A path that is none is answered with ROUTE_NOT_FOUND, a
method that a path does not take with METHOD_NOT_ALLOWED and the header `Allow`. Keys and query parameters that the
agent does not know are ignored, except in task files, where they are refused.

On the Unix socket nobody needs a token: root, the agent's user and the group `remotegpu` may call. A token with the
role `read` may make the calls with GET.
"""

_SCHEMA: Final = "#/components/schemas/"
_PLACE: Final = re.compile(r"\{(\w+)\}")


class _Generator(GenerateJsonSchema):
    """Without titles that only repeat the name of a field."""

    def field_title_should_be_set(self, schema: object) -> bool:  # noqa: ARG002 - the generator's own method
        """Never."""
        return False


_Models: TypeAlias = dict[tuple[type[BaseModel], Literal["validation", "serialization"]], Json]


@functools.cache
def text(routes: tuple[Route, ...]) -> str:
    """The document as JSON, for people to read: indented, and with a line end."""
    return json.dumps(document(routes), indent=2, ensure_ascii=False) + "\n"


def document(routes: Sequence[Route]) -> Json:
    """The whole document. Raises KeyError for a route that has no description."""
    calls = {route.name: CALLS[route.name] for route in routes}
    models, schemas = _models(calls.values())
    refusals = [codes for route in routes for codes in _by_status(codes_of(route, calls[route.name])).values()]
    every = sorted({code for codes in refusals for code in codes})
    paths: dict[str, Json] = {}
    for route in routes:
        item = paths.setdefault(route.path, {})
        if route.root_path is not None:
            item["servers"] = [{"url": BASE_PATH}, {"url": "/"}]
        item[route.method.lower()] = _operation(route, calls[route.name], models, {each.name: each for each in routes})
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "remotegpu-agent",
            "summary": "The HTTP API of the agent on a GPU host",
            "description": _ABOUT,
            "version": VERSION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": BASE_PATH, "description": "This agent, by default on 127.0.0.1:8090"}],
        "security": [{"token": []}, {"bearer": []}],
        "tags": [{"name": name, "description": about} for name, about in TAGS.items()],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "token": {"type": "apiKey", "in": "header", "name": "X-Agent-Token", "description": "A token."},
                "bearer": {"type": "http", "scheme": "bearer", "description": "The same, as RFC 6750 sends it."},
            },
            "schemas": {**schemas, "Code": _code_schema(), "Failure": _FAILURE},
            "responses": {_named(codes): _refusal(codes) for codes in refusals},
            "headers": _HEADERS,
            "examples": {code.name: {"summary": CODES[code].meaning, "value": _failure(code)} for code in every},
        },
    }


def codes_of(route: Route, call: Call) -> list[Code]:
    """All that a call may be refused with, in the order of the table."""
    found = {*EVERY_CALL, *call.refuses} - ({Code.UNAUTHORIZED} if route.is_public else set())
    return [code for code in Code if code in found]


# --- one call ------------------------------------------------------------------------------------------------------


def _operation(route: Route, call: Call, models: _Models, routes: dict[str, Route]) -> Json:
    operation: Json = {
        "operationId": route.name,
        "tags": [call.tag],
        "summary": call.summary,
        "description": call.text,
        "parameters": [*_path_parameters(route), *_query_parameters(call, models), *_header_parameters(call)],
    }
    if call.body is not None:
        operation["requestBody"] = _request_body(call.body, models)
    if route.is_public:
        operation["security"] = []
    good = _good_answer(call, models)
    if call.links:
        good["links"] = {name: _link(routes[name], place) for name, place in call.links.items()}
    refusals = _by_status(codes_of(route, call)).items()
    operation["responses"] = {
        "200": good,
        **{str(status): {"$ref": f"#/components/responses/{_named(codes)}"} for status, codes in refusals},
    }
    return operation


def _path_parameters(route: Route) -> Iterator[Json]:
    for name in _PLACE.findall(route.path):
        yield _parameter(name, "path", PATH_PARAMETERS[name])


def _header_parameters(call: Call) -> Iterator[Json]:
    for name, parameter in call.headers.items():
        yield _parameter(name, "header", parameter)


def _parameter(name: str, place: str, parameter: Parameter) -> Json:
    return {
        "name": name,
        "in": place,
        "required": place == "path",
        "description": parameter.text,
        "schema": parameter.schema,
        "example": parameter.example,
    }


def _query_parameters(call: Call, models: _Models) -> Iterator[Json]:
    if call.query is None:
        return
    for name, schema in models[call.query, "validation"]["properties"].items():
        about = {key: value for key, value in schema.items() if key not in {"description", "examples"}}
        if {"type": "null"} in about.get("anyOf", []):  # what is left out of a query string is never null in it
            about = next(each for each in about["anyOf"] if each != {"type": "null"})
        parameter = {"name": name, "in": "query", "description": schema["description"], "schema": about}
        if "examples" in schema:
            parameter["example"] = schema["examples"][0]
        yield parameter


def _request_body(body: Body, models: _Models) -> Json:
    schema = models[body.model, "validation"]
    if not body.is_required:
        schema = {"anyOf": [schema, {"type": "null"}]}
    content = {name: {"schema": schema, "example": body.example} for name in body.types}
    return {"required": body.is_required, "content": content}


def _link(target: Route, place: str) -> Json:
    (parameter,) = _PLACE.findall(target.path)
    return {"operationId": target.name, "parameters": {parameter: f"$response.body#{place}"}}


# --- answers -------------------------------------------------------------------------------------------------------


def _good_answer(call: Call, models: _Models) -> Json:
    content: Json = {}
    match call.answer:
        case Wrapped(example, events):
            model = models[type(example), "serialization"]
            content[JSON] = {"schema": _wrapped(model), "example": _success(plain(example))}
            if events is not None:
                content[EVENTS] = {"schema": _event(models[STREAMED, "serialization"]), "example": events}
        case Bare(example):
            content[JSON] = {"schema": models[type(example), "serialization"], "example": plain(example)}
        case Plain(media_type, schema, shown):
            content[media_type] = {"schema": schema, "example": shown}
    return {"description": call.summary, "headers": _headers("Cache-Control", _NOSNIFF), "content": content}


def _by_status(codes: Iterable[Code]) -> dict[int, tuple[Code, ...]]:
    found: dict[int, tuple[Code, ...]] = {}
    for code in sorted(codes, key=lambda code: (CODES[code].http_status, code)):
        status = CODES[code].http_status
        found[status] = (*found.get(status, ()), code)
    return found


def _named(codes: tuple[Code, ...]) -> str:
    return "-".join(code.name for code in codes)


def _refusal(codes: tuple[Code, ...]) -> Json:
    """The answer with one status, which may have any of these codes."""
    content = {
        "schema": {"allOf": [_ref("Failure"), {"properties": {"code": {"enum": [code.value for code in codes]}}}]},
        "examples": {code.name: {"$ref": f"#/components/examples/{code.name}"} for code in codes},
    }
    return {
        "description": "; ".join(f"{code.name} ({code.value}): {CODES[code].meaning}" for code in codes),
        "headers": _headers("Cache-Control", _NOSNIFF, *_HEADERS_BY_STATUS.get(CODES[codes[0]].http_status, ())),
        "content": {JSON: content},
    }


def _wrapped(model: Json) -> Json:
    properties = {"success": {"const": True}, "code": {"const": Code.OK.value}, "data": model}
    return {"allOf": [_ref("Envelope"), {"properties": properties}]}


def _event(data: Json) -> Json:
    """One event of a stream; a media type has no other place for that before OpenAPI 3.2 (`itemSchema`)."""
    properties = {
        "id": {"type": "string"},
        "event": {"type": "string"},
        "data": {"type": "string", "contentMediaType": JSON, "contentSchema": data},
    }
    return {"description": "One event of the stream.", "type": "object", "properties": properties, "required": ["data"]}


def _success(data: Json) -> Json:
    return {"success": True, "code": Code.OK.value, "message": "ok", "data": data, "timestamp": TIMESTAMP}


def _failure(code: Code) -> Json:
    meaning = CODES[code].meaning
    return {"success": False, "code": code.value, "message": meaning, "data": None, "timestamp": TIMESTAMP}


_NOSNIFF: Final = "X-Content-Type-Options"
_HEADERS_BY_STATUS: Final = {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After",)}
_HEADERS: Final[dict[str, Json]] = {
    "Cache-Control": {"required": True, "description": "Nothing is kept.", "schema": {"const": "no-store"}},
    _NOSNIFF: {"required": True, "description": "Nothing is guessed.", "schema": {"const": "nosniff"}},
    "WWW-Authenticate": {"required": True, "description": "What is missing.", "schema": {"type": "string"}},
    "Retry-After": {"required": False, "description": "Seconds; come again then.", "schema": {"type": "integer"}},
}


def _headers(*names: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


# --- schemas -------------------------------------------------------------------------------------------------------


def _models(calls: Iterable[Call]) -> tuple[_Models, Json]:
    """By model what stands for it, a reference or (of queries) itself; and the schemas that are referred to."""
    wanted: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
        (Envelope, "serialization"),
        (STREAMED, "serialization"),
    ]
    queries: list[type[BaseModel]] = []
    for call in calls:
        if call.query is not None:
            queries.append(call.query)
        if call.body is not None:
            wanted.append((call.body.model, "validation"))
        if not isinstance(call.answer, Plain):
            wanted.append((type(call.answer.example), "serialization"))
    wanted.extend((query, "validation") for query in queries)
    every = list(dict.fromkeys(wanted))
    found, rest = models_json_schema(every, ref_template=_SCHEMA + "{model}", schema_generator=_Generator)
    models: _Models = {key: dict(found[key]) for key in every}
    schemas: Json = dict(sorted(rest["$defs"].items()))
    for query in dict.fromkeys(queries):
        name = models[query, "validation"]["$ref"].removeprefix(_SCHEMA)
        models[query, "validation"] = schemas.pop(name)
    return models, _referred_to(schemas, models.values())


def _referred_to(schemas: Json, models: Iterable[Json]) -> Json:
    """Without what the generator made and then replaced."""
    told = json.dumps([schemas, *models])
    return {name: schema for name, schema in schemas.items() if f'"{_SCHEMA}{name}"' in told}


def _ref(name: str) -> Json:
    return {"$ref": _SCHEMA + name}


_FAILURE: Final[Json] = {
    "description": "The envelope of what was refused, or went wrong. `message` is for people and says what to do.",
    "allOf": [
        _ref("Envelope"),
        {"properties": {"success": {"const": False}, "code": _ref("Code"), "data": {"type": "null"}}},
    ],
}


def _code_schema() -> Json:
    return {
        "description": "Business codes; 0 is success.",
        "oneOf": [
            {"const": code.value, "title": code.name, "description": f"HTTP {info.http_status}: {info.meaning}"}
            for code, info in CODES.items()
        ],
    }
