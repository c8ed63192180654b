"""Told: a bucket's changes as they travel, with a digest of what was at their places before. Bytes of the wire are taken apart here."""

from __future__ import annotations

import struct
from typing import NamedTuple

from weightcast.digest.formula import MASK
from weightcast.errors import ProtocolError
from weightcast.transports.kept import Change

VALUES, CHANGES, CHECKED, WAITING = range(4)
"""What comes of a bucket: all values; changes; changes behind the digest of what they are told against, where these are differences;
nothing yet, of workers that feed each other."""
_BEFORE = struct.Struct("!Q")


class Told(NamedTuple):
    """Changes that came, and the digest that the places of differences had before, where it was told."""

    data: memoryview
    before: int | None = None

    @classmethod
    def of(cls, kind: int, data: bytes | bytearray | memoryview) -> Told:
        """What came as ``kind``. ProtocolError where it is too short."""
        given = memoryview(data)
        if kind != CHECKED:
            return cls(given)
        if len(given) < _BEFORE.size:
            raise ProtocolError("malformed changes: they end before they begin")
        return cls(given[_BEFORE.size :], _BEFORE.unpack(given[: _BEFORE.size])[0])


def told(change: Change | None, before: int, most: int) -> tuple[int, bytes] | None:
    """How a bucket travels to a worker that has what it was in round ``before``, in fewer than ``most`` bytes; None where all values
    have to go."""
    if change is None or change.data is None or not before or not change.first <= before <= change.last:
        return None
    if change.sums is None or len(change.data) + _BEFORE.size >= most:
        return CHANGES, change.data
    return CHECKED, _BEFORE.pack(change.sums.told & MASK) + change.data
