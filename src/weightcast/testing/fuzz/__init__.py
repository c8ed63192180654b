"""Fuzzing of what comes from the network: `python -m weightcast.testing.fuzz`, with atheris; tests try the same targets out."""
