"""Changing: changes of an image are found, or brought to where its values landed, in one pass each, with the digests of what was there
before and what is there now. Without Python's lock. Needs numba.

Load-bearing: what an element is now is read back from memory, in a second loop over some thousand changes, so that the digest is of
what was written and not of what was to be written. Values lie at addresses; the caller keeps the memory behind them alive.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import carray, njit

from weightcast.cpu.kernels import _block_weight, _last_word, _pointer
from weightcast.digest.formula import BLOCK_WORDS, FOLD, WORD_NBYTES

Ints = npt.NDArray[np.int64]
_CHUNK_WORDS = 1024
_WORD_BITS = WORD_NBYTES.bit_length() - 1
_BLOCK_BITS = BLOCK_WORDS.bit_length() - 1
"""Divisions by powers of two are shifts: numba's round to negative infinity, and take longer than all else."""
_ESCAPE = 255
_COUNT, _GAPS, _VALUES, _LAST = range(4)


class Stretches(NamedTuple):
    """Values of one kind, a row for each stretch: the numbers of its first element and of one past its last, the byte of the digest's
    image where the first one counts, and sizes and strides, in elements, by dimension: there, and where the values landed."""

    starts: Ints
    ends: Ints
    images: Ints
    dims: Ints
    sizes: Ints
    image_strides: Ints
    target_strides: Ints


def load() -> None:
    """Have all kernels ready, compiled or out of the cache on disk."""
    none, table = np.zeros(0, np.int64), np.zeros((0, 1), np.int64)
    stretches = Stretches(none, none, none, none, table, table, table)
    weights, sums = np.zeros(BLOCK_WORDS, np.int64), np.zeros(2, np.int64)
    found_in(none, none, stretches, 2, weights, sums)
    read = np.zeros(1, np.uint8)
    is_inside(read[:0], none, read[:0], 0, stretches)
    apply(read[:0], none, read[:0], np.zeros(0, np.uint64), none, stretches, 2, weights, sums)
    digest_of(np.zeros(0, np.uint64), none, weights)


# -- finding


class Found(NamedTuple):
    """What differs, as numbers of a byte each and, where these are 255, wider ones behind: how many elements lie between one change and
    the one before, and the differences, folded."""

    gaps: npt.NDArray[np.uint8]
    wide_gaps: npt.NDArray[np.uint32]
    values: npt.NDArray[np.uint8]
    wide_values: npt.NDArray[np.uint64]


def found_in(olds: Ints, news: Ints, stretches: Stretches, itemsize: int, weights: Ints, sums: Ints) -> Found:
    """What differs between values at ``olds`` and at ``news``, which are then copied to ``olds``. The digests of what was there, and is
    there now, at all that differs, are added to ``sums``."""
    numel = int((stretches.ends - stretches.starts).sum())
    # As many as there can be: pages that are never written take no memory.
    found = Found(
        np.empty(numel, np.uint8), np.empty(numel, np.uint32), np.empty(numel, np.uint8), np.empty(numel, np.uint64)
    )
    state = np.array([0, 0, 0, -1], np.int64)
    _find(olds, news, *stretches[:-1], itemsize, weights, *found, state, sums)
    count, gaps, values = state[:_LAST].tolist()
    wide = found.wide_gaps[:gaps].copy(), found.wide_values[:values].copy()
    return Found(found.gaps[:count].copy(), wide[0], found.values[:count].copy(), wide[1])


@njit(nogil=True, cache=True)
def _find(  # type: ignore[no-untyped-def]
    olds, news, starts, ends, images, dims, sizes, strides, itemsize, weights, gaps, wide_gaps, values, wide_values, state, sums
):  # fmt: skip
    per_word = WORD_NBYTES // itemsize
    indices = np.empty(_CHUNK_WORDS * per_word, np.int64)
    last_was, last_now = np.empty(1, np.uint64), np.empty(1, np.uint64)
    for row in range(len(starts)):
        nbytes = (ends[row] - starts[row]) * itemsize
        words = nbytes // WORD_NBYTES
        was = carray(_pointer(olds[row]), (words,), np.uint64)
        now = carray(_pointer(news[row]), (words,), np.uint64)
        for low in range(0, words, _CHUNK_WORDS):
            high = min(words, low + _CHUNK_WORDS)
            count = _differing(was[low:high], now[low:high], itemsize, indices)
            if count:
                _note(
                    was[low:high], now[low:high], indices[:count], low * per_word, row, starts, images, dims, sizes, strides,
                    itemsize, weights, gaps, wide_gaps, values, wide_values, state, sums,
                )  # fmt: skip
                _renew(was[low:high], now[low:high], indices[:count], _word_of(per_word))
        tail, end = nbytes - words * WORD_NBYTES, words * WORD_NBYTES
        if tail:
            last_was[0] = np.uint64(_last_word(olds[row] + end, tail))
            last_now[0] = np.uint64(_last_word(news[row] + end, tail))
            count = _differing(last_was, last_now, itemsize, indices)
            if count:
                _note(
                    last_was, last_now, indices[:count], words * per_word, row, starts, images, dims, sizes, strides,
                    itemsize, weights, gaps, wide_gaps, values, wide_values, state, sums,
                )  # fmt: skip
                written = carray(_pointer(olds[row] + end), (tail,), np.uint8)
                read = carray(_pointer(news[row] + end), (tail,), np.uint8)
                for i in range(tail):
                    written[i] = read[i]


@njit(nogil=True, cache=True)
def _differing(was, now, itemsize, indices):  # type: ignore[no-untyped-def]
    per_word, bits = WORD_NBYTES // itemsize, np.uint64(8 * itemsize)
    mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - 8 * itemsize)
    count = 0
    for i in range(len(was)):
        difference = was[i] ^ now[i]
        if difference:
            for j in range(per_word):
                # Without a branch: which of a word's elements differ cannot be guessed.
                indices[count] = i * per_word + j
                count += (difference & mask) != 0
                difference = (difference >> (bits - np.uint64(1))) >> np.uint64(1)
    return count


@njit(nogil=True, cache=True)
def _renew(was, now, indices, shift):  # type: ignore[no-untyped-def]
    for k in range(len(indices)):
        word = np.uint64(indices[k]) >> shift
        was[word] = now[word]


@njit(nogil=True, cache=True)
def _word_of(per_word):  # type: ignore[no-untyped-def]
    """By how many bits the number of an element is shifted for that of its word."""
    return np.uint64((per_word > 1) + (per_word > 2) + (per_word > 4))


@njit(nogil=True, cache=True)
def _note(  # type: ignore[no-untyped-def]
    was, now, indices, first, row, starts, images, dims, sizes, strides, itemsize, weights, gaps, wide_gaps, values, wide_values,
    state, sums,
):  # fmt: skip
    bits, to_word = np.uint64(8 * itemsize), _word_of(WORD_NBYTES // itemsize)
    inside = (np.uint64(1) << to_word) - np.uint64(1)
    mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - 8 * itemsize)
    one, top = np.uint64(1), np.uint64(8 * itemsize - 1)
    count, num_gaps, num_values, last = state[_COUNT], state[_GAPS], state[_VALUES], state[_LAST]
    before, after, block, weight = np.int64(0), np.int64(0), np.int64(-1), np.int64(0)
    start, image, is_flat, stride = starts[row] + first, images[row], dims[row] == 1, strides[row, 0] * itemsize
    for k in range(len(indices)):
        index = np.uint64(indices[k])
        word, shift = index >> to_word, (index & inside) * bits
        old, new = (was[word] >> shift) & mask, (now[word] >> shift) & mask
        gap = start + indices[k] - last - 1
        last = start + indices[k]
        if gap < _ESCAPE:
            gaps[count] = gap
        else:
            gaps[count] = _ESCAPE
            wide_gaps[num_gaps] = gap
            num_gaps += 1
        difference = (new - old) & mask
        folded = ((difference << one) ^ (np.uint64(0) - (difference >> top))) & mask
        if folded < np.uint64(_ESCAPE):
            values[count] = folded
        else:
            values[count] = _ESCAPE
            wide_values[num_values] = folded
            num_values += 1
        count += 1
        if is_flat:
            at = image + (first + indices[k]) * stride
        else:
            at = image + _offset(first + indices[k], row, dims, sizes, strides) * itemsize
        if at >> (_WORD_BITS + _BLOCK_BITS) != block:
            block = at >> (_WORD_BITS + _BLOCK_BITS)
            weight = _block_weight(block)
        before += _term(old, at, weights) * weight
        after += _term(new, at, weights) * weight
    state[_COUNT], state[_GAPS], state[_VALUES], state[_LAST] = count, num_gaps, num_values, last
    sums[0] += before
    sums[1] += after


@njit(nogil=True, cache=True)
def _offset(element, row, dims, sizes, strides):  # type: ignore[no-untyped-def]
    """How far an element lies behind the first one, in elements; ``element`` counts row by row."""
    offset, rest = np.int64(0), np.uint64(element)
    for dim in range(dims[row] - 1, 0, -1):
        size = np.uint64(sizes[row, dim])
        offset += np.int64(rest % size) * strides[row, dim]
        rest //= size
    return offset + np.int64(rest) * strides[row, 0]


@njit(nogil=True, cache=True)
def _term(bits, at, weights):  # type: ignore[no-untyped-def]
    """What an element adds to the digest, but for its block's weight."""
    word = np.int64(bits << np.uint64(8 * (at & (WORD_NBYTES - 1))))
    return (word + FOLD * (word >> 32)) * weights[np.uint64(at >> _WORD_BITS) & np.uint64(BLOCK_WORDS - 1)]


# -- applying


def is_inside(
    gaps: npt.NDArray[np.uint8], wide_gaps: Ints, values: npt.NDArray[np.uint8], num_wide: int, stretches: Stretches
) -> bool:
    """Whether there are as many wide numbers as are said, and every change is of an element of a stretch."""
    return bool(_is_inside(_at(gaps), _at(values), len(gaps), wide_gaps, num_wide, stretches.starts, stretches.ends))


@njit(nogil=True, cache=True)
def _is_inside(gaps_at, values_at, count, wide_gaps, num_wide, starts, ends):  # type: ignore[no-untyped-def]
    gaps = carray(_pointer(gaps_at), (count,), np.uint8)
    values = carray(_pointer(values_at), (count,), np.uint8)
    last, row, wide = np.int64(-1), 0, 0
    for k in range(count):
        gap = np.int64(gaps[k])
        if gap == _ESCAPE:
            if wide == len(wide_gaps):
                return False
            gap = wide_gaps[wide]
            wide += 1
        last += gap + 1
        while row < len(ends) and last >= ends[row]:
            row += 1
        if row == len(ends) or last < starts[row]:
            return False
        num_wide -= values[k] == _ESCAPE
    return wide == len(wide_gaps) and num_wide == 0


def apply(
    gaps: npt.NDArray[np.uint8], wide_gaps: Ints, values: npt.NDArray[np.uint8], wide_values: npt.NDArray[np.uint64],
    targets: Ints, stretches: Stretches, itemsize: int, weights: Ints, sums: Ints,
) -> None:  # fmt: skip
    """Add differences, of which ``is_inside`` holds, to the values of stretches at the addresses ``targets``. The digests of what was
    there, and of what is read there afterwards, are added to ``sums``."""
    _apply(_at(gaps), _at(values), len(gaps), wide_gaps, wide_values, targets, *stretches, itemsize, weights, sums)


@njit(nogil=True, cache=True)
def _apply(  # type: ignore[no-untyped-def]
    gaps_at, values_at, count, wide_gaps, wide_values, targets, starts, ends, images, dims, sizes, image_strides, target_strides,
    itemsize, weights, sums,
):  # fmt: skip
    gaps = carray(_pointer(gaps_at), (count,), np.uint8)
    values = carray(_pointer(values_at), (count,), np.uint8)
    places, positions = np.empty(_CHUNK_WORDS, np.int64), np.empty(_CHUNK_WORDS, np.int64)
    last, row, end, wide_gap, wide_value = np.int64(-1), -1, np.int64(-1), 0, 0
    start, target, image, is_flat, step, stride = np.int64(0), np.int64(0), np.int64(0), True, np.int64(0), np.int64(0)
    one, mask = np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - 8 * itemsize)
    for low in range(0, count, _CHUNK_WORDS):
        high = min(count, low + _CHUNK_WORDS)
        for k in range(low, high):
            gap = np.int64(gaps[k])
            if gap == _ESCAPE:
                gap = wide_gaps[wide_gap]
                wide_gap += 1
            last += gap + 1
            if last >= end:
                while row < 0 or last >= ends[row]:
                    row += 1
                start, end, target, image = starts[row], ends[row], targets[row], images[row]
                is_flat = dims[row] == 1
                step, stride = target_strides[row, 0] * itemsize, image_strides[row, 0] * itemsize
            if is_flat:
                places[k - low] = target + (last - start) * step
                positions[k - low] = image + (last - start) * stride
            else:
                places[k - low] = target + _offset(last - start, row, dims, sizes, target_strides) * itemsize
                positions[k - low] = image + _offset(last - start, row, dims, sizes, image_strides) * itemsize
        sums[0] += _digest_at(places[: high - low], positions[: high - low], itemsize, weights)
        for k in range(low, high):
            folded = np.uint64(values[k])
            if folded == np.uint64(_ESCAPE):
                folded = wide_values[wide_value]
                wide_value += 1
            difference = (folded >> one) ^ (np.uint64(0) - (folded & one))
            _write(places[k - low], itemsize, (_read(places[k - low], itemsize) + difference) & mask)
        sums[1] += _digest_at(places[: high - low], positions[: high - low], itemsize, weights)


@njit(nogil=True, cache=True)
def _digest_at(places, positions, itemsize, weights):  # type: ignore[no-untyped-def]
    total, block, weight = np.int64(0), np.int64(-1), np.int64(0)
    for k in range(len(places)):
        at = positions[k]
        if at >> (_WORD_BITS + _BLOCK_BITS) != block:
            block = at >> (_WORD_BITS + _BLOCK_BITS)
            weight = _block_weight(block)
        total += _term(_read(places[k], itemsize), at, weights) * weight
    return total


@njit(nogil=True, cache=True)
def _read(address, itemsize):  # type: ignore[no-untyped-def]
    if itemsize == 2:
        return np.uint64(carray(_pointer(address), (1,), np.uint16)[0])
    if itemsize == 4:
        return np.uint64(carray(_pointer(address), (1,), np.uint32)[0])
    if itemsize == 1:
        return np.uint64(carray(_pointer(address), (1,), np.uint8)[0])
    return carray(_pointer(address), (1,), np.uint64)[0]


@njit(nogil=True, cache=True)
def _write(address, itemsize, bits):  # type: ignore[no-untyped-def]
    if itemsize == 2:
        carray(_pointer(address), (1,), np.uint16)[0] = np.uint16(bits)
    elif itemsize == 4:
        carray(_pointer(address), (1,), np.uint32)[0] = np.uint32(bits)
    elif itemsize == 1:
        carray(_pointer(address), (1,), np.uint8)[0] = np.uint8(bits)
    else:
        carray(_pointer(address), (1,), np.uint64)[0] = bits


def digest_of(bits: npt.NDArray[np.uint64], positions: Ints, weights: Ints) -> int:
    """The digest of elements with these bits, each at its byte of the image."""
    return int(_digest_of(bits, positions, weights))


@njit(nogil=True, cache=True)
def _digest_of(bits, positions, weights):  # type: ignore[no-untyped-def]
    total = np.int64(0)
    for k in range(len(bits)):
        block = positions[k] >> (_WORD_BITS + _BLOCK_BITS)
        total += _term(bits[k], positions[k], weights) * _block_weight(block)
    return total


def _at(values: npt.NDArray[np.uint8]) -> int:
    return int(values.__array_interface__["data"][0])
