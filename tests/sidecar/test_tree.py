"""Descendants are found at any depth, and strangers are not."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from remotegpu_sidecar import tree
from tests.sidecar.support import pid_from, sh


@pytest.fixture(params=[True, False], ids=["children-files", "without-them"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CONFIG_PROC_CHILDREN, and without."""
    monkeypatch.setattr(tree, "_HAS_CHILDREN_FILES", request.param)


@pytest.mark.usefixtures("_kernel")
async def test_grandchildren_are_descendants(tmp_path: Path) -> None:
    """Parents come first; the root itself is none."""
    script = f"(sleep 1000 & echo $! >{tmp_path}/pid; wait) & wait"
    with subprocess.Popen(sh(script)) as process:  # noqa: ASYNC220 - nothing else runs here
        grandchild = await pid_from(tmp_path / "pid")
        try:
            pids = [stat.pid for stat in tree.descendants(process.pid)]
            assert pids[-1] == grandchild.pid
            assert process.pid not in pids
            assert process.pid in tree.own_children()
            assert tree.is_descendant(grandchild.pid, process.pid)
            assert tree.is_descendant(grandchild.pid, os.getpid())
            assert not tree.is_descendant(process.pid, process.pid)
            assert not tree.is_descendant(process.pid, grandchild.pid)
        finally:
            for stat in tree.descendants(process.pid):
                os.kill(stat.pid, 9)
            process.kill()


def test_nobody_has_no_descendants() -> None:
    """A pid without a process is no error."""
    with subprocess.Popen(["true"]) as process:
        pass
    assert tree.descendants(process.pid) == []
    assert tree.children(process.pid) == []
    assert not tree.is_descendant(process.pid, 1)
