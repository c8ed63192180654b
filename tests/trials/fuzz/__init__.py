"""Fuzzing of what comes from the network: `python -m tests.trials.fuzz`, with atheris; tests try the same targets out."""
