"""A PostgreSQL of the tests' own: made in a temporary directory, behind a Unix socket only, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final

import psutil

_DEBIAN: Final = Path("/usr/lib/postgresql")
"""Debian keeps the server's programs off the PATH, in a folder for each version."""
_PROGRAMS: Final = ("initdb", "pg_ctl", "postgres", "psql")
_USERS: Final = ("postgres", "nobody")
_USER: Final = "plane"
_TIMEOUT_S: Final = 60.0
_OPTIONS: Final = (
    "listen_addresses=",
    "fsync=off",
    "full_page_writes=off",
    "autovacuum=off",
    "max_connections=200",
    "shared_buffers=64MB",
)


@dataclass
class Postgres:
    """A server; it runs between `start` and `stop`, and may be started again."""

    programs: Path
    directory: Path
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    def url(self, name: str) -> str:
        """The URL of one of its databases."""
        return f"postgresql://{_USER}@/{name}?host={self.directory}"

    def make(self) -> None:
        """Make the empty cluster."""
        data = ("--pgdata", str(self.directory / "data"), "--username", _USER)
        self._run("initdb", *data, "--auth", "trust", "--no-sync", "--encoding", "UTF8", "--locale", "C")

    def start(self) -> None:
        """Returns when it takes connections."""
        options = " ".join(f"-c {option}" for option in (*_OPTIONS, f"unix_socket_directories={self.directory}"))
        self._control("start", "--wait", "--log", str(self.directory / "log"), "--options", options)

    def stop(self, mode: str = "fast") -> None:
        """Returns when it is gone; `immediate` is as a crash."""
        self._control("stop", "--wait", "--mode", mode)

    @contextlib.contextmanager
    def frozen(self) -> Generator[None]:
        """All of its processes stand still, as on a host that hangs; connections stay open."""
        main = psutil.Process(int((self.directory / "data" / "postmaster.pid").read_text().splitlines()[0]))
        processes = [main, *main.children()]
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    def new_database(self) -> str:
        """The URL of a new, empty database."""
        name = f"plane_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def execute(self, *statements: str, name: str = "postgres") -> str:
        """Run statements one by one; what they give, without decoration."""
        commands = [word for statement in statements for word in ("--command", statement)]
        options = ("--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set", "ON_ERROR_STOP=1")
        return self._run("psql", *options, *commands, self.url(name)).strip()

    def _control(self, verb: str, *options: str) -> None:
        self._run("pg_ctl", verb, "--silent", "--pgdata", str(self.directory / "data"), *options)

    def _run(self, program: str, *arguments: str) -> str:
        owner = self.directory.stat()
        is_root = os.geteuid() == 0  # whom initdb and postgres refuse
        # Into a file: the server keeps what pg_ctl gave it, and nobody would see the end of a pipe.
        with tempfile.TemporaryFile("w+") as said:
            done = subprocess.run(
                [str(self.programs / program), *arguments],
                cwd=self.directory,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                user=owner.st_uid if is_root else None,
                group=owner.st_gid if is_root else None,
                extra_groups=[] if is_root else None,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                timeout=_TIMEOUT_S,
                check=False,
            )
            said.seek(0)
            text = said.read()
        assert done.returncode == 0, f"{program} {' '.join(arguments)}: {text}"
        return text


@contextlib.contextmanager
def running_postgres() -> Generator[Postgres]:
    """A server for the time of a `with`."""
    with tempfile.TemporaryDirectory(prefix="remotegpu-postgres-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        if os.geteuid() == 0:
            user = _user()
            os.chown(directory, user.pw_uid, user.pw_gid)
        server = Postgres(find_programs(), directory)
        server.make()
        server.start()
        try:
            yield server
        finally:
            if (directory / "data" / "postmaster.pid").exists():
                server.stop("immediate")


def find_programs() -> Path:
    """The folder with the programs, of the newest version if there are several. Raises AssertionError."""
    versions = sorted(
        (folder for folder in _DEBIAN.glob("*/bin") if folder.parent.name.isdecimal()),
        key=lambda folder: int(folder.parent.name),
        reverse=True,
    )
    found = shutil.which("initdb")
    on_path = [Path(found).resolve().parent] if found else []
    for folder in (*on_path, *versions):
        if all((folder / program).exists() for program in _PROGRAMS):
            return folder
    raise AssertionError("the tests need PostgreSQL: run 'apt-get install postgresql' as root, then again")


def _user() -> pwd.struct_passwd:
    for name in _USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise AssertionError(f"there is no user to run PostgreSQL as: none of {', '.join(_USERS)}")
