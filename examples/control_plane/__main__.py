"""The command line: serves until SIGTERM or SIGINT, says where in one line of JSON on standard output.

Exit codes: 0 stopped as asked, 2 cannot serve (one line on standard error).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import re
import signal
import sys
from pathlib import Path

from control_plane.server import serve
from control_plane.settings import CannotServe, Settings
from control_plane.store.opening import is_url

EXIT_CANNOT_SERVE = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the plane; returns the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        asyncio.run(_serve(_settings(options), options.ready_file))
    except CannotServe as error:
        print(f"control_plane: {error}", file=sys.stderr)
        return EXIT_CANNOT_SERVE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m control_plane", description="The reference control plane.")
    parser.add_argument("--listen", default="127.0.0.1:8080", metavar="HOST:PORT", help="port 0 takes a free one")
    parser.add_argument(
        "--database",
        default="control-plane.db",
        metavar="FILE_OR_URL",
        help="SQLite file, made if missing (default: control-plane.db), or postgresql://USER@HOST/NAME, which any "
        "number of planes may share; its password is taken from PGPASSWORD or ~/.pgpass",
    )
    token = parser.add_mutually_exclusive_group(required=True)
    token.add_argument("--admin-token-file", type=Path, metavar="FILE", help="the operator's token, alone in a file")
    token.add_argument("--admin-token", metavar="TOKEN", help="the operator's token; others on this host can see it")
    parser.add_argument("--lease-ttl", type=float, default=60.0, metavar="SECONDS", help="default: 60")
    parser.add_argument("--uploads", type=Path, metavar="DIR", help="takes agents' files; made if missing")
    parser.add_argument("--public-url", metavar="URL", help="where agents reach it, if not where it listens")
    parser.add_argument("--compat", action="store_true", help="answer as deployed control planes do")
    parser.add_argument("--ready-file", type=Path, metavar="FILE", help="gets the line of JSON when the plane listens")
    parser.add_argument("--verbose", action="store_true", help="log refused calls too")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    host, _, port = options.listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise CannotServe(f"--listen {options.listen}: not HOST:PORT, such as 127.0.0.1:8080")
    if not 0 < options.lease_ttl <= 86400:
        raise CannotServe(f"--lease-ttl {options.lease_ttl:g}: must be more than 0 and at most 86400 seconds")
    if options.public_url is not None and not re.fullmatch(r"https?://[^\s/?#]+/?", options.public_url):
        raise CannotServe(f"--public-url {options.public_url}: not an address such as https://plane.example")
    return Settings(
        database=options.database if is_url(options.database) else Path(options.database),
        admin_token=options.admin_token or _read_token(options.admin_token_file),
        host=host.removeprefix("[").removesuffix("]"),
        port=int(port),
        lease_ttl_s=options.lease_ttl,
        uploads_dir=options.uploads,
        public_url=options.public_url,
        compat=options.compat,
    )


def _read_token(path: Path | None) -> str:
    if path is None:
        raise CannotServe("--admin-token is empty; give a token, or --admin-token-file")
    try:
        token = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CannotServe(f"--admin-token-file {path} cannot be read: {error}") from error
    if not token:
        raise CannotServe(f"--admin-token-file {path} is empty; put the operator's token into it")
    return token


async def _serve(settings: Settings, ready_file: Path | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serve(settings) as plane:
        line = json.dumps({"url": plane.url})
        if ready_file is not None:
            _write_whole(ready_file, line)
        print(line, flush=True)
        await stop.wait()


def _write_whole(path: Path, line: str) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        draft.write_text(f"{line}\n", "utf-8")
        draft.replace(path)
    except OSError as error:
        raise CannotServe(f"--ready-file {path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
