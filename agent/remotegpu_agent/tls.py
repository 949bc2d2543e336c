"""TLS with the control plane: own CA, client certificate, and both taken anew when they change on disk.

Knows no HTTP; what went wrong in a handshake is told in a sentence that says what to do.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import structlog

from remotegpu_schemas.errors import Misconfigured

log = structlog.get_logger(__name__)

_Marks: TypeAlias = tuple[tuple[int, int, int] | None, ...]
# X509_V_ERR_*: openssl-verification-options(1) and x509_vfy.h.
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_CA: Final = frozenset({2, 18, 19, 20, 21})
_WRONG_NAME: Final = frozenset({62, 64})
_NO_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG")
_OLD_TLS: Final = ("PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL")
_CLIENT_REFUSED: Final = (
    "ALERT_CERTIFICATE_REQUIRED",
    "ALERT_BAD_CERTIFICATE",
    "ALERT_CERTIFICATE_EXPIRED",
    "ALERT_CERTIFICATE_REVOKED",
    "ALERT_CERTIFICATE_UNKNOWN",
    "ALERT_UNKNOWN_CA",
)


@dataclass(frozen=True)
class TlsFiles:
    """Own CA and client certificate, each optional."""

    ca_file: Path | None = None
    client_cert_file: Path | None = None
    client_key_file: Path | None = None

    def load(self) -> ssl.SSLContext:
        """What they are now. Raises OSError; of it ssl.SSLError when they cannot be used."""
        context = ssl.create_default_context(cafile=str(self.ca_file) if self.ca_file else None)
        if self.client_cert_file is not None:
            context.load_cert_chain(self.client_cert_file, self.client_key_file, password=no_password)
        return context


def no_password() -> str:
    """Without this OpenSSL asks on the terminal for the pass phrase of an encrypted key."""
    return ""


class RenewedContext:
    """The context of these files as they are on disk. Changed files give a new one, and so new connections."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._marks: _Marks = ()
        self._context: ssl.SSLContext | None = None
        self._problem = ""

    def open(self) -> None:
        """Load the files for the first time. Raises Misconfigured."""
        self._marks = self._look()
        try:
            self._context = self._files.load()
        except OSError as error:
            raise Misconfigured(
                f"the certificates of the control plane cannot be loaded: {error}; "
                "check control_plane.ca_file, client_cert_file and client_key_file"
            ) from error

    def current(self) -> ssl.SSLContext:
        """The newest context that could be loaded. Files that are half written are tried again at the next call."""
        if self._context is None:
            raise RuntimeError("the certificates are not loaded")
        marks = self._look()
        if marks != self._marks:
            try:
                self._context = self._files.load()
            except OSError as error:
                self._note_problem(str(error))
            else:
                self._marks, self._problem = marks, ""
                log.info("the certificates for the control plane have changed and are used from now on")
        return self._context

    def _note_problem(self, problem: str) -> None:
        if problem != self._problem:
            log.warning(
                "the changed certificates for the control plane cannot be loaded; the earlier ones stay in use",
                error=problem,
                remedy="check control_plane.ca_file, client_cert_file and client_key_file; they are tried again",
            )
        self._problem = problem

    def _look(self) -> _Marks:
        files = self._files
        system = ssl.get_default_verify_paths()
        authorities = [files.ca_file] if files.ca_file is not None else [system.cafile, system.capath]
        return tuple(_mark(path) for path in (*authorities, files.client_cert_file, files.client_key_file))


def _mark(path: str | Path | None) -> tuple[int, int, int] | None:
    """What changes when a file is written or replaced; None where there is none."""
    if path is None:
        return None
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


def tls_sentence(error: ssl.SSLError, host: str) -> str:
    """Why no TLS connection with this host came about, and what to do."""
    reason = error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return _certificate_sentence(error, host)
    if any(name in reason for name in _CLIENT_REFUSED):
        return (
            f"{host} refuses the client certificate of this agent, or its absence ({reason}); check "
            "control_plane.client_cert_file and client_key_file"
        )
    if any(name in reason for name in _NO_TLS):
        return f"this port of {host} does not speak TLS ({reason}); check the port and the https of control_plane.url"
    if any(name in reason for name in _OLD_TLS):
        return f"{host} and this agent have no version of TLS in common ({reason}); it must offer 1.2 or newer"
    return f"TLS with {host} fails: {reason}"


def _certificate_sentence(error: ssl.SSLCertVerificationError, host: str) -> str:
    code, message = error.verify_code, error.verify_message
    if code == _EXPIRED:
        return f"the certificate of {host} has expired; renew it there, or check the clock of this host"
    if code == _NOT_YET_VALID:
        return f"the certificate of {host} is not valid yet; check the clocks of both hosts"
    if code in _UNKNOWN_CA:
        return (
            f"the certificate of {host} is from a CA that is not trusted here ({message}); name the file with that "
            "CA in control_plane.ca_file"
        )
    if code in _WRONG_NAME:
        return (
            f"the certificate of {host} is for another host name ({message}); write a name that it has into "
            "control_plane.url, or have one issued for this name"
        )
    return f"the certificate of {host} is not accepted: {message}"
