"""Compared: which elements of two byte images differ, in one read of both, without Python's lock. Needs numba."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import carray, njit

from weightcast.cpu.kernels import _pointer

_WORD_NBYTES = 8


def differing(old: npt.NDArray[np.uint8], new: npt.NDArray[np.uint8], itemsize: int) -> npt.NDArray[np.int64]:
    """The numbers of the elements whose bits differ, ascending. Both arrays are contiguous and of one length."""
    # As many as there can be, and one: pages that are never written take no memory.
    found = np.empty(len(old) // itemsize + 1, np.int64)
    count = _differing(old.ctypes.data, new.ctypes.data, len(old), itemsize, found)
    return found[:count].copy()


def load() -> None:
    """Have the kernel ready, compiled or out of the cache on disk."""
    differing(np.zeros(1, np.uint8), np.zeros(1, np.uint8), 1)


@njit(nogil=True, cache=True)
def _differing(old, new, nbytes, itemsize, found):  # type: ignore[no-untyped-def]
    words = nbytes // _WORD_NBYTES
    was = carray(_pointer(old), (words,), np.uint64)
    now = carray(_pointer(new), (words,), np.uint64)
    per_word, bits = _WORD_NBYTES // itemsize, np.uint64(8 * itemsize)
    mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - 8 * itemsize)
    count = 0
    for i in range(words):
        difference = was[i] ^ now[i]
        if difference:
            for j in range(per_word):
                # Without a branch: which of a word's elements differ cannot be guessed.
                found[count] = i * per_word + j
                count += (difference & mask) != 0
                difference = (difference >> (bits - np.uint64(1))) >> np.uint64(1)
    tail = nbytes - words * _WORD_NBYTES
    was_bytes = carray(_pointer(old + words * _WORD_NBYTES), (tail,), np.uint8)
    now_bytes = carray(_pointer(new + words * _WORD_NBYTES), (tail,), np.uint8)
    for j in range(tail // itemsize):
        for k in range(itemsize):
            if was_bytes[j * itemsize + k] != now_bytes[j * itemsize + k]:
                found[count] = words * per_word + j
                count += 1
                break
    return count
