"""`config`: what the agent would run with."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from remotegpu_agent.cli.context import globals_of
from remotegpu_agent.cli.exits import Exit, Stop

if TYPE_CHECKING:
    from remotegpu_agent.config import Loaded

app = typer.Typer(help="The agent's config.", no_args_is_help=True, rich_markup_mode=None)

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="A setting over file and environment; repeatable."),
]


@app.callback()
def _config() -> None:
    pass


@app.command("show")
def show(context: typer.Context, sets: Sets = None) -> None:
    """Show every setting and where it comes from: file and line, environment, flag or default.

    Example: remotegpu-agent config show --set log.level=debug
    """
    from remotegpu_agent.cli import output

    options = globals_of(context)
    loaded = _load(context, sets)
    values = _values(loaded)
    if options.is_json:
        output.print_json(values)
        return
    for section, keys in values.items():
        print(f"{section}:")
        for key, value in keys.items():
            origin = loaded.origins.get(f"{section}.{key}", "default")
            print(f"  {key}: {json.dumps(value, ensure_ascii=False)}  # {origin}")


@app.command("check")
def check(context: typer.Context, sets: Sets = None) -> None:
    """Check the config, and the files, directories and users that it names. Exit code 2 if something is wrong.

    Example: remotegpu-agent --config agent.yaml config check
    """
    from remotegpu_agent.cli.output import print_json
    from remotegpu_agent.config import DEFAULT_PATH, check_files

    options = globals_of(context)
    problems = check_files(_load(context, sets).config)
    if options.is_json:
        print_json({"problems": problems})
    if problems:
        raise Stop(Exit.USAGE, "\n".join(problems))
    path = options.config or DEFAULT_PATH
    if not options.is_json:
        print(f"{path}: good" if path.exists() else f"{path}: there is none; the defaults are good")


@app.command("path")
def path(context: typer.Context) -> None:
    """Print the path of the config file that is used.

    Example: remotegpu-agent config path
    """
    from remotegpu_agent.config import DEFAULT_PATH

    options = globals_of(context)
    used = options.config or DEFAULT_PATH
    if options.is_json:
        from remotegpu_agent.cli.output import print_json

        print_json({"path": str(used), "exists": used.exists()})
    else:
        print(used)


def _load(context: typer.Context, sets: list[str] | None) -> Loaded:
    from remotegpu_agent.config import read_config
    from remotegpu_schemas.errors import Misconfigured

    try:
        return read_config(globals_of(context).config, os.environ, sets or [])
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
