"""Where the tests of this folder have their chance from, and how a failure is played again."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Generator
from typing import Final

from tests.scale import IS_LONG

_NAME: Final = "REMOTEGPU_CHAOS_SEED"


@contextlib.contextmanager
def seeded(test: str) -> Generator[random.Random]:
    """Chance with a seed of its own, or the one of the environment; what is raised inside gets the replaying command.

    The seed decides on what happens and when; how far processes have come by then is the machine's affair.
    """
    seed = int(os.environ.get(_NAME) or random.SystemRandom().randrange(2**32))
    try:
        yield random.Random(seed)
    except BaseException as error:
        long = "REMOTEGPU_LONG_TESTS=1 " if IS_LONG else ""
        error.add_note(f"seed {seed}; again: {_NAME}={seed} {long}python -m pytest --no-cov {test}")
        raise
