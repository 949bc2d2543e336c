"""The table "Codes, and what the agent does" of protocol.md, row by row; and the data of accepted answers."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remotegpu_schemas import limits
from remotegpu_schemas.errors import CODES, Code, Permanent
from remotegpu_schemas.wire import (
    UploadTarget,
    Verdict,
    parse_answer,
    parse_features,
    parse_heartbeat,
    parse_renewal,
    parse_upload_target,
)
from tests.schemas.support import answer, json_values, property_test

# --- codes ---------------------------------------------------------------------------------------------------------

BUSINESS = [
    (Code.ATTEMPT_MISMATCH, Verdict.SUPERSEDED),
    (Code.TASK_FINISHED, Verdict.FINISHED),
    (Code.LEASE_EXPIRED, Verdict.LEASE_EXPIRED),
    (Code.TASK_NOT_FOUND, Verdict.SUPERSEDED),
    (Code.INVALID_PARAMETERS, Verdict.INVALID),
    (Code.INTERNAL, Verdict.RETRY),
]


@pytest.mark.parametrize(("code", "verdict"), BUSINESS)
def test_business_code_decides_whatever_the_status(code: Code, verdict: Verdict) -> None:
    """A code of the table means the same with its own HTTP status, with 200 and with 500."""
    for status in (CODES[code].http_status, 200, 500):
        assert answer(status, {"code": code, "message": "no"}).verdict is verdict


def test_code_written_as_text_is_a_code() -> None:
    """Some planes write numbers as text."""
    assert answer(200, {"code": "30001"}).verdict is Verdict.SUPERSEDED
    assert answer(200, {"code": "0", "data": {"a": 1}}).data == {"a": 1}


@pytest.mark.parametrize("status", [408, 425, 429, 500, 501, 502, 503, 504, 599])
@pytest.mark.parametrize("body", [b"", b"<html>Bad Gateway</html>", b'{"code": 1}', b'{"detail": "x"}'])
def test_trouble_of_the_plane_is_retried(status: int, body: bytes) -> None:
    """408, 425, 429 and 5xx are retried, with and without an envelope."""
    assert answer(status, body).verdict is Verdict.RETRY


@pytest.mark.parametrize("status", [200, 201, 204, 301, 302, 400, 413, 418, 422])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"<html></html>", id="html"),
        pytest.param(b'{"code": 0, "mess', id="truncated"),
        pytest.param(b"\xff\xfe\xfd", id="not-utf8"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"null", id="null"),
        pytest.param(b'{"message": "ok"}', id="no-code"),
        pytest.param(b'{"code": null}', id="code-null"),
        pytest.param(b'{"code": true}', id="code-bool"),
        pytest.param(b'{"code": 0.0}', id="code-float"),
        pytest.param(b'{"code": "zero"}', id="code-word"),
        pytest.param(b'{"code": [0]}', id="code-list"),
        pytest.param(b'{"code": ' + b"9" * 5000 + b"}", id="code-huge"),
        pytest.param(b"[" * 200_000, id="deep"),
        pytest.param(b'{"code": 0, "data": ' + b'{"a":' * 100_000, id="deep-objects"),
    ],
)
def test_unparsable_body_is_retried(status: int, body: bytes) -> None:
    """What is no envelope, with a status that says nothing definite, is retried and named in the message."""
    parsed = answer(status, body)
    assert parsed.verdict is Verdict.RETRY
    assert parsed.message.startswith(f"HTTP {status} without an envelope: ")
    assert len(parsed.message) < 200


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("body", [b"", b"Forbidden", b'{"code": 401, "msg": "bad token"}', b'{"code": 0}'])
def test_bad_token(status: int, body: bytes) -> None:
    """401 and 403 mean a bad token, whatever the body is."""
    assert answer(status, body).verdict is Verdict.UNAUTHORIZED


@pytest.mark.parametrize("code", [404, 409, 410])
def test_bare_refusal_is_ambiguous(code: int) -> None:
    """A bare 404, 409 or 410 as status or as body code is ambiguous: it never kills at once."""
    assert answer(code, {"code": 0, "message": "x"}).verdict is Verdict.AMBIGUOUS
    assert answer(code, {"code": code, "message": "x"}).verdict is Verdict.AMBIGUOUS
    assert answer(code, {"code": 1}).verdict is Verdict.AMBIGUOUS
    assert answer(200, {"code": code, "message": "x"}).verdict is Verdict.AMBIGUOUS
    assert answer(200, {"code": str(code)}).verdict is Verdict.AMBIGUOUS


@pytest.mark.parametrize("status", [409, 410])
def test_bare_refusal_without_an_envelope_is_ambiguous(status: int) -> None:
    """409 and 410 without an envelope do not say that the route is missing."""
    assert answer(status, b"Conflict").verdict is Verdict.AMBIGUOUS


@pytest.mark.parametrize("status", [404, 405])
@pytest.mark.parametrize("body", [b"", b"404 page not found", b'{"detail": "Not Found"}', b'{"error": "no route"}'])
def test_missing_route(status: int, body: bytes) -> None:
    """404 or 405 that is no envelope says that the plane does not have the call."""
    assert answer(status, body).verdict is Verdict.ROUTE_MISSING


@pytest.mark.parametrize("status", [400, 405, 413, 422])
def test_other_refusals_in_an_envelope_are_of_the_request(status: int) -> None:
    """What the plane itself refuses in its own words becomes a dead letter instead of a loop."""
    assert answer(status, {"code": status, "message": "no such field"}).verdict is Verdict.INVALID


@pytest.mark.parametrize("code", [1, -1, 200, 399, 600, 30006, 30050, 10**9])
def test_unknown_code_with_http_200_is_retried(code: int) -> None:
    """A code of no table is neither a success nor a refusal of anything."""
    parsed = answer(200, {"code": code})
    assert (parsed.verdict, parsed.data, parsed.message) == (Verdict.RETRY, {}, f"code {code}")


@pytest.mark.parametrize("status", [301, 302, 307])
def test_redirect_is_no_success(status: int) -> None:
    """Code 0 counts with a 2xx only: a redirect did not reach what was called."""
    assert answer(status, {"code": 0, "data": {"a": 1}}).verdict is Verdict.RETRY


@pytest.mark.parametrize(
    ("headers", "expected_s"),
    [
        pytest.param({"Retry-After": "7"}, 7.0, id="seconds"),
        pytest.param({"Retry-After": " 0 "}, 0.0, id="zero"),
        pytest.param(
            {"Retry-After": "Thu, 05 Feb 2026 12:00:30 GMT", "Date": "Thu, 05 Feb 2026 12:00:00 GMT"}, 30.0, id="date"
        ),
        pytest.param(
            {"Retry-After": "Thu, 05 Feb 2026 11:00:00 GMT", "Date": "Thu, 05 Feb 2026 12:00:00 GMT"}, 0.0, id="past"
        ),
        pytest.param({"Retry-After": "Thu, 05 Feb 2026 12:00:30 GMT"}, None, id="date-without-date-header"),
        pytest.param({"Retry-After": "9" * 400}, limits.RETRY_AFTER_MAX_S, id="bounded"),
        pytest.param({"Retry-After": "soon"}, None, id="word"),
        pytest.param({"Retry-After": "-5"}, None, id="negative"),
        pytest.param({"Retry-After": ""}, None, id="empty"),
        pytest.param({}, None, id="missing"),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after(status: int, headers: dict[str, str], expected_s: float | None) -> None:
    """Retry-After is read as seconds, or as a date against the answer's own Date header; it is bounded."""
    parsed = answer(status, b"slow down", headers)
    assert (parsed.verdict, parsed.retry_after_s) == (Verdict.RETRY, expected_s)


def test_date_of_the_answer_is_kept() -> None:
    """A lease's expiry is later compared with the plane's own clock, never with ours."""
    parsed = answer(200, {"code": 0}, {"Date": "Thu, 05 Feb 2026 12:00:00 GMT"})
    assert parsed.date == datetime(2026, 2, 5, 12, tzinfo=UTC)
    assert answer(200, {"code": 0}, {"Date": "yesterday"}).date is None


def test_message_is_bounded_clean_text() -> None:
    """A message of any size and kind can be logged, stored and sent."""
    long = answer(500, {"code": 500, "message": "x" * 100_000})
    assert len(long.message) == limits.WIRE_MESSAGE_MAX_CHARS
    odd = answer(500, b'{"code": 500, "message": "a\\ud800b\\u0000c"}')
    assert odd.message == "a\ufffdb\ufffdc"
    assert answer(500, {"code": 500, "message": {"a": 1}}).message == "code 500"


@property_test
@given(status=st.integers(100, 599), body=st.binary(max_size=200) | json_values.map(lambda v: json.dumps(v).encode()))
def test_any_body_gives_one_verdict(status: int, body: bytes) -> None:
    """No answer raises, and only OK has data."""
    parsed = parse_answer(status, {}, body)
    assert parsed.verdict in Verdict
    assert parsed.verdict is Verdict.OK or parsed.data == {}
    parsed.message.encode()


@property_test
@given(fields=st.fixed_dictionaries({"code": json_values}, optional={"message": json_values, "data": json_values}))
def test_any_envelope_gives_one_verdict(fields: dict[str, Any]) -> None:
    """Success is code 0 and nothing else."""
    parsed = answer(200, fields)
    assert (parsed.verdict is Verdict.OK) == (fields["code"] in {0, "0"} if _is_code(fields["code"]) else False)


def _is_code(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


# --- data of accepted answers --------------------------------------------------------------------------------------


def test_heartbeat_answer() -> None:
    """The attempts to cancel, and whether to drain and to send the hardware again."""
    parsed = parse_heartbeat(
        {"status": "ok", "cancelled": [{"task_id": "t", "attempt_id": "a"}], "drain": True, "needs_collect": True}
    )
    assert (parsed.cancelled, parsed.wants_drain, parsed.needs_collect) == ((("t", "a"),), True, True)


@pytest.mark.parametrize("bad", [None, 3, "t", [], {}, {"task_id": "t"}, {"task_id": "../t", "attempt_id": "a"}])
def test_malformed_cancellation_is_left_out(bad: object) -> None:
    """One bad cancellation does not hide the others."""
    good = {"task_id": "t", "attempt_id": "a"}
    assert parse_heartbeat({"cancelled": [bad, good]}).cancelled == (("t", "a"),)


def test_cancellations_are_bounded() -> None:
    """A heartbeat's answer cannot fill the memory."""
    items = [{"task_id": f"t{number}", "attempt_id": "a"} for number in range(limits.HEARTBEAT_CANCELLED_MAX + 5)]
    assert len(parse_heartbeat({"cancelled": items}).cancelled) == limits.HEARTBEAT_CANCELLED_MAX


def test_features() -> None:
    """Names are taken, everything else is left out, and there is a bound."""
    assert parse_features({"features": ["release", 3, None, ["x"], "", "a b", "\udc80", "upload-url"]}) == {
        "release",
        "upload-url",
    }
    assert parse_features({"features": "release"}) == frozenset()
    many = [f"feature-{number}" for number in range(1000)]
    assert len(parse_features({"features": many})) == limits.FEATURES_MAX_COUNT


@property_test
@given(data=st.dictionaries(st.sampled_from(["cancelled", "drain", "features", "lease_expires_at"]), json_values))
def test_any_data_is_read(data: dict[str, Any]) -> None:
    """Data of the wrong types is as good as none."""
    assert parse_heartbeat(data).wants_drain == (data.get("drain") is True)
    assert all(isinstance(feature, str) for feature in parse_features(data))
    assert parse_renewal(data).is_cancel_requested is False


UPLOAD = {"url": "https://store.example/b/k?sig=1", "method": "put", "headers": {"x-amz-acl": "private"}, "key": "b/k"}


def test_upload_target() -> None:
    """Where an artifact goes; the method is written in capitals."""
    target = parse_upload_target(UPLOAD)
    assert (target.url, target.method, target.headers, target.key) == (
        UPLOAD["url"],
        "PUT",
        {"x-amz-acl": "private"},
        "b/k",
    )


@pytest.mark.parametrize("missing", ["method", "headers"])
def test_upload_target_with_defaults(missing: str) -> None:
    """Without a method it is PUT, without headers there are none."""
    target = parse_upload_target({**UPLOAD, missing: None})
    assert (target.method, target.url) == ("PUT", UPLOAD["url"])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"url": None}, id="no-url"),
        pytest.param({"url": 3}, id="url-number"),
        pytest.param({"url": "file:///etc/shadow"}, id="url-file"),
        pytest.param({"url": "ftp://x/y"}, id="url-ftp"),
        pytest.param({"url": "/relative"}, id="url-relative"),
        pytest.param({"url": "https:///no-host"}, id="url-without-host"),
        pytest.param({"url": "https://[::1"}, id="url-broken-host"),
        pytest.param({"url": "https://h:99999/"}, id="url-broken-port"),
        pytest.param({"url": "https://h/a\r\nHost: x"}, id="url-line-break"),
        pytest.param({"url": "https://h/" + "a" * 10_000}, id="url-huge"),
        pytest.param({"method": "DELETE"}, id="method"),
        pytest.param({"method": 3}, id="method-number"),
        pytest.param({"headers": ["a"]}, id="headers-list"),
        pytest.param({"headers": {"a": 1}}, id="header-number"),
        pytest.param({"headers": {"a": "b\r\nc: d"}}, id="header-line-break"),
        pytest.param({"headers": {"a b": "c"}}, id="header-name"),
        pytest.param({"headers": {"": "c"}}, id="header-name-empty"),
        pytest.param({"headers": {f"h{number}": "" for number in range(100)}}, id="headers-many"),
        pytest.param({"key": ""}, id="key-empty"),
        pytest.param({"key": None}, id="key-missing"),
        pytest.param({"key": "k" * 10_000}, id="key-huge"),
    ],
)
def test_unusable_upload_target(change: dict[str, Any]) -> None:
    """What no HTTP request can be made of is refused with a sentence, so that the result goes without it."""
    with pytest.raises(Permanent, match=r"^the control plane "):
        parse_upload_target({**UPLOAD, **change})


@property_test
@given(data=st.fixed_dictionaries({}, optional=dict.fromkeys(("url", "method", "headers", "key"), json_values)))
def test_any_upload_data_is_a_target_or_a_refusal(data: dict[str, Any]) -> None:
    """Nothing else is raised."""
    target = _target({**UPLOAD, **data})
    if isinstance(target, Permanent):
        assert str(target).startswith("the control plane ")
    else:
        assert target.method in {"PUT", "POST"}


def _target(data: dict[str, Any]) -> UploadTarget | Permanent:
    try:
        return parse_upload_target(data)
    except Permanent as error:
        return error
