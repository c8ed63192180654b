"""The digest (see digest) on a GPU: thousands of runs, and strided boxes, in one kernel launch each, at memory speed.

Load-bearing: tiles lie on block borders of the image, so a program needs 4,096 weights however long the run is. A run may
start and end at any byte, and lie at any byte of memory: words at its ends are read whole (an aligned word never leaves an
allocation) and masked to the run's bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import triton
import triton.language as tl

from weightcast.cuda.runs import INTERPRETED as _INTERPRETED
from weightcast.cuda.runs import Launch, TileTable
from weightcast.cuda.term import term
from weightcast.digest.formula import BLOCK_WORDS, MASK, WORD_NBYTES, word_weights
from weightcast.digest.regions import StridedBox
from weightcast.errors import Unsupported
from weightcast.layout import geometry as geo

TILE_BLOCKS = 4
TILE_NBYTES = TILE_BLOCKS * BLOCK_WORDS * WORD_NBYTES
CHUNK_WORDS = 1024
NUM_WARPS = 4
ELEMENTS_PER_PROGRAM = 16 * 1024
ELEMENT_CHUNK = 512
MIN_ROW_NBYTES = 512
"""Shorter rows of a strided box are digested element by element."""


class RunLike(Protocol):
    """Contiguous bytes of a storage that are contiguous in the image as well (digest.DigestRun)."""

    storage: int
    offset: int
    position: int
    nbytes: int


def digest_words(words: torch.Tensor, first: int) -> int:
    """Digest of contiguous int64 words on a GPU; ``first`` is the number of the first word in the image."""
    run = (words.data_ptr(), first * WORD_NBYTES, words.numel() * WORD_NBYTES)
    return AddressDigest([run], (), words.device).total()


class RunDigest:
    """The digest of many runs and boxes of GPU storages, compiled once; the caller keeps the storages alive.

    ``gpu`` does it all: for storages in page-locked host memory, which it can read.
    """

    def __init__(
        self,
        runs: Sequence[RunLike],
        storages: Sequence[torch.Tensor],
        boxes: Sequence[StridedBox] = (),
        gpu: torch.device | None = None,
    ) -> None:
        self._count = len(runs) + len(boxes)
        self._parts: list[tuple[list[int], AddressDigest]] = []
        numbers = [run.storage for run in runs] + [box.storage for box in boxes]
        where = [gpu or storages[number].device for number in numbers]
        for device in dict.fromkeys(where):
            if device.type == "cpu" and not _INTERPRETED:
                raise Unsupported("one digest over weights on a GPU and on the CPU", hint="Make one for each")
            numbers = [number for number, other in enumerate(where) if other == device]
            here = [
                (storages[run.storage].data_ptr() + run.offset, run.position, run.nbytes)
                for run, other in zip(runs, where, strict=False)
                if other == device
            ]
            there = [
                (storages[box.storage].data_ptr() + box.offset, box)
                for box, other in zip(boxes, where[len(runs) :], strict=True)
                if other == device
            ]
            self._parts.append((numbers, AddressDigest(here, there, device)))

    def total(self) -> int:
        """The digest of all runs and boxes, unsigned; waits for the GPU."""
        return self.start()()

    def start(self) -> Callable[[], int]:
        """Queue the work on each GPU's current stream; what is returned waits for it and gives ``total``."""
        started = [part.start() for _, part in self._parts]
        return lambda: sum(wait() for wait in started) & MASK

    def warm_up(self) -> None:
        """Compile and load what a digest needs, without reading what is digested."""
        for _, part in self._parts:
            part.warm_up()

    def each(self) -> list[int]:
        """The digest of every run, then of every box, in the order given; waits for the GPU."""
        values = [0] * self._count
        for numbers, part in self._parts:
            for number, value in zip(numbers, part.each(), strict=True):
                values[number] = value
        return values


class AddressDigest:
    """The digest of runs ``(address, position, nbytes)`` and of strided boxes with their addresses, on one device."""

    def __init__(
        self,
        runs: Iterable[tuple[int, int, int]],
        boxes: Sequence[tuple[int, StridedBox]],
        device: torch.device,
    ) -> None:
        self._device = device
        self._weights = word_weights(device)
        whole = torch.tensor(list(runs), dtype=torch.int64, device="cpu").reshape(-1, 3)
        self._count = whole.shape[0] + len(boxes)
        tables, owners = [whole], [torch.arange(whole.shape[0], dtype=torch.int64, device="cpu")]
        strided: list[tuple[int, int, StridedBox]] = []
        for number, (address, box) in enumerate(boxes, whole.shape[0]):
            rows = _rows_of(address, collapsed := collapse(box))
            if rows is None:
                strided.append((number, address, collapsed))
            else:
                tables.append(rows)
                owners.append(torch.full((rows.shape[0],), number, dtype=torch.int64, device="cpu"))
        table = torch.cat(tables)
        self._owners = torch.cat(owners).to(device)
        address_, position, nbytes = table.T.contiguous().unbind()
        end = position + nbytes
        count = torch.where(nbytes > 0, -(-end // TILE_NBYTES) - position // TILE_NBYTES, 0)
        origins = address_ - position
        self._tiles = TileTable(count, device)
        self._boxes = [_BoxTable(group, device) for group in _groups(strided)]
        num_programs = self._tiles.num_tiles + sum(group.tiles.num_tiles for group in self._boxes)
        self._partials = torch.zeros(num_programs, dtype=torch.int64, device=device)
        tiles = self._tiles
        runs_of_tiles = (origins, position, end, tiles.first_tiles, tiles.tile_runs)
        self._launches = [
            Launch(
                _digest_tiles,
                tiles.num_tiles,
                device,
                (*(column.to(device) for column in runs_of_tiles), self._weights, self._partials),
                ALIGNED=bool((origins % 16 == 0).all()),
                TILE=TILE_BLOCKS * BLOCK_WORDS,
                BLOCK=BLOCK_WORDS,
                CHUNK=CHUNK_WORDS,
                num_warps=NUM_WARPS,
            )
        ]
        at = tiles.num_tiles
        for group in self._boxes:
            self._launches.append(group.launch(self._weights, self._partials[at : at + group.tiles.num_tiles]))
            at += group.tiles.num_tiles

    def warm_up(self) -> None:
        """Compile and load what a digest needs, without reading what is digested."""
        for launch in self._launches:
            launch.warm_up()
        self._partials.sum()

    def total(self) -> int:
        """Unsigned; waits for the GPU. Bytes that are being written meanwhile give no defined value."""
        return self.start()()

    def start(self) -> Callable[[], int]:
        """Queue the work on the current stream; what is returned waits for it and gives ``total``."""
        self._launch()
        total = self._partials.sum()
        return lambda: int(total) & MASK

    def each(self) -> list[int]:
        """Of every run, then of every box, in the order given; waits for the GPU."""
        self._launch()
        sums = torch.zeros(self._count, dtype=torch.int64, device=self._device)
        at = self._tiles.num_tiles
        sums.index_add_(0, self._owners[self._tiles.tile_runs], self._partials[:at])
        for group in self._boxes:
            part = self._partials[at : at + group.tiles.num_tiles]
            sums.index_add_(0, group.numbers[group.tiles.tile_runs], part)
            at += group.tiles.num_tiles
        return [value & MASK for value in sums.tolist()]

    def _launch(self) -> None:
        for launch in self._launches:
            launch.run()


def collapse(box: StridedBox) -> StridedBox:
    """The same elements with dimensions of one element dropped and those merged that continue in memory and image."""
    sizes, (memory, image) = geo.collapse(box.sizes, box.memory_strides, box.image_strides)
    return box._replace(sizes=sizes, memory_strides=memory, image_strides=image)


def _rows_of(address: int, box: StridedBox) -> torch.Tensor | None:
    """The box as runs (address, position, nbytes) when its rows are contiguous at both ends and long enough."""
    if not box.sizes:
        return torch.tensor([[address, box.position, box.itemsize]], dtype=torch.int64, device="cpu")
    row_nbytes = box.sizes[-1] * box.itemsize
    if (box.memory_strides[-1], box.image_strides[-1]) != (1, 1) or row_nbytes < MIN_ROW_NBYTES:
        return None
    _, (memory, image) = geo.rows(box.sizes, box.memory_strides, box.image_strides)
    addresses, positions = address + memory * box.itemsize, box.position + image * box.itemsize
    return torch.stack([addresses, positions, torch.full_like(addresses, row_nbytes)], dim=1)


def _groups(boxes: Sequence[tuple[int, int, StridedBox]]) -> list[list[tuple[int, int, StridedBox]]]:
    """Boxes of one element size and number of dimensions go into one launch."""
    groups: dict[tuple[int, int], list[tuple[int, int, StridedBox]]] = {}
    for number, address, box in boxes:
        groups.setdefault((box.itemsize, len(box.sizes)), []).append((number, address, box))
    return list(groups.values())


class _BoxTable:
    """Per box: address, position, number of elements, sizes, strides in memory, strides in the image."""

    def __init__(self, boxes: Sequence[tuple[int, int, StridedBox]], device: torch.device) -> None:
        first = boxes[0][2]
        self._itemsize, self._dims = first.itemsize, len(first.sizes)
        rows = [
            (address, box.position, math.prod(box.sizes), *box.sizes, *box.memory_strides, *box.image_strides)
            for _, address, box in boxes
        ]
        numels = torch.tensor([row[2] for row in rows], dtype=torch.int64, device="cpu")
        if numels.max() >= 2**31:
            raise Unsupported("a strided tensor of 2**31 or more elements on a GPU", hint="Make it contiguous")
        self._table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(device)
        self.numbers = torch.tensor([number for number, _, _ in boxes], dtype=torch.int64, device="cpu").to(device)
        self.tiles = TileTable(-(-numels // ELEMENTS_PER_PROGRAM), device)

    def launch(self, weights: torch.Tensor, partials: torch.Tensor) -> Launch:
        """The kernel over these boxes."""
        return Launch(
            _digest_boxes,
            self.tiles.num_tiles,
            self.tiles.tile_runs.device,
            (self._table, self.tiles.first_tiles, self.tiles.tile_runs, weights, partials),
            ITEMSIZE=self._itemsize,
            DIMS=self._dims,
            TILE=ELEMENTS_PER_PROGRAM,
            BLOCK=BLOCK_WORDS,
            CHUNK=ELEMENT_CHUNK,
            num_warps=NUM_WARPS,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _digest_tiles(  # type: ignore[no-untyped-def]
    origins,
    starts,
    ends,
    first_tiles,
    tile_runs,
    weights,
    partials,
    ALIGNED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Program p: the part of one run that lies in one tile of the image. Addresses and positions in bytes."""
    pid = tl.program_id(0)
    run = tl.load(tile_runs + pid)
    origin = tl.load(origins + run)
    start = tl.load(starts + run)
    end = tl.load(ends + run)
    number = (pid - tl.load(first_tiles + run)).to(tl.int64)
    word0 = (start // (TILE * 8) + number) * TILE
    offsets = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], dtype=tl.int64)
    if (origin % 8 == 0) & (word0 * 8 >= start) & ((word0 + TILE) * 8 <= end):
        words = (origin + word0 * 8).to(tl.pointer_type(tl.int64))
        if ALIGNED:
            words = tl.multiple_of(words, 16)
        for column in tl.static_range(0, BLOCK, CHUNK):
            weight = tl.load(weights + column + offsets)
            for row in tl.static_range(0, TILE, BLOCK):
                word = tl.load(words + row + column + offsets)
                total += term(word, weight, (word0 + row) // BLOCK)
    else:
        shift = origin % 8
        low = tl.maximum(start // 8 - word0, 0) // CHUNK
        high = tl.minimum((end + 7) // 8 - word0, TILE)
        for chunk in range(low, tl.cdiv(high, CHUNK)):
            position = (word0 + chunk * CHUNK + offsets) * 8
            valid = (position + 8 > start) & (position < end)
            address = origin + position - shift
            here = valid & (address + 8 > origin + start) & (address < origin + end)
            next_ = valid & (shift > 0) & (address + 8 < origin + end)
            lower = tl.load(address.to(tl.pointer_type(tl.uint64)), mask=here, other=0)
            upper = tl.load((address + 8).to(tl.pointer_type(tl.uint64)), mask=next_, other=0)
            bits = (shift * 8).to(tl.uint64)
            # Two shifts: by 64 at once, as an aligned run would need, is undefined.
            bits = (lower >> bits) | ((upper << (56 - bits)) << 8)
            before = tl.minimum(tl.maximum(start - position, 0), 7).to(tl.uint64)
            after = 8 - tl.minimum(tl.maximum(end - position, 1), 8).to(tl.uint64)
            bits = ((bits >> (before * 8)) << (before * 8)) & (0xFFFFFFFFFFFFFFFF >> (after * 8))
            word = tl.where(valid, bits, 0).to(tl.int64, bitcast=True)
            column = (chunk * CHUNK) % BLOCK
            weight = tl.load(weights + column + offsets)
            total += term(word, weight, (word0 + chunk * CHUNK) // BLOCK)
    tl.store(partials + pid, tl.sum(total))


@triton.jit  # type: ignore[untyped-decorator]
def _digest_boxes(  # type: ignore[no-untyped-def]
    table,
    first_tiles,
    tile_runs,
    weights,
    partials,
    ITEMSIZE: tl.constexpr,
    DIMS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Program p: elements [TILE * t, TILE * (t + 1)) of one box, in row-major order."""
    pid = tl.program_id(0)
    box = tl.load(tile_runs + pid)
    row = table + box.to(tl.int64) * (3 + 3 * DIMS)
    address = tl.load(row)
    position = tl.load(row + 1)
    numel = tl.load(row + 2)
    first = (pid - tl.load(first_tiles + box)).to(tl.int64) * TILE
    offsets = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK], dtype=tl.int64)
    for at in range(0, tl.minimum(numel - first, TILE), CHUNK):
        index = (first + at + offsets).to(tl.uint32)
        mask = index < numel
        element = tl.zeros([CHUNK], dtype=tl.int64)
        place = tl.zeros([CHUNK], dtype=tl.int64)
        for d in tl.static_range(DIMS):
            dim = DIMS - 1 - d
            # 32 bits: a 64-bit division costs several times the rest of the loop.
            size = tl.load(row + 3 + dim).to(tl.uint32)
            step = (index % size).to(tl.int64)
            index = index // size
            element += step * tl.load(row + 3 + DIMS + dim)
            place += step * tl.load(row + 3 + 2 * DIMS + dim)
        if ITEMSIZE == 1:
            bits = tl.load((address + element).to(tl.pointer_type(tl.uint8)), mask=mask, other=0).to(tl.uint64)
        elif ITEMSIZE == 2:
            bits = tl.load((address + element * 2).to(tl.pointer_type(tl.uint16)), mask=mask, other=0).to(tl.uint64)
        elif ITEMSIZE == 4:
            bits = tl.load((address + element * 4).to(tl.pointer_type(tl.uint32)), mask=mask, other=0).to(tl.uint64)
        else:
            bits = tl.load((address + element * 8).to(tl.pointer_type(tl.uint64)), mask=mask, other=0)
        place = position + place * ITEMSIZE
        word = (bits << ((place % 8) * 8).to(tl.uint64)).to(tl.int64, bitcast=True)
        weight = tl.load(weights + (place // 8) % BLOCK, mask=mask, other=0)
        total += term(word, weight, place // 8 // BLOCK)
    tl.store(partials + pid, tl.sum(total))
