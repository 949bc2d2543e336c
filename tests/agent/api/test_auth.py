"""Who is let in, decided on plain values; and what a tokens file may hold."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from pathlib import Path

import pytest

from remotegpu_agent.api.auth import Caller, LocalPeer, Rules, identify, local_peer, network_peer
from remotegpu_agent.api.settings import LegacyCall, LegacyCaller
from remotegpu_agent.api.tokens import Role, Token, TokenSet, digest_of, load_tokens, make_token_file
from remotegpu_schemas.errors import Code, Misconfigured, Refused

OWN_UID = 900
GROUP = 950
RULES = Rules(
    tokens=TokenSet(
        [
            Token("ci", Role.OPERATE, digest_of("operator-secret")),
            Token("board", Role.READ, digest_of("reader-secret")),
        ]
    ),
    own_uid=OWN_UID,
    group_id=GROUP,
    legacy_callers=(
        LegacyCaller(ipaddress.ip_network("10.0.0.0/8"), frozenset({LegacyCall.SYSTEM_INFO})),
        LegacyCaller(ipaddress.ip_network("fd00::/8"), frozenset(LegacyCall)),
    ),
)
REMOTE = network_peer("192.168.1.1")


def refusal(method: str = "GET", call: LegacyCall | None = None, peer: str = "192.168.1.1", **headers: str) -> Code:
    """The code of the refusal."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with pytest.raises(Refused) as caught:
        identify(RULES, network_peer(peer), named, method, call)
    assert "secret" not in str(caught.value)
    return caught.value.code


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Agent-Token": "operator-secret"},
        {"Authorization": "Bearer operator-secret"},
        {"Authorization": "bearer   operator-secret "},
        {"X-Agent-Token": "operator-secret", "Authorization": "Bearer operator-secret"},
        {"X-Agent-Token": "", "Authorization": "Bearer operator-secret"},
    ],
)
def test_either_header_carries_the_token(headers: dict[str, str]) -> None:
    """Both headers are read, as the agent itself sends both."""
    assert identify(RULES, REMOTE, headers, "POST", None) == Caller("token:ci", "192.168.1.1", Role.OPERATE)


def test_no_or_wrong_token() -> None:
    """No token, an empty one, a wrong one, a prefix, another scheme and bytes that are no text: all unauthorized."""
    assert refusal() is Code.UNAUTHORIZED
    assert refusal(X_Agent_Token="") is Code.UNAUTHORIZED
    assert refusal(X_Agent_Token="wrong") is Code.UNAUTHORIZED
    assert refusal(X_Agent_Token="operator-secre") is Code.UNAUTHORIZED
    assert refusal(X_Agent_Token="operator-secret2") is Code.UNAUTHORIZED
    assert refusal(Authorization="Basic operator-secret") is Code.UNAUTHORIZED
    assert refusal(Authorization="operator-secret") is Code.UNAUTHORIZED
    assert refusal(Authorization="Bearer") is Code.UNAUTHORIZED
    assert refusal(X_Agent_Token="\udcff\udcfe") is Code.UNAUTHORIZED


def test_a_reader_may_only_read() -> None:
    """The role `read` may GET and HEAD, nothing else."""
    headers = {"X-Agent-Token": "reader-secret"}
    for method in ("GET", "HEAD"):
        assert identify(RULES, REMOTE, headers, method, None).who == "token:board"
    for method in ("POST", "DELETE", "PUT", "PATCH", "OPTIONS", "PROPFIND"):
        assert refusal(method, X_Agent_Token="reader-secret") is Code.FORBIDDEN


def test_a_legacy_network_may_make_the_listed_calls_only() -> None:
    """A network is let in for what it is listed for, by the address of the connection alone."""
    peer = network_peer("10.1.2.3")
    caller = identify(RULES, peer, {}, "GET", LegacyCall.SYSTEM_INFO)
    assert caller == Caller("legacy:10.0.0.0/8", "10.1.2.3", Role.OPERATE, is_legacy=True)
    assert refusal("POST", LegacyCall.PROCESS_STOP, "10.1.2.3") is Code.UNAUTHORIZED
    assert refusal("GET", None, "10.1.2.3") is Code.UNAUTHORIZED
    assert refusal("GET", LegacyCall.SYSTEM_INFO, "11.1.2.3") is Code.UNAUTHORIZED
    assert refusal("GET", LegacyCall.SYSTEM_INFO, X_Forwarded_For="10.1.2.3") is Code.UNAUTHORIZED
    assert identify(RULES, network_peer("fd00::1"), {}, "POST", LegacyCall.PROCESS_STOP).who == "legacy:fd00::/8"


def test_who_sends_a_token_is_judged_by_it() -> None:
    """A wrong token from a legacy network is refused: somebody configured one, and it does not fit."""
    assert refusal("GET", LegacyCall.SYSTEM_INFO, "10.1.2.3", X_Agent_Token="wrong") is Code.UNAUTHORIZED


def test_an_ipv4_caller_of_a_dual_stack_socket() -> None:
    """The mapped address counts as the IPv4 address that it is."""
    assert identify(RULES, network_peer("::ffff:10.1.2.3"), {}, "GET", LegacyCall.SYSTEM_INFO).source == "10.1.2.3"


@pytest.mark.parametrize(("uid", "groups"), [(0, set()), (OWN_UID, set()), (1234, {GROUP}), (1234, {1, GROUP, 2})])
def test_local_peers_that_may(uid: int, groups: set[int]) -> None:
    """Root, the agent's own user and the group's members may operate."""
    peer = LocalPeer(uid, frozenset(groups))
    assert identify(RULES, peer, {}, "POST", None) == Caller(f"uid:{uid}", "unix", Role.OPERATE, uid=uid)


@pytest.mark.parametrize("headers", [{}, {"X-Agent-Token": "operator-secret"}])
def test_local_peers_that_may_not(headers: dict[str, str]) -> None:
    """Anybody else is forbidden, token or not: on the socket the kernel says who it is."""
    with pytest.raises(Refused, match="user 1234 may not use this socket") as caught:
        identify(RULES, LocalPeer(1234, frozenset({1234})), headers, "GET", LegacyCall.SYSTEM_INFO)
    assert caught.value.code is Code.FORBIDDEN


def test_the_kernel_names_the_peer() -> None:
    """SO_PEERCRED and SO_PEERGROUPS of a real socket give this process's own ids."""
    import os

    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        assert local_peer(left) == LocalPeer(os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))


def test_a_peer_of_very_many_groups() -> None:
    """Where the kernel's list is too long for one call, the user database is asked."""
    import grp

    class Crowded:
        def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
            if optname == socket.SO_PEERCRED:
                return struct.pack("iII", 1, 0, 7)
            raise OSError(errno.ERANGE, "too many")

    groups = local_peer(Crowded()).groups
    assert 7 in groups
    assert groups >= {group.gr_gid for group in grp.getgrall() if "root" in group.gr_mem}


def test_a_tokens_file(tmp_path: Path) -> None:
    """Roles, bare tokens, comments, blank lines and tokens with colons."""
    path = tmp_path / "tokens"
    path.write_text("# comment\n\nci:operate:with:colons\n  board:read:abc  \r\nbare-one\nbare-two\n")
    tokens = load_tokens(path)
    found = [tokens.find(text) for text in ("with:colons", "abc", "bare-one", "bare-two", "comment", "")]
    named = [(token.name, token.role) if token else None for token in found]
    assert named == [
        ("ci", Role.OPERATE),
        ("board", Role.READ),
        ("operator", Role.OPERATE),
        ("operator", Role.OPERATE),
        None,
        None,
    ]
    assert "abc" not in repr(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no token"),
        ("# only\n", "has no token"),
        ("ok\nname:secret", "line 2: not name:role:token"),
        (":read:secret", "line 1: not name:role:token"),
        ("name:read:", "line 1: not name:role:token"),
        ("name:admin:secret", "line 1: the role between the colons must be 'read' or 'operate'"),
        ("x" * 70_000, "is larger than 65536 bytes"),
    ],
)
def test_a_bad_tokens_file(tmp_path: Path, content: str, message: str) -> None:
    """What is wrong is named by its line, and no token is shown."""
    path = tmp_path / "tokens"
    path.write_text(content)
    with pytest.raises(Misconfigured, match=r"api\.tokens_file: ") as caught:
        load_tokens(path)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_missing_tokens_file(tmp_path: Path) -> None:
    """It is named, with the command that makes one."""
    with pytest.raises(Misconfigured, match=r"cannot read .*No such file.*token new"):
        load_tokens(tmp_path / "missing")


def test_an_existing_token_is_kept(tmp_path: Path) -> None:
    """Making the token file twice changes nothing, and leaves no draft behind."""
    path = tmp_path / "api-token"
    make_token_file(path)
    before = path.read_text()
    make_token_file(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
