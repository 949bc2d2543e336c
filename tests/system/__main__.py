"""`make test-system`: what only a real systemd can prove, in the test bed's throw-away virtual machine.

    python -m tests.system [placement | reboot | power-cut] [WORD ...]

WORDs choose checks by their names (see guest.py). The test bed is the program that REMOTEGPU_TESTBED names, or
../shared/testbed/testbed beside the repository. The guest has no network: packages are brought along, installed into a
folder on this side. Emulation is slow: a set takes ten minutes on 2 cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
GUEST: Final = Path(__file__).with_name("guest.py")
GUEST_PYTHON: Final = "3.11"
TIMEOUT_S: Final = 3000
POWER_CUT_TASKS_MIN: Final = 20
POWER_CUT_MARKER: Final = f"stored-{POWER_CUT_TASKS_MIN} "
DISK: Final = f"remotegpu-system-{os.getpid()}"


def find_testbed() -> Path:
    """The test bed's program. Raises SystemExit with what to do."""
    path = Path(os.environ.get("REMOTEGPU_TESTBED") or REPOSITORY.parent / "shared" / "testbed" / "testbed")
    if not path.is_file():
        raise SystemExit(f"there is no test bed at {path}: name its program in REMOTEGPU_TESTBED")
    return path


def bring_packages(library: Path, scratch: Path) -> None:
    """Install the project and the packages that it needs, as pinned, for the guest's Python."""
    pip = [sys.executable, "-m", "pip"]
    install = [*pip, "install", "--quiet", "--no-deps", "--only-binary=:all:", "--target", str(library)]
    install += ["--python-version", GUEST_PYTHON]
    pins = ["--require-hashes", "--requirement", str(REPOSITORY / "requirements" / "runtime.txt")]
    _call([*install, *pins])
    build = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(scratch)]
    _call([*pip, "wheel", *build, str(REPOSITORY)])
    _call([*install, "--upgrade", "--no-index", *map(str, scratch.glob("*.whl"))])


def run_in_guest(testbed: Path, library: Path, command: str, *options: str) -> int:
    """Run a command in a fresh guest; its exit status."""
    return subprocess.run(guest_argv(testbed, library, command, *options), check=False).returncode


def guest_argv(testbed: Path, library: Path, command: str, *options: str) -> list[str]:
    """The test bed's command line for a command in a guest with the packages."""
    copies = ["--copy", f"{library}:/opt/remotegpu", "--copy", f"{GUEST}:/root/guest.py"]
    return [str(testbed), "run", "--timeout", str(TIMEOUT_S), *copies, *options, "--", command]


def check_placement(testbed: Path, library: Path, words: list[str]) -> int:
    """Scopes, survival, limits, refusals."""
    return run_in_guest(testbed, library, " ".join(["python3 /root/guest.py placement", *words]))


def check_reboot(testbed: Path, library: Path, _words: list[str]) -> int:
    """A run is under way when the host goes down, in order or not; after the boot its end is known."""
    failures = 0
    for after, down in {
        "after-shutdown": "systemctl reboot",
        "after-crash": "systemctl reboot --force --force",
    }.items():
        before = f"python3 /root/guest.py before-reboot && sync && {down} && sleep 600"
        failures += run_in_guest(testbed, library, before, "--disk", DISK, "--fresh", "--allow-shutdown") != 0
        failures += run_in_guest(testbed, library, f"python3 /root/guest.py {after}", "--disk", DISK) != 0
    return failures


def check_power_cut(testbed: Path, library: Path, _words: list[str]) -> int:
    """The power goes while tasks are submitted, run and end; what had been answered by then is known afterwards."""
    cut = ["--power-cut-after-marker", POWER_CUT_MARKER, "--power-cut-delay", "1"]
    argv = guest_argv(testbed, library, "python3 /root/guest.py before-power-cut", "--disk", DISK, "--fresh", *cut)
    said = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False).stdout
    stored = [line.split()[1] for line in said.splitlines() if line.startswith("stored-")]
    print(f"{len(stored)} tasks had been answered for when the power was cut", flush=True)
    if len(stored) < POWER_CUT_TASKS_MIN:
        print(said)
        return 1
    with tempfile.NamedTemporaryFile("w", suffix=".notes") as notes:
        notes.write("\n".join(stored))
        notes.flush()
        copy = ("--copy", f"{notes.name}:/root/notes")
        return run_in_guest(testbed, library, "python3 /root/guest.py after-power-cut", "--disk", DISK, *copy)


SETS: Final = {"placement": check_placement, "reboot": check_reboot, "power-cut": check_power_cut}


def main() -> int:
    """Run the sets that are asked for, or all of them; 1 if one has failed."""
    wanted = [name for name in sys.argv[1:2] if name in SETS]
    words = sys.argv[1 + len(wanted) :]
    testbed = find_testbed()
    failed = []
    with tempfile.TemporaryDirectory() as directory:
        library, scratch = Path(directory, "library"), Path(directory, "wheels")
        bring_packages(library, scratch)
        for name in wanted or SETS:
            print(f"== {name}", flush=True)
            if SETS[name](testbed, library, words):
                failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


def _call(argv: list[str]) -> None:
    if subprocess.run(argv, check=False).returncode:
        raise SystemExit(f"failed: {' '.join(argv)}")


if __name__ == "__main__":
    sys.exit(main())
