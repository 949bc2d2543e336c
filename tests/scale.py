"""How much the tests try: little in `make test`, all of it in `make test-long`."""

from __future__ import annotations

import os

IS_LONG = os.environ.get("REMOTEGPU_LONG_TESTS") == "1"


def scaled(short: int, long: int) -> int:
    """A number of examples, rounds or bytes."""
    return long if IS_LONG else short
