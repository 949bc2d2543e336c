"""`config`: what the agent would run with."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

from remotegpu_agent.cli.arguments import Option
from remotegpu_agent.cli.context import Globals
from remotegpu_agent.cli.exits import Exit, Stop

if TYPE_CHECKING:
    from remotegpu_agent.config import Loaded

Sets = Annotated[
    list[str] | None,
    Option("--set", metavar="SECTION.KEY=VALUE", text="A setting over file and environment; repeatable."),
]


def show(options: Globals, sets: Sets = None) -> None:
    """Show every setting and where it comes from: file and line, environment, flag or default.

    Example: remotegpu-agent config show --set log.level=debug
    """
    from remotegpu_agent.cli import output

    loaded = _load(options, sets)
    values = _values(loaded)
    if options.is_json:
        output.print_json(values)
        return
    for section, keys in values.items():
        print(f"{section}:")
        for key, value in keys.items():
            origin = loaded.origins.get(f"{section}.{key}", "default")
            print(f"  {key}: {json.dumps(value, ensure_ascii=False)}  # {origin}")


def check(options: Globals, sets: Sets = None) -> None:
    """Check the config, and the files, directories and users that it names. Exit code 2 if something is wrong.

    Example: remotegpu-agent --config agent.yaml config check
    """
    from remotegpu_agent.cli.output import print_json
    from remotegpu_agent.config import DEFAULT_PATH, check_files

    problems = check_files(_load(options, sets).config)
    if options.is_json:
        print_json({"problems": problems})
    if problems:
        raise Stop(Exit.USAGE, "\n".join(problems))
    path = options.config or DEFAULT_PATH
    if not options.is_json:
        print(f"{path}: good" if os.path.exists(path) else f"{path}: there is none; the defaults are good")


def path(options: Globals) -> None:
    """Print the path of the config file that is used.

    Example: remotegpu-agent config path
    """
    from remotegpu_agent.config import DEFAULT_PATH

    used = options.config or DEFAULT_PATH
    if options.is_json:
        from remotegpu_agent.cli.output import print_json

        print_json({"path": str(used), "exists": os.path.exists(used)})
    else:
        print(used)


def _load(options: Globals, sets: list[str] | None) -> Loaded:
    from remotegpu_agent.config import read_config
    from remotegpu_schemas.errors import Misconfigured

    try:
        return read_config(options.config, os.environ, sets or [])
    except Misconfigured as error:
        raise Stop(Exit.USAGE, str(error)) from None


def _values(loaded: Loaded) -> dict[str, dict[str, Any]]:
    """Every setting as plain data; the values of tasks' variables may be secrets and stay out."""
    values: dict[str, dict[str, Any]] = loaded.config.model_dump(mode="json")
    values["tasks"]["env"] = dict.fromkeys(values["tasks"]["env"], "[hidden]")
    for key in ("max_concurrent", "cpus", "memory_gb"):
        if values["capacity"][key] is None:
            values["capacity"][key] = "auto"
    return values
