"""A failure of chance can be played again."""

from __future__ import annotations

import pytest

from tests.chaos.seeds import seeded


def test_a_failure_says_how_to_replay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names its seed and the one command; with that seed the chance is the same."""
    monkeypatch.delenv("REMOTEGPU_CHAOS_SEED", raising=False)
    drawn: list[float] = []

    def fail() -> None:
        with seeded("tests/chaos/test_x.py") as chance:
            drawn.append(chance.random())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fail()
    [note] = caught.value.__notes__
    seed = note.split(";")[0].removeprefix("seed ")
    assert note.endswith("python -m pytest --no-cov tests/chaos/test_x.py")
    assert f"REMOTEGPU_CHAOS_SEED={seed} " in note
    monkeypatch.setenv("REMOTEGPU_CHAOS_SEED", seed)
    with seeded("tests/chaos/test_x.py") as chance:
        assert chance.random() == drawn[0]
