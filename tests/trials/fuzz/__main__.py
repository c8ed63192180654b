"""python -m tests.trials.fuzz: atheris on every target for a while; ends with status 1 for a finding."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.trials.fuzz.targets import TARGETS, seeds

STARTING_S = 300
"""Modules are instrumented while they are imported, which a busy machine may need minutes for."""


def main() -> int:
    """Parse the command line; run each target in a process of its own, as atheris ends the one it runs in."""
    parser = argparse.ArgumentParser(prog="python -m tests.trials.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated")
    parser.add_argument(
        "--found", type=Path, default=Path("fuzz-findings"), help="folder for inputs that broke something"
    )
    given = parser.parse_args()
    broken = [name for name in given.targets.split(",") if not _run(name, given.seconds, given.found)]
    print(f"findings in {', '.join(broken)}: see {given.found}" if broken else "no finding")
    return 1 if broken else 0


def _run(name: str, seconds: int, found: Path) -> bool:
    print(f"== {name}: {TARGETS[name].__doc__}", flush=True)
    with tempfile.TemporaryDirectory(prefix="weightcast-fuzz-") as corpus:
        for number, data in enumerate(seeds(name)):
            (Path(corpus) / f"seed-{number}").write_bytes(data)
        found.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "tests.trials.fuzz.one", name, corpus, f"-max_total_time={seconds}"]
        command += [f"-artifact_prefix={found}/{name}-", "-timeout=10", "-print_final_stats=1", "-verbosity=0"]
        try:
            done = subprocess.run(command, check=False, timeout=seconds + STARTING_S).returncode
        except subprocess.TimeoutExpired:
            print(f"{name} did not end: it hangs where libFuzzer's own limit does not reach", flush=True)
            return False
    if not any(found.iterdir()):
        found.rmdir()
    return done == 0


if __name__ == "__main__":
    sys.exit(main())
