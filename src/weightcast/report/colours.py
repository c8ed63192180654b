"""Colours of phases: the same phase has the same colour on every page and in the terminal, and none is red. Pure.

Red means failure everywhere, so that nobody has to learn which red is harmless.
"""

from __future__ import annotations

PHASE_COLOURS = {
    "gather": "#7b8794",
    "begin": "#17a2c4",
    "transfer": "#2f7de1",
    "verify": "#d99a00",
    "commit": "#1f9d61",
    "undo": "#9a744a",
    "pause": "#8b6be0",
    "apply": "#7d9f1f",
    "resume": "#c45fb6",
    "start": "#17a2c4",
    "finish": "#1f9d61",
}
"""The trainer's phases, those of an engine's commit, and those of vLLM's own routes; readable on white and on black."""

_COLOURS = tuple(dict.fromkeys(PHASE_COLOURS.values()))


def phase_colour(name: str) -> str:
    """The colour of a phase; one that this table does not know has one of the same colours, by its name alone."""
    return PHASE_COLOURS.get(name) or _COLOURS[sum(map(ord, name)) % len(_COLOURS)]
