"""Kernels on a CPU: a table of byte ranges is copied, digested, or both, or a box is digested, in one call without Python's lock.

Load-bearing: a block is read back from where it was just written, while it is in the first-level cache, so copy and digest
together take about as long as the copy. Ranges are addresses; the caller keeps the memory behind them alive. Sums wrap, as
int64 does in numba. The digest is that of weightcast.digest; compiled code is cached on disk beside this module, or where
NUMBA_CACHE_DIR says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from weightcast.digest.formula import B_SEED, BLOCK_WORDS, FOLD, SPLITMIX_GAMMA, SPLITMIX_MULTIPLIERS, WORD_NBYTES

_GAMMA, _SEED = np.uint64(SPLITMIX_GAMMA), np.uint64(B_SEED)
_FIRST, _SECOND = (np.uint64(multiplier) for multiplier in SPLITMIX_MULTIPLIERS)
_ONE, _30, _27, _31 = (np.uint64(number) for number in (1, 30, 27, 31))


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(typing: Any, address: Any) -> Any:
    """An address as a pointer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@njit(nogil=True, cache=True)
def _block_weight(block):  # type: ignore[no-untyped-def]
    z = (np.uint64(block) + _ONE) * _GAMMA + _SEED
    z = (z ^ (z >> _30)) * _FIRST
    z = (z ^ (z >> _27)) * _SECOND
    return np.int64((z ^ (z >> _31)) | _ONE)


@njit(nogil=True, cache=True)
def _last_word(address, nbytes):  # type: ignore[no-untyped-def]
    """The bytes behind the last whole word, as a word that zeros fill up."""
    tail = carray(_pointer(address), (nbytes,), np.uint8)
    word = np.uint64(0)
    for i in range(nbytes):
        word |= np.uint64(tail[i]) << np.uint64(8 * i)
    return np.int64(word)


@njit(nogil=True, cache=True)
def digest_ranges(addresses, positions, sizes, weights):  # type: ignore[no-untyped-def]
    """Digest of ranges: where each lies, its first word's number in the image, and its bytes. ``weights`` are word_weights."""
    total = np.int64(0)
    for i in range(len(addresses)):
        total += _one(addresses[i], addresses[i], positions[i], sizes[i], weights)
    return total


@njit(nogil=True, cache=True)
def copy_and_digest_ranges(sources, targets, positions, sizes, weights):  # type: ignore[no-untyped-def]
    """Copy ranges, none of which overlaps another, and return the digest of what then lies in the targets."""
    total = np.int64(0)
    for i in range(len(sources)):
        total += _one(sources[i], targets[i], positions[i], sizes[i], weights)
    return total


def load() -> None:
    """Have both kernels ready, compiled or out of the cache on disk, so that no round waits for that."""
    nothing = np.zeros(0, dtype=np.int64)
    digest_ranges(nothing, nothing, nothing, nothing)
    copy_and_digest_ranges(nothing, nothing, nothing, nothing, nothing)


def load_box() -> None:
    """Have the kernel for boxes ready."""
    one, nothing = np.ones(1, dtype=np.int64), np.zeros(BLOCK_WORDS, dtype=np.int64)
    digest_box(nothing.ctypes.data, 0, 1, one, one, one, nothing)


@njit(nogil=True, cache=True)
def _copy(read, written):  # type: ignore[no-untyped-def]
    for i in range(len(written)):
        written[i] = read[i]


@njit(nogil=True, cache=True)
def _weighted(words, weights):  # type: ignore[no-untyped-def]
    total = np.int64(0)
    for i in range(len(words)):
        total += weights[i] * (words[i] + FOLD * (words[i] >> 32))
    return total


@njit(nogil=True, cache=True)
def _one(source, target, position, nbytes, weights):  # type: ignore[no-untyped-def]
    # Loops are over whole slices: with an offset in the index numba would look whether it is negative, word by word.
    count, rest = nbytes // WORD_NBYTES, nbytes % WORD_NBYTES
    read = carray(_pointer(source), (count,), np.int64)
    words = carray(_pointer(target), (count,), np.int64)
    total, at = np.int64(0), 0
    while at < count:
        column = (position + at) % BLOCK_WORDS
        size = min(BLOCK_WORDS - column, count - at)
        if source != target:
            _copy(read[at : at + size], words[at : at + size])
        part = _weighted(words[at : at + size], weights[column : column + size])
        total += part * _block_weight((position + at) // BLOCK_WORDS)
        at += size
    if rest:
        end = count * WORD_NBYTES
        if source != target:
            _copy(carray(_pointer(source + end), (rest,), np.uint8), carray(_pointer(target + end), (rest,), np.uint8))
        word = _last_word(target + end, rest)
        weight = weights[(position + count) % BLOCK_WORDS] * _block_weight((position + count) // BLOCK_WORDS)
        total += (word + FOLD * (word >> 32)) * weight
    return total


@njit(nogil=True, cache=True)
def digest_box(address, position, itemsize, sizes, memory, image, weights):  # type: ignore[no-untyped-def]
    """Digest of the elements of a box, one by one: byte address and position in the image of the first one, sizes, and strides in
    elements in memory and in the image. No dimension is empty, and there is at least one."""
    last = len(sizes) - 1
    index = np.zeros(last, dtype=np.int64)
    step, stride, reach = memory[last], image[last] * itemsize, (sizes[last] - 1) * memory[last] + 1
    total = np.int64(0)
    while True:
        start = _pointer(address)
        if itemsize == 1:
            total += _elements(carray(start, (reach,), np.uint8), position, sizes[last], step, stride, weights)
        elif itemsize == 2:
            total += _elements(carray(start, (reach,), np.uint16), position, sizes[last], step, stride, weights)
        elif itemsize == 4:
            total += _elements(carray(start, (reach,), np.uint32), position, sizes[last], step, stride, weights)
        else:
            total += _elements(carray(start, (reach,), np.uint64), position, sizes[last], step, stride, weights)
        dim = last - 1
        while dim >= 0:
            index[dim] += 1
            address += memory[dim] * itemsize
            position += image[dim] * itemsize
            if index[dim] < sizes[dim]:
                break
            address -= memory[dim] * itemsize * sizes[dim]
            position -= image[dim] * itemsize * sizes[dim]
            index[dim] = 0
            dim -= 1
        if dim < 0:
            return total


@njit(nogil=True, cache=True)
def _elements(values, position, count, step, stride, weights):  # type: ignore[no-untyped-def]
    """Of one row: every ``step``-th value, each ``stride`` bytes further in the image."""
    total, block, weight = np.int64(0), np.int64(-1), np.int64(0)
    for i in range(count):
        at = position + i * stride
        word = np.int64(np.uint64(values[i * step]) << np.uint64(8 * (at % WORD_NBYTES)))
        number = at // WORD_NBYTES
        if number // BLOCK_WORDS != block:
            block = number // BLOCK_WORDS
            weight = _block_weight(block)
        total += (word + FOLD * (word >> 32)) * weights[number % BLOCK_WORDS] * weight
    return total
