"""Changes: which elements of an image have other bits than before. One read of both; pure.

Eight bytes are compared at a time, and only what differs is looked at by elements: that NaN is not equal to itself, or that 0.0 and
-0.0 are equal, does not matter to bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from weightcast.delta.form import UNSIGNED, Bytes, Form, Kind

Positions = npt.NDArray[np.int64]
Bits = npt.NDArray[np.unsignedinteger[Any]]
Differing = Callable[[Bytes, Bytes, int], Positions]
_WORD_NBYTES = 8


class Found(NamedTuple):
    """What changed of one kind: positions in elements from the image's start, ascending, and the bits before and now."""

    kind: Kind
    positions: Positions
    old: Bits
    new: Bits


class Changes(NamedTuple):
    """What is read of one kind: ``values`` are differences to add, modulo the size of an element, or the bits themselves."""

    kind: Kind
    positions: Positions
    values: Bits


def differing_by_numpy(old: Bytes, new: Bytes, itemsize: int) -> Positions:
    """The numbers of the elements whose bits differ, ascending."""
    words = len(old) // _WORD_NBYTES
    end = words * _WORD_NBYTES
    differ = np.flatnonzero(old[:end].view(np.uint64) != new[:end].view(np.uint64))
    bits, per_word = UNSIGNED[itemsize], _WORD_NBYTES // itemsize
    if per_word > 1:
        old_words, new_words = old[:end].view(np.uint64)[differ], new[:end].view(np.uint64)[differ]
        inside = np.flatnonzero(old_words.view(bits) != new_words.view(bits))
        differ = differ[inside // per_word] * per_word + inside % per_word
    tail = np.flatnonzero(old[end:].view(bits) != new[end:].view(bits)) + end // itemsize
    return np.concatenate([differ, tail]) if len(tail) else differ


def find(
    form: Form,
    old: Bytes,
    new: Sequence[Bytes],
    differing: Differing = differing_by_numpy,
    kinds: Sequence[Kind] | None = None,
) -> list[Found]:
    """What is new in an image: ``old`` is all of it as it was, ``new`` has the bytes of each stretch. Kinds without a change are left out.
    ``differing`` does what ``differing_by_numpy`` does, as a kernel does it faster. ``kinds`` are those to look at, if not all."""
    found = []
    for kind in form.kinds if kinds is None else kinds:
        bits = UNSIGNED[kind.itemsize]
        parts: list[tuple[Positions, Bits, Bits]] = []
        for number in form.of_kind[kind]:
            stretch = form.stretches[number]
            before = old[stretch.offset : stretch.offset + stretch.nbytes]
            where = differing(before, new[number], kind.itemsize)
            if len(where):
                parts.append((where + stretch.start, before.view(bits)[where], new[number].view(bits)[where]))
        if parts:
            positions, was, now = (np.concatenate(column) for column in zip(*parts, strict=True))
            found.append(Found(kind, positions, was, now))
    return found
