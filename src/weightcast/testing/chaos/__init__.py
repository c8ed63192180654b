"""Chaos runs: `python -m weightcast.testing.chaos --rounds 300 --seed 7`."""
