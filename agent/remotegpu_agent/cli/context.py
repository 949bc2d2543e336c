"""The options before the verb, and what every verb needs of its surroundings."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remotegpu_agent.cli.client import Client


@dataclass
class Globals:
    """The global options. `command` is what stands behind `--` of `submit -- CMD ARG...`."""

    config: Path | None = None
    is_json: bool = False
    is_plain: bool = False
    url: str | None = None
    token_file: Path | None = None
    command: list[str] | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def client(self) -> Client:
        """The agent that these options mean; connects to nothing yet. Raises Stop."""
        from remotegpu_agent.cli.client import Client
        from remotegpu_agent.cli.endpoints import find_endpoints

        return Client(find_endpoints(self.config, self.url, self.token_file, self.environ))


def say(message: str) -> None:
    """A message for people, on standard error: standard output is for results."""
    print(message, file=sys.stderr)
