"""The tokens and the certificate that are in force. Read again when their files change; broken ones change nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from remotegpu_agent.api.tokens import Token, load_tokens
from remotegpu_agent.tls import no_password
from remotegpu_schemas.errors import Misconfigured

_SETTLE_S: Final = 0.3
"""An editor writes in several steps, and a certificate comes in two files: what still changes is not read yet."""
_SETTLE_MAX: Final = 10

log: structlog.typing.FilteringBoundLogger = structlog.get_logger(__name__)

_Stamp = tuple[tuple[int, int, int, int] | None, ...]


@dataclasses.dataclass(frozen=True)
class TlsPair:
    """The files of a certificate (with its chain) and of its key, PEM."""

    cert_file: Path
    key_file: Path

    def context(self) -> ssl.SSLContext:
        """A server's context with this pair, TLS 1.2 or newer. Raises Misconfigured."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(self.cert_file, self.key_file, password=no_password)
        except ssl.SSLError as error:
            raise Misconfigured(
                f"api.tls_cert_file: {self.cert_file} and {self.key_file} are no certificate with its key in PEM form, "
                f"without a pass phrase ({error.reason or 'not readable'}); name a pair that belongs together"
            ) from error
        except OSError as error:
            raise Misconfigured(
                f"api.tls_cert_file: cannot read {self.cert_file} or {self.key_file}: {error.strerror or error}; make "
                "both readable by the agent"
            ) from error
        return context


class Credentials:
    """What is in force now. `tokens` and `tls` are whole at any time; `watch` keeps them current."""

    def __init__(self, tokens_file: Path, pair: TlsPair | None) -> None:
        """Read all files for the first time. Raises Misconfigured."""
        self._tokens_file = tokens_file
        self._pair = pair
        self._tokens_stamp = _stamp(tokens_file)
        self._pair_stamp = self._stamp_of_pair()
        self._tokens = load_tokens(tokens_file)
        self._tls = pair.context() if pair is not None else None
        self._problems: dict[str, str] = {}

    @property
    def tls(self) -> ssl.SSLContext | None:
        """For the next handshake; None without TLS."""
        return self._tls

    @property
    def problems(self) -> list[str]:
        """What is wrong with files that have changed since, each a sentence; empty if what they say is in force."""
        return list(self._problems.values())

    def find(self, candidate: str) -> Token | None:
        """The accepted token that equals `candidate`."""
        return self._tokens.find(candidate)

    async def watch(self, look_every_s: float) -> None:
        """Look at the files for ever.

        A stat(2) of each sees what inotify(7) does not: changes at the far end of a link, and on network file systems.
        """
        while True:
            await asyncio.sleep(look_every_s)
            try:
                if self._has_changed():
                    await self._settled()
                    self._reread()
            except Exception:
                # The top of the loop: a fault here must not be the end of all later changes.
                log.exception("api_credentials_not_looked_at")

    def _has_changed(self) -> bool:
        return (_stamp(self._tokens_file), self._stamp_of_pair()) != (self._tokens_stamp, self._pair_stamp)

    async def _settled(self) -> None:
        """Wait until nothing has changed for a moment, but not for ever."""
        for _ in range(_SETTLE_MAX):
            before = (_stamp(self._tokens_file), self._stamp_of_pair())
            await asyncio.sleep(_SETTLE_S)
            if before == (_stamp(self._tokens_file), self._stamp_of_pair()):
                return

    def _reread(self) -> None:
        tokens_stamp, pair_stamp = _stamp(self._tokens_file), self._stamp_of_pair()
        if tokens_stamp != self._tokens_stamp:
            self._tokens_stamp = tokens_stamp
            self._read("tokens", self._read_tokens)
        if pair_stamp != self._pair_stamp:
            self._pair_stamp = pair_stamp
            self._read("certificate", self._read_pair)

    def _stamp_of_pair(self) -> _Stamp:
        return () if self._pair is None else (*_stamp(self._pair.cert_file), *_stamp(self._pair.key_file))

    def _read_tokens(self) -> None:
        self._tokens = load_tokens(self._tokens_file)

    def _read_pair(self) -> None:
        if self._pair is not None:
            self._tls = self._pair.context()

    def _read(self, what: str, read: Callable[[], None]) -> None:
        try:
            read()
        except Misconfigured as error:
            self._problems[what] = f"{error}. What was read before stays in force"
            log.error("api_file_not_reloaded", what=what, problem=str(error), in_force="what was read before")
        else:
            self._problems.pop(what, None)
            log.info("api_file_reloaded", what=what)


def _stamp(path: Path) -> _Stamp:
    """What changes whenever the file does; None when it is not there."""
    try:
        found = path.stat()
    except OSError:
        return (None,)
    return ((found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns ^ found.st_size),)
