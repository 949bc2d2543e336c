"""One table says how each code is sent and what it means."""

from __future__ import annotations

import http

import pytest

from remotegpu_schemas.errors import CODES, AgentError, Code, LeaseLost, Misconfigured, Permanent, Refused, Retryable


@pytest.mark.parametrize("code", Code)
def test_code_has_a_row(code: Code) -> None:
    """Each code has an HTTP status that exists, a meaning, and what the agent does when it receives it."""
    info = CODES[code]
    assert http.HTTPStatus(info.http_status)
    assert (info.http_status < 400) == (code is Code.OK)
    assert info.meaning
    assert info.agent_does


def test_codes_are_unique() -> None:
    """No two names share a number (the enum would make one an alias), and the table has no other."""
    assert len(Code.__members__) == len({code.value for code in Code}) == len(CODES)


def test_meanings_are_unique() -> None:
    """Two codes that say the same would be one."""
    assert len({info.meaning for info in CODES.values()}) == len(CODES)


@pytest.mark.parametrize(
    ("code", "http_status"), [(30001, 409), (30002, 409), (30003, 410), (30004, 404), (30005, 400), (30099, 500)]
)
def test_codes_of_the_protocol(code: int, http_status: int) -> None:
    """The six codes of protocol.md have its HTTP statuses."""
    assert CODES[Code(code)].http_status == http_status


def test_codes_of_the_agents_own_api_begin_at_30010() -> None:
    """All others are further refusals, between 30010 and 30098."""
    others = set(Code) - {Code(code) for code in (0, 30001, 30002, 30003, 30004, 30005, 30099)}
    assert all(30010 <= code <= 30098 for code in others)


@pytest.mark.parametrize(
    "error",
    [Retryable("m"), Permanent("m"), LeaseLost("m"), Misconfigured("m"), Refused(Code.DRAINING, "m")],
)
def test_one_root(error: AgentError) -> None:
    """Everything that is raised on purpose is an AgentError, and says what it was told to say."""
    assert isinstance(error, AgentError)
    assert str(error) == "m"


def test_refusal_speaks_for_its_code() -> None:
    """Without a message it says what the table says; it carries the code."""
    error = Refused(Code.QUEUE_FULL)
    assert (str(error), error.code) == ("the queue is full", Code.QUEUE_FULL)


def test_retryable_carries_the_pause() -> None:
    """What the other side asked for is kept, if it asked."""
    assert Retryable("m", 7.5).retry_after_s == 7.5
    assert Retryable("m").retry_after_s is None
