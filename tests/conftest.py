"""For all tests: property tests have no time limit per example (these machines are shared), and say how to replay."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("shared-machine", deadline=None, print_blob=True)
settings.load_profile("shared-machine")
