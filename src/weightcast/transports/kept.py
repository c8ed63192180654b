"""Kept: the buckets that a trainer rank sent last, so that the next round can send what changed since.

Pairs that send the same copies of one memory share their buckets: changes are found, and written as bytes, once a round, by whichever
pair comes first. A bucket says for which rounds it is right; a pair whose last round is another one gets all values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple
from weakref import WeakValueDictionary

import numpy as np

from weightcast.cpu import WORTH_NBYTES, comparison_for
from weightcast.delta import Form, Found, Kind, Stretch, differing_by_numpy, encode, find
from weightcast.delta.changes import Differing
from weightcast.delta.form import UNSIGNED, Bytes
from weightcast.manifest.dtypes import itemsize_of
from weightcast.plan import shared_landings
from weightcast.transports.buckets import Bucket


def forms_of(buckets: Sequence[Bucket]) -> list[Form]:
    """The forms of a part's buckets, equal on both sides of a pair.

    Values that the worker casts, and those of landings that share bytes, are absolute: what is there may be no value that was sent.
    """
    shared = shared_landings([piece.copy for bucket in buckets for piece in bucket.pieces])
    forms, first = [], 0
    for bucket in buckets:
        stretches = []
        for number, piece in enumerate(bucket.pieces, start=first):
            is_absolute = number in shared or piece.dtype != piece.copy.dst_dtype
            stretches.append(Stretch(piece.offset, piece.nbytes, Kind(itemsize_of(piece.dtype), is_absolute)))
        forms.append(Form(stretches, bucket.nbytes))
        first += len(bucket.pieces)
    return forms


class Change(NamedTuple):
    """What brings a bucket from what it was in any of the rounds from ``first`` to ``last`` to the present round."""

    first: int
    last: int
    data: bytes


class KeptBuckets:
    """The buckets of some pairs. Thread-safe: lanes of several pairs work on one bucket one after the other."""

    def __init__(self, forms: Sequence[Form]) -> None:
        # Loaded here, and not in a round.
        kernel = comparison_for(sum(form.nbytes for form in forms) >= WORTH_NBYTES)
        differing = differing_by_numpy if kernel is None else kernel.differing
        self._buckets = [_KeptBucket(form, differing) for form in forms]

    def take(self, bucket: int, number: int, fresh: Callable[[], Sequence[Bytes]]) -> Change | None:
        """Have a bucket hold the values of round ``number``, and return the change that leads there, where it is worth sending.
        ``fresh`` gives the values of each stretch, and is called by the first pair that comes."""
        return self._buckets[bucket].take(number, fresh)

    def image(self, bucket: int) -> memoryview:
        """All bytes of a bucket that was taken."""
        image = self._buckets[bucket].image
        assert image is not None
        return image.data

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the buckets take."""
        return sum(bucket.nbytes for bucket in self._buckets)


class _KeptBucket:
    def __init__(self, form: Form, differing: Differing) -> None:
        self._form, self._differing = form, differing
        self._turn = threading.Lock()
        self.image: Bytes | None = None
        self._first = self._last = 0
        self._change: Change | None = None

    @property
    def nbytes(self) -> int:
        return self._form.nbytes if self.image is not None else 0

    def take(self, number: int, fresh: Callable[[], Sequence[Bytes]]) -> Change | None:
        with self._turn:
            if self._last != number:
                self._renew(number, fresh())
            return self._change

    def _renew(self, number: int, values: Sequence[Bytes]) -> None:
        # What an interrupt leaves half-way is no image of any round.
        image, self.image = self.image, None
        if image is None:
            image = np.zeros(self._form.nbytes, np.uint8)
            for stretch, value in zip(self._form.stretches, values, strict=True):
                image[stretch.offset : stretch.offset + stretch.nbytes] = value
            self._change = None
            self._first = number
        else:
            found = find(self._form, image, values, self._differing)
            data = encode(self._form, found)
            self._change = None if data is None else Change(self._first, self._last, data)
            if found:
                _write(image, found)
                self._first = number
        self._last = number
        self.image = image


def _write(image: Bytes, found: Sequence[Found]) -> None:
    for one in found:
        bits = UNSIGNED[one.kind.itemsize]
        image[: len(image) // one.kind.itemsize * one.kind.itemsize].view(bits)[one.positions] = one.new


class Kept:
    """All kept buckets of one trainer rank; those that no pair has any more are freed. Thread-safe."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._kept: WeakValueDictionary[Hashable, KeptBuckets] = WeakValueDictionary()

    def buckets(self, key: Hashable, forms: Sequence[Form]) -> KeptBuckets:
        """Those of pairs with this key, which share them while any of them lives."""
        with self._turn:
            found = self._kept.get(key)
            if found is None:
                found = self._kept[key] = KeptBuckets(forms)
            return found

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all of them take."""
        with self._turn:
            return sum(buckets.nbytes for buckets in self._kept.values())
