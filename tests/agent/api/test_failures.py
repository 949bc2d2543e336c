"""Failed authentications are bounded by address; a good token is never held up by them."""

from __future__ import annotations

import ipaddress

import pytest
import structlog.testing

from remotegpu_agent.api.auth import network_peer, peer_key
from remotegpu_agent.api.failures import Failures
from remotegpu_agent.api.settings import LegacyCall, LegacyCaller
from tests.agent.api.conftest import OPERATOR, Api, StartApi
from tests.agent.api.raw import connect

WRONG = {"X-Agent-Token": "wrong-secret"}


def test_a_bucket_fills_again() -> None:
    """So many failures at once, then so many a second; it is said how long to wait, and once that it begins."""
    failures = Failures(burst=3, per_s=0.5, places=10)
    assert [failures.note("a", 0.0).retry_after_s for _ in range(3)] == [0.0] * 3
    first, second = failures.note("a", 0.0), failures.note("a", 1.0)
    assert (first.retry_after_s, first.is_first_refused) == (2.0, True)
    assert (second.retry_after_s, second.is_first_refused) == (1.0, False)
    assert failures.note("a", 2.0).retry_after_s == 0.0
    assert failures.note("a", 2.0).is_first_refused
    assert [failures.note("a", 1000.0).retry_after_s > 0 for _ in range(4)] == [False, False, False, True]
    assert failures.refused_count == 4


def test_addresses_are_apart_and_bounded() -> None:
    """One address costs another nothing; of too many the one that has not failed for the longest is forgotten."""
    failures = Failures(burst=1, per_s=0.001, places=2)
    for name in ("a", "b", "a"):
        failures.note(name, 0.0)
    failures.note("c", 0.0)
    assert len(failures) == 2
    assert failures.note("a", 0.0).retry_after_s > 0
    assert failures.note("b", 0.0).retry_after_s == 0.0


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
    ],
)
def test_whom_bounds_count_as_one(address: str, key: str) -> None:
    """An IPv4 address, however it is written, and the network that an IPv6 host chooses its addresses from."""
    assert str(peer_key(network_peer(address))) == key


async def test_f35_wrong_tokens_are_limited(start_api: StartApi) -> None:
    """After the burst a wrong or missing token is 429 with Retry-After, and no longer a line in the log each."""
    async with start_api(auth_failures_burst=3) as api:
        with structlog.testing.capture_logs() as logs:
            answers = [await api.call("GET", "/api/v1/tasks", headers=WRONG if n % 2 else {}) for n in range(8)]
            async with api.tcp.get(api.url + "/api/v1/tasks", headers=WRONG) as answer:
                assert answer.headers["Retry-After"] == "2"
        assert [(status, body["code"]) for status, body in answers] == [(401, 30016)] * 3 + [(429, 30019)] * 5
        warnings = [line["event"] for line in logs if line["log_level"] == "warning"]
        assert warnings == ["api_caller_refused"] * 3 + ["api_callers_limited"]
        assert api.server.figures.refused["auth_failures"] == 6


async def test_f35_a_good_token_is_served_behind_a_limited_address(start_api: StartApi) -> None:
    """Whoever fails on the same address, all users of a host or of a NAT, the right token and /ping are served."""
    async with start_api(auth_failures_burst=1) as api:
        for _ in range(5):
            await api.call("GET", "/api/v1/tasks", headers=WRONG)
        assert (await api.call("GET", "/api/v1/tasks", headers=WRONG))[0] == 429
        assert (await api.call("GET", "/api/v1/tasks", headers=OPERATOR))[0] == 200
        assert (await api.call("GET", "/api/v1/ping", headers={}))[0] == 200
        assert (await api.call("GET", "/api/v1/tasks", session=api.unix, headers=WRONG))[0] == 200


async def test_f35_another_address_has_its_own_failures(start_api: StartApi) -> None:
    """What one address has used up is still there for another."""
    async with start_api(auth_failures_burst=1) as api:
        for _ in range(3):
            await api.call("GET", "/api/v1/tasks", headers=WRONG)
        async with connect(api.port, source="127.0.0.2") as other:
            await other.send(b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\nX-Agent-Token: wrong\r\n\r\n")
            assert (await other.answer())[0] == 401


async def test_a_reader_that_may_not_and_legacy_callers_are_no_failures(start_api: StartApi) -> None:
    """Only who is not known counts: neither a known one without the right, nor a caller that needs no token."""
    legacy = (LegacyCaller(ipaddress.ip_network("127.0.0.0/8"), frozenset({LegacyCall.SYSTEM_INFO})),)
    async with start_api(auth_failures_burst=1, legacy_callers=legacy) as api:
        for _ in range(3):
            reader = {"X-Agent-Token": "reader-secret"}
            assert (await api.call("POST", "/api/v1/drain", headers=reader))[0] == 403
            assert (await api.call("GET", "/api/v1/system/info", headers={}))[0] == 200
        assert (await api.call("GET", "/api/v1/tasks", headers=WRONG))[0] == 401


async def test_a_failure_leaves_the_connection_open(api: Api) -> None:
    """A refusal ends no connection: a client that mends its token goes on with the same."""
    async with connect(api.port) as raw:
        await raw.send(b"GET /api/v1/tasks HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await raw.answer())[0] == 401
        assert await raw.ping()
