"""The one table of business codes, and the exceptions that carry them.

Codes 30001-30099 of the control plane and those of the agent's own API (from 30010 on) share one number space.
"""

from __future__ import annotations

import enum
from typing import Final, NamedTuple


class Code(enum.IntEnum):
    """Business codes; 0 is success."""

    OK = 0
    ATTEMPT_MISMATCH = 30001
    TASK_FINISHED = 30002
    LEASE_EXPIRED = 30003
    TASK_NOT_FOUND = 30004
    INVALID_PARAMETERS = 30005
    PROCESS_NOT_MANAGED = 30010
    PROCESS_GONE = 30011
    DRAINING = 30012
    QUEUE_FULL = 30013
    POLICY_REFUSED = 30014
    OPERATION_DISABLED = 30015
    UNAUTHORIZED = 30016
    FORBIDDEN = 30017
    PAYLOAD_TOO_LARGE = 30018
    RATE_LIMITED = 30019
    STATE_CONFLICT = 30020
    METHOD_NOT_ALLOWED = 30021
    ROUTE_NOT_FOUND = 30022
    UNAVAILABLE = 30023
    ALREADY_EXISTS = 30024
    NOT_SUPPORTED = 30025
    DEAD_LETTER_NOT_FOUND = 30026
    HOST_FULL = 30027
    REQUEST_TIMEOUT = 30028
    HEADERS_TOO_LARGE = 30029
    INTERNAL = 30099


class CodeInfo(NamedTuple):
    """How a code is sent (`http_status`), what it means, and what the agent does when it *receives* it."""

    http_status: int
    meaning: str
    agent_does: str


_NOT_RECEIVED: Final = "sent by the agent's own API only"

CODES: Final[dict[Code, CodeInfo]] = {
    Code.OK: CodeInfo(200, "ok", "goes on"),
    Code.ATTEMPT_MISMATCH: CodeInfo(409, "attempt mismatch", "superseded: stops the process, drops its reports"),
    Code.TASK_FINISHED: CodeInfo(409, "task already finished", "as 30001; on complete: counts as delivered"),
    Code.LEASE_EXPIRED: CodeInfo(410, "lease expired", "stops the process, cause lease_lost"),
    Code.TASK_NOT_FOUND: CodeInfo(404, "task not found", "as 30001"),
    Code.INVALID_PARAMETERS: CodeInfo(400, "invalid parameters", "keeps the report as dead letter"),
    Code.PROCESS_NOT_MANAGED: CodeInfo(404, "process not managed by this agent", _NOT_RECEIVED),
    Code.PROCESS_GONE: CodeInfo(410, "process already gone", _NOT_RECEIVED),
    Code.DRAINING: CodeInfo(503, "the agent is draining", _NOT_RECEIVED),
    Code.QUEUE_FULL: CodeInfo(503, "the queue is full", _NOT_RECEIVED),
    Code.POLICY_REFUSED: CodeInfo(403, "command refused by policy", _NOT_RECEIVED),
    Code.OPERATION_DISABLED: CodeInfo(403, "operation disabled on this host", _NOT_RECEIVED),
    Code.UNAUTHORIZED: CodeInfo(401, "missing or wrong token", _NOT_RECEIVED),
    Code.FORBIDDEN: CodeInfo(403, "this caller may not do that", _NOT_RECEIVED),
    Code.PAYLOAD_TOO_LARGE: CodeInfo(413, "request body too large", _NOT_RECEIVED),
    Code.RATE_LIMITED: CodeInfo(429, "too many requests", _NOT_RECEIVED),
    Code.STATE_CONFLICT: CodeInfo(409, "not possible in the present state", _NOT_RECEIVED),
    Code.METHOD_NOT_ALLOWED: CodeInfo(405, "method not allowed", _NOT_RECEIVED),
    Code.ROUTE_NOT_FOUND: CodeInfo(404, "no such route", _NOT_RECEIVED),
    Code.UNAVAILABLE: CodeInfo(503, "the agent is starting or stopping", _NOT_RECEIVED),
    Code.ALREADY_EXISTS: CodeInfo(409, "already exists", _NOT_RECEIVED),
    Code.NOT_SUPPORTED: CodeInfo(501, "not supported by this version", _NOT_RECEIVED),
    Code.DEAD_LETTER_NOT_FOUND: CodeInfo(404, "no such dead letter", _NOT_RECEIVED),
    Code.HOST_FULL: CodeInfo(503, "this host has no room for another task", _NOT_RECEIVED),
    Code.REQUEST_TIMEOUT: CodeInfo(408, "the request did not arrive in time", _NOT_RECEIVED),
    Code.HEADERS_TOO_LARGE: CodeInfo(431, "request line or headers too large", _NOT_RECEIVED),
    Code.INTERNAL: CodeInfo(500, "internal error", "retries with backoff"),
}


class AgentError(Exception):
    """Root of everything that the program raises on purpose; the message is for people and says what to do."""


class Retryable(AgentError):
    """It may work later. `retry_after_s` is what the other side asked for, if it did."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Permanent(AgentError):
    """Repeating it changes nothing."""


class LeaseLost(AgentError):
    """The attempt is no longer ours."""


class Misconfigured(AgentError):
    """What an operator set cannot work; the message names the key and the mend."""


class Refused(AgentError):
    """A business refusal with its code; the API answers with it, the CLI exits 5. `retry_after_s`: come again then."""

    def __init__(self, code: Code, message: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message or CODES[code].meaning)
        self.code = code
        self.retry_after_s = retry_after_s
