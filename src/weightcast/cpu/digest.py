"""The digest (see digest) on a CPU: runs where they lie, and boxes cut into rows. By kernels where there are some, else by torch.

Long rows that lie on words at both ends are runs for the kernels, which digest what is left of boxes element by element. Torch
copies boxes, some hundred kilobytes at a time, to whole words with zeros around them, which contribute nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from weightcast.cpu import kernels_for
from weightcast.digest.formula import (
    BLOCK_WORDS,
    FOLD,
    MASK,
    SLICE_NBYTES,
    WORD_NBYTES,
    block_weights,
    digest_by,
    digest_words,
    word_weights,
)
from weightcast.digest.regions import DigestRun, StridedBox
from weightcast.layout import geometry as geo
from weightcast.layout.memory import Memory

if TYPE_CHECKING:
    from weightcast.cpu.runs import Pieces, Table

RUN_NBYTES = 2**15
"""Torch takes about as long for one more run as for so many bytes."""
KERNEL_PART_NBYTES = 2**23
TORCH_PART_NBYTES = 2**18
"""Bytes of a box that are digested at a time; torch's part stays in the cache."""
MIN_ROW_NBYTES = 512
"""Entries of the kernels' table for shorter rows would take memory that is no small part of what they stand for."""
_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


class CpuDigest:
    """The digest of runs and boxes of a memory, compiled once; it keeps the memory alive.

    ``part_of_nbytes``: what is digested by turns with this, whose sum says whether kernels are worth loading.
    """

    def __init__(
        self, runs: Sequence[DigestRun], boxes: Sequence[StridedBox], memory: Memory, part_of_nbytes: int = 0
    ) -> None:
        self._memory = memory
        nbytes = max(sum(run.nbytes for run in runs) + sum(box.nbytes for box in boxes), part_of_nbytes)
        self._kernels = kernels_for(nbytes + len(runs) * RUN_NBYTES)
        self._addresses = memory.addresses
        self._runs = list(runs)
        self._boxes = [_simplest(box, in_memory=self._kernels is not None) for box in boxes]
        self._pieces = None if self._kernels is None else self._compile(self._kernels)

    def warm_up(self) -> None:
        """Everything was done when it was made."""

    def total(self, check: Callable[[], None]) -> int:
        """The digest of what lies there now, unsigned. ``check`` is called every few milliseconds and may raise."""
        total = self._pieces.run(check) if self._pieces is not None else 0
        for run in self._runs:
            data = self._memory.storages[run.storage][run.offset : run.offset + run.nbytes]
            for start in range(0, run.nbytes, SLICE_NBYTES):
                check()
                total += digest_by(digest_words, data[start : start + SLICE_NBYTES], run.position + start)
        if self._boxes:
            total += self._by_torch(check) if self._kernels is None else self._by_kernel(self._kernels, check)
        return total & MASK

    def _compile(self, kernels: ModuleType) -> Pieces:
        """What kernels can read where it lies, in long runs; all else stays in ``_runs`` and ``_boxes``."""
        from weightcast.cpu.runs import Pieces, is_on_words

        ranges: list[tuple[int, ...]] = []
        others: list[DigestRun] = []
        for run in self._runs:
            address = self._addresses[run.storage] + run.offset
            if is_on_words(address, run.position):
                ranges.append((address, run.position, run.nbytes))
            else:
                others.append(run)
        tables = [_table(self._addresses[box.storage] + box.offset, box) for box in self._boxes]
        self._runs = others
        self._boxes = [box for box, table in zip(self._boxes, tables, strict=True) if table is None]
        if self._boxes:
            kernels.load_box()
        return Pieces(ranges, kernels.digest_ranges, [table for table in tables if table is not None])

    def _by_kernel(self, kernels: ModuleType, check: Callable[[], None]) -> int:
        weights, num_threads = word_weights(torch.device("cpu")).numpy(), torch.get_num_threads()

        def digest(part: StridedBox) -> int:
            rows = [part.sizes, part.memory_strides, part.image_strides]
            table = torch.tensor(rows, dtype=torch.int64, device="cpu").numpy()
            address = self._addresses[part.storage] + part.offset
            return int(kernels.digest_box(address, part.position, part.itemsize, *table, weights))

        parts = (part for box in self._boxes for part in _parts(box, KERNEL_PART_NBYTES))
        total = 0
        with ThreadPoolExecutor(num_threads) as pool:
            while batch := list(itertools.islice(parts, num_threads)):
                check()
                total += sum(pool.map(digest, batch))
        return total

    def _by_torch(self, check: Callable[[], None]) -> int:
        total = 0
        for part in (part for box in self._boxes for part in _parts(box, TORCH_PART_NBYTES)):
            check()
            offset = part.offset // part.itemsize
            values = self._memory.view(part.storage, _INTEGERS[part.itemsize], offset, part.sizes, part.memory_strides)
            rows = geo.rows(part.sizes, geo.contiguous_strides(part.sizes), part.image_strides)
            copied = torch.empty(part.sizes, dtype=values.dtype, device="cpu").copy_(values)
            data = copied.reshape(len(rows.starts[1]), rows.length).view(torch.uint8)
            total += _digest_rows(data, part.position + rows.starts[1] * part.itemsize)
        return total


def _simplest(box: StridedBox, *, in_memory: bool) -> StridedBox:
    """The same elements in as few dimensions as can be, at least one. The order of elements does not
    matter to a digest: dimensions come by falling strides ``in_memory``, as kernels read, or in the image, where torch has
    longer rows then."""
    dims = list(zip(box.memory_strides, box.image_strides, box.sizes, strict=True))
    dims.sort(key=lambda dim: dim[0 if in_memory else 1], reverse=True)
    sizes, (memory, image) = geo.collapse(*([dim[at] for dim in dims] for at in (2, 0, 1)))
    return box._replace(sizes=sizes or (1,), memory_strides=memory or (1,), image_strides=image or (1,))


def _table(address: int, box: StridedBox) -> Table | None:
    """The box as ranges for the kernels, where it has long rows that lie on words."""
    from weightcast.cpu.runs import PIECE_NBYTES, is_on_words

    nbytes = box.sizes[-1] * box.itemsize
    outer = [stride * box.itemsize for place in (box.memory_strides, box.image_strides) for stride in place[:-1]]
    if (box.memory_strides[-1], box.image_strides[-1]) != (1, 1) or not MIN_ROW_NBYTES <= nbytes <= PIECE_NBYTES:
        return None
    if not is_on_words(address, box.position, *outer):
        return None
    _, (memory, image) = geo.rows(box.sizes, box.memory_strides, box.image_strides)
    columns = (address + memory * box.itemsize, box.position + image * box.itemsize, torch.full_like(memory, nbytes))
    return tuple(column.numpy() for column in columns)


def _parts(box: StridedBox, max_nbytes: int) -> Iterator[StridedBox]:
    """The box cut along its outer dimensions into parts of so many bytes at most, or single elements."""
    if box.nbytes <= max_nbytes or len(box.sizes) == 1 == box.sizes[0]:
        yield box
        return
    step = max(1, max_nbytes // (box.itemsize * math.prod(box.sizes[1:])))
    for start in range(0, box.sizes[0], step):
        size = min(step, box.sizes[0] - start)
        part = box._replace(
            offset=box.offset + start * box.memory_strides[0] * box.itemsize,
            position=box.position + start * box.image_strides[0] * box.itemsize,
            sizes=(size, *box.sizes[1:]),
        )
        if size > 1 or len(box.sizes) == 1:
            yield part
        else:
            inner = (part.sizes[1:], part.memory_strides[1:], part.image_strides[1:])
            yield from _parts(
                part._replace(sizes=inner[0], memory_strides=inner[1], image_strides=inner[2]), max_nbytes
            )


def _digest_rows(rows: torch.Tensor, positions: torch.Tensor) -> int:
    """Digest of rows of bytes (2-D, contiguous), each with its position in the image."""
    total, nbytes = 0, rows.shape[1]
    leads = positions % WORD_NBYTES
    for lead in range(WORD_NBYTES):
        here = leads == lead
        if not here.any():
            continue
        width = -(-(lead + nbytes) // WORD_NBYTES) * WORD_NBYTES
        padded = torch.zeros((int(here.sum()), width), dtype=torch.uint8, device="cpu")
        padded[:, lead : lead + nbytes] = rows if here.all() else rows[here]
        total += _digest_words(padded.view(torch.int64), (positions[here] - lead) // WORD_NBYTES)
    return total


def _digest_words(words: torch.Tensor, firsts: torch.Tensor) -> int:
    """Digest of rows of words; ``firsts`` are the numbers of their first words in the image."""
    count = words.shape[1]
    columns, blocks = firsts % BLOCK_WORDS, firsts // BLOCK_WORDS
    weights = word_weights(words.device).repeat(-(-count // BLOCK_WORDS) + 1).unfold(0, count, 1)[columns]
    terms = words.add(words >> 32, alpha=FOLD).mul_(weights)
    # A row is cut where blocks begin; sums up to there differ by the sums of its parts.
    num_parts = (int(columns.max()) + count - 1) // BLOCK_WORDS + 1
    numbers = torch.arange(num_parts + 1, dtype=torch.int64, device="cpu")
    cuts = (numbers * BLOCK_WORDS - columns[:, None]).clamp(0, count)
    sums = torch.zeros((len(words), count + 1), dtype=torch.int64, device="cpu")
    torch.cumsum(terms, 1, out=sums[:, 1:])
    parts = sums.gather(1, cuts).diff(dim=1)
    return int((parts * block_weights(blocks[:, None] + numbers[:-1])).sum())
