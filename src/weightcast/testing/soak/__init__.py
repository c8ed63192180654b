"""Soak runs: `python -m weightcast.testing.soak --rounds 2000`."""
