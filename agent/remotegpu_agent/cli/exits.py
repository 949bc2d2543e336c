"""How the program ends: the exit codes of interface.md, and the exception that carries one."""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    """Promises to scripts; `submit --wait` and `wait` end with the task's own code, or OURS."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    REFUSED = 5
    OURS = 125
    INTERRUPTED = 130


class Stop(Exception):
    """Ends the program with a code, and a message on standard error."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


class Unreachable(Stop):
    """No agent answers; `wait` and `logs -f` try again for a while."""

    def __init__(self, message: str) -> None:
        super().__init__(Exit.UNREACHABLE, message)


class Broken(Unreachable):
    """The connection broke after the call was sent: it may have been done or not."""


class RefusedByAgent(Stop):
    """The agent's answer is a business error."""

    def __init__(self, business_code: int, message: str) -> None:
        code = Exit.NOT_FOUND if business_code in {TASK_NOT_FOUND, DEAD_LETTER_NOT_FOUND} else Exit.REFUSED
        super().__init__(code, f"{message} (code {business_code})")
        self.business_code = business_code
        self.text = message


# Values of remotegpu_schemas.errors.Code.
TASK_FINISHED = 30002
TASK_NOT_FOUND = 30004
INVALID_PARAMETERS = 30005
UNAUTHORIZED = 30016
UNAVAILABLE = 30023
DEAD_LETTER_NOT_FOUND = 30026
