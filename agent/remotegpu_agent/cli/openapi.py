"""`openapi`: the description of the API, without a running agent."""

from __future__ import annotations

import sys

from remotegpu_agent.cli.context import Globals


def openapi(_options: Globals) -> None:
    """Print the description of this version's HTTP API: OpenAPI 3.1, as JSON.

    Example: remotegpu-agent openapi >openapi.json
    """
    from remotegpu_agent.api.openapi import text
    from remotegpu_agent.api.routes import ROUTES

    sys.stdout.write(text(ROUTES))
