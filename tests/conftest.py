"""For all tests: property tests have no time limit per example (these machines are shared), and say how to replay."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared-machine", deadline=None, print_blob=True)
settings.load_profile("shared-machine")


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every user may pass through, as a state directory is where tasks have a user of their own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o711)
        yield Path(name)
