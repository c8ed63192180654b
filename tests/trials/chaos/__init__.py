"""Chaos runs: `python -m tests.trials.chaos --rounds 300 --seed 7`."""
