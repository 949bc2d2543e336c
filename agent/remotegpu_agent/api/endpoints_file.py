"""`<state_dir>/endpoints.json`: where the API really listens, for whoever finds the agent by its state directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

from remotegpu_agent.api.settings import Endpoints

FILE_NAME: Final = "endpoints.json"


def write_endpoints(state_dir: Path, endpoints: Endpoints) -> None:
    """Write the file, mode 0600, whole or not at all. Raises OSError."""
    text = json.dumps(
        {"url": endpoints.url, "socket": str(endpoints.socket) if endpoints.socket else None, "pid": os.getpid()}
    )
    path = state_dir / FILE_NAME
    draft = path.with_name(FILE_NAME + ".new")
    draft.unlink(missing_ok=True)
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text + "\n")
        draft.rename(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
