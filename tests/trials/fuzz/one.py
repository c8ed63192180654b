"""python -m tests.trials.fuzz.one TARGET CORPUS [libFuzzer options]: one target under atheris, until its time is over."""

from __future__ import annotations

import sys


def main() -> None:
    """Imports under instrumentation, so that atheris sees which branches an input takes."""
    import atheris

    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["weightcast"]):
        from tests.trials.fuzz.targets import TARGETS, timed
    atheris.Setup(sys.argv, timed(TARGETS[name]))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
