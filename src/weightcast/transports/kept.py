"""Kept: the buckets that a trainer rank sent last, so that the next round can send what changed since.

Pairs that send the same copies of one memory share their buckets: changes are found, and written as bytes, once a round, by whichever
pair comes first. A bucket says for which rounds it is right; a pair whose last round is another one gets all values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np

from weightcast.cpu import WORTH_NBYTES, comparison_for
from weightcast.delta import Form, Found, Kind, Part, Stretch, differing_by_numpy, encode, find
from weightcast.delta.changes import Differing
from weightcast.delta.form import UNSIGNED, Bytes
from weightcast.digest.formula import MASK
from weightcast.manifest import Manifest
from weightcast.manifest.dtypes import itemsize_of
from weightcast.plan import shared_landings
from weightcast.transports.buckets import Bucket
from weightcast.transports.counted import Counted, Sums, counted

FULL_EVERY = 10
"""Rounds in a row whose digests may come from what changed, before all values are read again."""


def shared_pieces(buckets: Sequence[Bucket]) -> list[set[int]]:
    """Of each of a part's buckets the pieces, by number, whose places other pieces of the part write, too."""
    shared, found, first = shared_landings([piece.copy for bucket in buckets for piece in bucket.pieces]), [], 0
    for bucket in buckets:
        found.append({number for number in range(len(bucket.pieces)) if first + number in shared})
        first += len(bucket.pieces)
    return found


def forms_of(buckets: Sequence[Bucket]) -> list[Form]:
    """The forms of a part's buckets, equal on both sides of a pair.

    Values that the worker casts, and those of landings that share bytes, are absolute: what is there may be no value that was sent.
    """
    forms = []
    for bucket, shared in zip(buckets, shared_pieces(buckets), strict=True):
        stretches = []
        for number, piece in enumerate(bucket.pieces):
            is_absolute = number in shared or piece.dtype != piece.copy.dst_dtype
            stretches.append(Stretch(piece.offset, piece.nbytes, Kind(itemsize_of(piece.dtype), is_absolute)))
        forms.append(Form(stretches, bucket.nbytes))
    return forms


class Change(NamedTuple):
    """What brings a bucket from what it was in any of the rounds from ``first`` to ``last`` to the present round.

    ``data`` is None where the changes are no shorter than the values; ``sums`` where nobody took digests.
    """

    first: int
    last: int
    data: bytes | None
    sums: Sums | None


class _Known(NamedTuple):
    """The digest of all values of a round, and how many rounds ago all of them were read for it."""

    number: int
    digest: int
    since: int = 0


class KeptBuckets:
    """The buckets of some pairs. Thread-safe: lanes of several pairs work on one bucket one after the other."""

    def __init__(self, buckets: Sequence[Bucket], forms: Sequence[Form], manifest: Manifest) -> None:
        # Loaded here, and not in a round.
        counts = counted(buckets, forms, manifest)
        kernel = comparison_for(sum(form.nbytes for form in forms) >= WORTH_NBYTES)
        differing = differing_by_numpy if kernel is None else kernel.differing
        each = counts if counts is not None else [None] * len(forms)
        self._buckets = [_KeptBucket(form, differing, one) for form, one in zip(forms, each, strict=True)]
        self._known: _Known | None = None

    def take(self, bucket: int, number: int, fresh: Callable[[], Sequence[Bytes]]) -> Change | None:
        """Have a bucket hold the values of round ``number``, and return the change that leads there, where there were values before.
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

    def learn(self, number: int, digest: int) -> None:
        """All values of round ``number`` were read, and this is their digest."""
        self._known = _Known(number, digest)

    @property
    def is_short(self) -> bool:
        """Whether the next round's digest may come from what changes; all values are read now and then."""
        return self._known is not None and self._known.since < FULL_EVERY

    def digest(self, number: int) -> int | None:
        """The digest of the values of round ``number``, which all buckets hold, from what changed since a round of which the digest is
        known; None where that cannot be told."""
        known = self._known
        if known is None or not self._buckets:
            return None
        changes = [bucket.changed(known.number, number) for bucket in self._buckets]
        if known.number == number:
            return known.digest
        if any(change is None for change in changes):
            return None
        digest = (known.digest + sum(change for change in changes if change)) & MASK
        self._known = _Known(number, digest, known.since + 1)
        return digest


class _KeptBucket:
    def __init__(self, form: Form, differing: Differing, counted: Counted | None) -> None:
        self._form, self._differing, self._counted = form, differing, counted
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

    def changed(self, base: int, number: int) -> int | None:
        """What was added to the digest from round ``base`` to round ``number``, where that is known."""
        with self._turn:
            change = self._change
            is_known = self._last == number and change is not None and change.first <= base <= change.last
            return change.sums.change if change is not None and is_known and change.sums is not None else None

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
            found, sums = self._find(image, values)
            self._change = Change(self._first, self._last, encode(self._form, found), sums)
            if found:
                self._first = number
        self._last = number
        self.image = image

    def _find(self, image: Bytes, values: Sequence[Bytes]) -> tuple[Sequence[Found | Part], Sums | None]:
        """What is new in the values, which the image has then."""
        if self._counted is None:
            found = find(self._form, image, values, self._differing)
            _write(image, found)
            return found, None
        parts: list[Found | Part] = []
        sums = Sums()
        for kind in self._form.kinds:
            if not kind.is_absolute:
                part, some = self._differences(self._counted, kind, image, values)
                parts += [part] if len(part.gaps) else []
                sums = sums.plus(some)
            else:
                found = find(self._form, image, values, self._differing, [kind])
                _write(image, found)
                parts += found
                sums = sums.plus(self._sums(self._counted, found))
        return parts, sums

    def _differences(self, counted: Counted, kind: Kind, image: Bytes, values: Sequence[Bytes]) -> tuple[Part, Sums]:
        stretches, of = counted.stretches(kind), self._form.of_kind[kind]
        olds = _address(image) + stretches.starts * kind.itemsize
        news = np.array([_address(values[number]) for number in of], np.int64)
        sums = np.zeros(2, np.int64)
        found = counted.kernels.found_in(olds, news, stretches, kind.itemsize, counted.weights, sums)
        before, after = sums.tolist()
        return Part(kind, *found), Sums(before, after, before)

    def _sums(self, counted: Counted, found: Sequence[Found]) -> Sums:
        """Digests of what is told as it is."""
        sums = Sums()
        for one in found:
            starts, ends = self._form.starts[one.kind], self._form.ends[one.kind]
            lows, highs = np.searchsorted(one.positions, starts), np.searchsorted(one.positions, ends)
            for at in np.flatnonzero(highs > lows).tolist():
                number, part = self._form.of_kind[one.kind][at], slice(int(lows[at]), int(highs[at]))
                elements = one.positions[part] - starts[at]
                before, after = (
                    counted.digest_of(number, elements, counted.landed(number, bits[part]))
                    for bits in (one.old, one.new)
                )
                sums = sums.plus(Sums(before, after))
        return sums


def _address(values: Bytes) -> int:
    return int(values.__array_interface__["data"][0])


def _write(image: Bytes, found: Sequence[Found]) -> None:
    for one in found:
        bits = UNSIGNED[one.kind.itemsize]
        image[: len(image) // one.kind.itemsize * one.kind.itemsize].view(bits)[one.positions] = one.new


class Kept:
    """All kept buckets of one trainer rank; those that no pair has any more are freed. Thread-safe."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._kept: WeakValueDictionary[Hashable, KeptBuckets] = WeakValueDictionary()
        self._of_content: WeakKeyDictionary[KeptBuckets, str] = WeakKeyDictionary()

    def buckets(self, key: Hashable, content: str, make: Callable[[], KeptBuckets]) -> KeptBuckets:
        """Those of pairs with this key, which share them while any of them lives. ``content`` names what all of them together hold, in
        whichever buckets."""
        with self._turn:
            found = self._kept.get(key)
            if found is None:
                found = self._kept[key] = make()
                self._of_content[found] = content
            return found

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all of them take."""
        with self._turn:
            return sum(buckets.nbytes for buckets in self._kept.values())

    def is_short(self, content: str) -> bool:
        """Whether the next round's digest of a content may come from what changes."""
        return any(buckets.is_short for buckets in self._with(content))

    def digest(self, content: str, number: int) -> int | None:
        """The digest of a content in round ``number``, from what changed; None where that cannot be told."""
        told = (buckets.digest(number) for buckets in self._with(content) if buckets.is_short)
        return next((digest for digest in told if digest is not None), None)

    def learn(self, content: str, number: int, digest: int) -> None:
        """All values of a content were read in round ``number``, and this is their digest."""
        for buckets in self._with(content):
            buckets.learn(number, digest)

    def _with(self, content: str) -> list[KeptBuckets]:
        with self._turn:
            return [buckets for buckets, named in self._of_content.items() if named == content]
