"""The plan: which bytes go where, and how a plan is carried out round after round. Both sides compile it and compare its digest before
the first byte moves."""

from weightcast.plan.compiling import compile_plan
from weightcast.plan.holdings import AnyLayout, Holdings, HoldingTable
from weightcast.plan.meeting import ranks_meet
from weightcast.plan.plan import (
    Copy,
    Run,
    as_run,
    copies_digest,
    landing_of,
    merge,
    narrowed,
    nbytes_of,
    parts_of,
    shared_landings,
    slices,
    split,
)
from weightcast.plan.table import CopyColumns, Plan

__all__ = [
    "AnyLayout",
    "Copy",
    "CopyColumns",
    "HoldingTable",
    "Holdings",
    "Plan",
    "Run",
    "as_run",
    "compile_plan",
    "copies_digest",
    "landing_of",
    "merge",
    "narrowed",
    "nbytes_of",
    "parts_of",
    "ranks_meet",
    "shared_landings",
    "slices",
    "split",
]
