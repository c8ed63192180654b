"""Soak runs: `python -m tests.trials.soak --rounds 2000`."""
