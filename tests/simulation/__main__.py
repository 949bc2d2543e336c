"""`python -m tests.simulation --seed N [--schedules N] [--plant BUG] [--focus FAULT,...] [-v]`: runs schedules."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time

from tests.simulation.faults import FAULTS
from tests.simulation.invariants import Violation
from tests.simulation.plants import PLANTS
from tests.simulation.simulator import run_schedule, run_schedules
from tests.simulation.undisturbed import undisturbed


def main() -> int:
    """Run them; the first violation ends it, with the command that replays it."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the first schedule")
    parser.add_argument("--schedules", type=int, default=1, help="how many, by ascending seeds")
    parser.add_argument("--focus", default="", help=f"only these faults: {', '.join(FAULTS)}")
    parser.add_argument("--plant", choices=PLANTS, help="a bug to be found")
    parser.add_argument("-v", "--verbose", action="store_true", help="everything that happens")
    arguments = parser.parse_args()
    focus = tuple(filter(None, arguments.focus.split(",")))
    seeds = range(arguments.seed, arguments.seed + arguments.schedules)
    replay = f" --plant {arguments.plant}" if arguments.plant else ""
    began_s = time.process_time()
    try:
        with PLANTS[arguments.plant]() if arguments.plant else contextlib.nullcontext():
            if arguments.verbose:
                with undisturbed(is_loud=True):
                    for seed in seeds:
                        run_schedule(seed, focus, say=print, replay=replay)
            else:
                run_schedules(seeds, focus, replay=replay)
    except Violation as violation:
        print(violation, file=sys.stderr)
        return 1
    took_s = time.process_time() - began_s
    print(f"{len(seeds)} schedules in {took_s:.1f} s of processor time: {len(seeds) / took_s * 60:.0f} a minute")
    return 0


if __name__ == "__main__":
    sys.exit(main())
