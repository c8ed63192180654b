"""The plan: which bytes go where, and how a plan is carried out round after round."""

from weightcast.plan.plan import (
    Copy,
    Plan,
    Run,
    as_run,
    compile_plan,
    landing_of,
    merge,
    narrowed,
    nbytes_of,
    parts_of,
    plan_digest,
    shared_landings,
    slices,
    split,
)

__all__ = [
    "Copy",
    "Plan",
    "Run",
    "as_run",
    "compile_plan",
    "landing_of",
    "merge",
    "narrowed",
    "nbytes_of",
    "parts_of",
    "plan_digest",
    "shared_landings",
    "slices",
    "split",
]
