"""Runs on a CPU: byte ranges as one table, cut into pieces that torch's number of threads work on side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from weightcast.digest.formula import MASK, SLICE_NBYTES, WORD_NBYTES, word_weights

PIECE_NBYTES = 2**20
Table = tuple[npt.NDArray[np.int64], ...]
"""Ranges as columns."""


class Pieces:
    """Ranges ``(address..., position in the image, bytes)`` cut into pieces; positions are multiples of a word.

    ``kernel`` is called with one column for each entry (positions counted in words) and the word weights.
    """

    def __init__(
        self, ranges: Iterable[tuple[int, ...]], kernel: Callable[..., int], tables: Sequence[Table] = ()
    ) -> None:
        """``tables`` are more ranges, as columns; none is longer than a piece."""
        self._kernel = kernel
        self._weights = word_weights(torch.device("cpu")).numpy()
        rows = [row for given in ranges for row in _cut(given)]
        columns = [tuple(np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))] if rows else []
        self._columns = [np.concatenate(column) for column in zip(*columns, *tables, strict=True)]
        self._ends = np.zeros(0, dtype=np.int64)
        if self._columns:
            self._columns[-2] //= WORD_NBYTES
            self._ends = np.cumsum(self._columns[-1])

    def run(self, check: Callable[[], None] = lambda: None) -> int:
        """Work on all pieces and return the sum of what the kernel says, unsigned. ``check`` is called before each slice and may
        raise."""
        num_threads, total = torch.get_num_threads(), 0
        if num_threads == 1 or len(self._ends) <= 1:
            for start, end in self._slices(SLICE_NBYTES):
                check()
                total += self._part(start, end)
            return total & MASK
        with ThreadPoolExecutor(num_threads) as pool:
            for start, end in self._slices(SLICE_NBYTES * num_threads):
                check()
                parts = [part for part in np.array_split(np.arange(start, end), num_threads) if len(part)]
                total += sum(pool.map(lambda part: self._part(int(part[0]), int(part[-1]) + 1), parts))
        return total & MASK

    def _slices(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """The pieces, in order, in slices of about so many bytes: the first one's number, and that of the one behind the last."""
        start = 0
        while start < len(self._ends):
            done = int(self._ends[start - 1]) if start else 0
            end = max(start + 1, int(np.searchsorted(self._ends, done + nbytes, side="right")))
            yield start, end
            start = end

    def _part(self, start: int, end: int) -> int:
        return int(self._kernel(*(column[start:end] for column in self._columns), self._weights))


def _cut(row: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """The same range in pieces that end at multiples of PIECE_NBYTES in the image, as far as its blocks are concerned."""
    *addresses, position, nbytes = row
    start = 0
    while start < nbytes:
        take = min(nbytes - start, PIECE_NBYTES - (position + start) % PIECE_NBYTES)
        yield (*(address + start for address in addresses), position + start, take)
        start += take


def is_on_words(*numbers: int) -> bool:
    """Whether addresses and positions are all multiples of a word."""
    return all(number % WORD_NBYTES == 0 for number in numbers)
