"""Who calls, and whether they may: a peer and headers come in, a caller or a refusal comes out."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import pwd
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Final, Protocol, TypeAlias

from remotegpu_agent.api.settings import IpAddress, LegacyCall, LegacyCaller
from remotegpu_agent.api.tokens import Role, TokenSet
from remotegpu_schemas.errors import Code, Refused

READING_METHODS: Final = frozenset({"GET", "HEAD"})

_SO_PEERGROUPS: Final = 59
"""Supplementary groups of the peer (Linux 4.13, include/uapi/asm-generic/socket.h); the socket module lacks it."""
_UCRED: Final = struct.Struct("iII")
_GROUPS_MAX_BYTES: Final = 1024
"""What Python's getsockopt can take: 256 groups."""


@dataclasses.dataclass(frozen=True)
class LocalPeer:
    """The process at the other end of the Unix socket, as the kernel saw it when it connected."""

    uid: int
    groups: frozenset[int]


@dataclasses.dataclass(frozen=True)
class NetworkPeer:
    """The address at the other end of the TCP connection itself; no header is asked."""

    address: IpAddress


Peer: TypeAlias = LocalPeer | NetworkPeer


class HasSocketOptions(Protocol):
    """What asyncio hands out as a transport's socket."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """As socket.socket.getsockopt."""
        ...


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who made a request: `who` and `source` go to log and audit."""

    who: str
    source: str
    role: Role
    is_legacy: bool = False
    uid: int | None = None
    """The user of this host, for callers of the Unix socket."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """Who is known to this agent."""

    tokens: TokenSet
    own_uid: int
    group_id: int | None
    legacy_callers: Sequence[LegacyCaller]


def local_peer(sock: HasSocketOptions) -> LocalPeer:
    """The peer of a Unix socket (unix(7), SO_PEERCRED)."""
    _, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_MAX_BYTES)
        groups = struct.unpack(f"{len(raw) // 4}I", raw)
    except OSError:  # ERANGE: more groups than fit; the user database knows them
        groups = _groups_of(uid, gid)
    return LocalPeer(uid, frozenset({gid, *groups}))


def network_peer(address: str) -> NetworkPeer:
    """The peer of a TCP connection; an IPv4 caller of a dual-stack socket is an IPv4 caller."""
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return NetworkPeer(mapped or parsed)


def source_of(peer: Peer) -> str:
    """How the peer's place is written in log and audit."""
    return "unix" if isinstance(peer, LocalPeer) else str(peer.address)


def identify(rules: Rules, peer: Peer, headers: Mapping[str, str], method: str, call: LegacyCall | None) -> Caller:
    """The caller, entitled to make this request. Raises Refused: UNAUTHORIZED, FORBIDDEN.

    Who sends a token is judged by the token, whatever else would let them in; an empty header counts as none.
    """
    if isinstance(peer, LocalPeer):
        return _identify_local(rules, peer)
    offered = _sent_tokens(headers)
    if not offered:
        return _identify_legacy(rules, peer, call)
    found = [rules.tokens.find(candidate) for candidate in offered if candidate is not None]
    token = next((token for token in found if token is not None), None)
    if token is None:
        raise Refused(Code.UNAUTHORIZED, "wrong token; look into the agent's api.tokens_file")
    if token.role is Role.READ and method not in READING_METHODS:
        raise Refused(Code.FORBIDDEN, f"token '{token.name}' may only read; use one with the role 'operate'")
    return Caller(f"token:{token.name}", source_of(peer), token.role)


def _groups_of(uid: int, gid: int) -> tuple[int, ...]:
    try:
        return tuple(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
    except KeyError:
        return ()


def _identify_local(rules: Rules, peer: LocalPeer) -> Caller:
    is_member = rules.group_id is not None and rules.group_id in peer.groups
    if peer.uid in (0, rules.own_uid) or is_member:
        return Caller(f"uid:{peer.uid}", source_of(peer), Role.OPERATE, uid=peer.uid)
    raise Refused(
        Code.FORBIDDEN,
        f"user {peer.uid} may not use this socket; root, the agent's user and group api.socket_group may",
    )


def _identify_legacy(rules: Rules, peer: NetworkPeer, call: LegacyCall | None) -> Caller:
    for legacy in rules.legacy_callers:
        if call in legacy.allow and peer.address in legacy.network:
            return Caller(f"legacy:{legacy.network}", source_of(peer), Role.OPERATE, is_legacy=True)
    raise Refused(Code.UNAUTHORIZED, "no token; send one as X-Agent-Token or Authorization: Bearer")


def _sent_tokens(headers: Mapping[str, str]) -> list[str | None]:
    """What the caller offers; None for an Authorization of another scheme, an offer that fits nothing."""
    direct = headers.get("X-Agent-Token", "").strip()
    scheme, _, bearer = headers.get("Authorization", "").strip().partition(" ")
    offered: list[str | None] = [direct, bearer.strip()] if scheme.lower() == "bearer" else [direct, scheme and None]
    return [token for token in offered if token != ""]
