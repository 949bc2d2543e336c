"""`run`: the daemon in the foreground."""

from __future__ import annotations

import os
from typing import Annotated

from remotegpu_agent.cli.arguments import Option
from remotegpu_agent.cli.context import Globals
from remotegpu_agent.cli.exits import Exit, Stop


def run(
    options: Globals,
    sets: Annotated[
        list[str] | None,
        Option("--set", metavar="SECTION.KEY=VALUE", text="A setting over file and environment; repeatable."),
    ] = None,
) -> int:
    """Run the agent in the foreground until SIGTERM or SIGINT.

    Tasks that run go on when it stops, and are adopted by the next one.

    Example: remotegpu-agent --config agent.yaml run --set log.level=debug
    """
    from remotegpu_agent import logging
    from remotegpu_agent.config import check_files, load_config
    from remotegpu_schemas.errors import Misconfigured

    try:
        config = load_config(options.config, os.environ, sets or [])
        problems = check_files(config)
        if problems:
            raise Misconfigured("\n".join(problems))
        logging.set_up(config.log.level, config.log.format)
        from remotegpu_agent import daemon

        return daemon.run(config)
    except Misconfigured as error:
        raise Stop(Exit.USAGE, str(error)) from None
