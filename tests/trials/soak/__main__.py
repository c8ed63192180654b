"""python -m tests.trials.soak: a soak run; ends with status 1 when something grew."""

from __future__ import annotations

import argparse
import logging
import sys

from tests.trials.soak.run import Soak


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.trials.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--transport", default="shm")
    given = parser.parse_args()
    logging.getLogger("weightcast").setLevel(logging.ERROR)  # every injected failure warns
    found = Soak(transport=given.transport).run(given.rounds, lambda line: print(line, flush=True))
    print(found)
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
