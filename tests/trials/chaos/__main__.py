"""python -m tests.trials.chaos: a chaos run; ends with status 1 when a promise was broken."""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
import tempfile
from pathlib import Path

from tests.trials.chaos.run import Chaos


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.trials.chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=None, help="decides everything; a fresh one is drawn and printed")
    parser.add_argument("--servers", type=int, default=2, help="weightcast serve processes")
    parser.add_argument("--engines", type=int, default=4, help="engines without a language model")
    parser.add_argument("--max-s", type=float, default=float("inf"), help="stop after so many seconds of rounds")
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("tests.trials.chaos").setLevel(logging.INFO if given.verbose else logging.WARNING)
    logging.getLogger("weightcast").addFilter(lambda record: given.verbose)
    seed = given.seed if given.seed is not None else secrets.randbelow(10**6)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="weightcast-chaos-") as folder:
        chaos = Chaos(Path(folder), seed=seed, num_servers=given.servers, num_engines=given.engines)
        summary = chaos.run(given.rounds, max_s=given.max_s)
    print(summary)
    return 1 if summary.faults else 0


if __name__ == "__main__":
    sys.exit(main())
