"""Delta: what changed between two images of the same form, found, written as few bytes, and read back. Lossless for every type."""

from weightcast.delta.changes import Changes, Found, differing_by_numpy, find
from weightcast.delta.coding import Part, changes_of, decode, encode, parts_of
from weightcast.delta.form import Form, Kind, Stretch

__all__ = [
    "Changes",
    "Form",
    "Found",
    "Kind",
    "Part",
    "Stretch",
    "changes_of",
    "decode",
    "differing_by_numpy",
    "encode",
    "find",
    "parts_of",
]
