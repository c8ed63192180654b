"""Digests: one 64-bit number per set of bytes that adds over shards and depends on every byte's place.

Every byte of the model has a position in the image (see manifest). The image is cut into 8-byte little-endian signed words
``W[k]`` and the digest is, modulo 2**64,

    sum over k of  b[k // 4096] * a[k % 4096] * (W[k] + 3 * (W[k] >> 32))          (arithmetic shift)

with odd 64-bit weights ``a`` and ``b`` from splitmix64. The term is linear in the elements of a word (each element of at
most 4 bytes lies in one half, an element of 8 bytes is a word), so digests of any disjoint regions add up to the digest
of the whole: shards prove the model without gathering it, and a zero byte, such as one in a gap, contributes nothing.
Folding the high half down keeps errors in the highest bits (sign bits) from cancelling each other: the factor 3 does so also
where both halves of a word change sign.

What it sees. Let a word's high half (signed) change by dH and its low half (unsigned) by dL; its term changes by an odd weight
times ``d = dH * (2**32 + 3) + dL``. Hence, always:

- One changed element of at most 4 bytes changes the digest, whatever else its word holds: it lies in one half.
- One changed word changes the digest but for two exceptions, as the fold is not injective: dH = 2**32 - 3 with dL = 9, dH =
  2**32 - 2 with dL = 6 - 2**32, and their opposites. As floats of any size one of the two words has a NaN.

Otherwise with a probability, for contents that do not depend on the weights: several changed words cancel with probability of
about 2**(t - 63), where 2**t is the largest power of two that divides every changed word's d. That is 2**-63 where lowest bits
change, as they do in other values of a trained weight, and 2**-30 in the worst case of changed bits alone: nothing but the signs
of 4-byte elements, always in both halves of words, from 0 to 1 in one and from 1 to 0 in the other. (Multilinear hashing: Carter
and Wegman 1979; Lemire and Kaser, "Strongly universal string hashing is fast", 2014.) It proves that nothing was lost, torn,
stale or misplaced; it is no defence against a forger.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from weightcast import geometry as geo
from weightcast.dtypes import dtype_of
from weightcast.layout import Layout, Placement
from weightcast.manifest import ALIGNMENT, Manifest
from weightcast.memory import Memory

if TYPE_CHECKING:
    from weightcast.cpu.digest import CpuDigest
    from weightcast.cuda.digest import RunDigest

BLOCK_WORDS = 4096
FOLD = 3
"""What the high half of a word counts when it is added to the word once more."""
WORD_NBYTES = 8
BLOCK_NBYTES = BLOCK_WORDS * WORD_NBYTES
CHUNK_NBYTES = 2**21
"""Bytes digested at a time on a CPU: the working set stays in the cache, and calls are few."""
SLICE_NBYTES = 2**26
"""Bytes digested on a CPU between two looks at whether it still has to be done."""

A_SEED = 0x5745494748544131
B_SEED = 0x5745494748544232
SPLITMIX_GAMMA = 0x9E3779B97F4A7C15
SPLITMIX_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 2**64 - 1
MAX_DIGITS = 15
"""Of a version's number; a longer one is a label that happens to look like it."""


def splitmix64(index: torch.Tensor, seed: int) -> torch.Tensor:
    """The index-th output of splitmix64 started at ``seed`` (Steele, Lea, Flood 2014), as int64 bit patterns."""
    z = (index + 1) * _signed(SPLITMIX_GAMMA) + _signed(seed)
    z = (z ^ _shift_right(z, 30)) * _signed(SPLITMIX_MULTIPLIERS[0])
    z = (z ^ _shift_right(z, 27)) * _signed(SPLITMIX_MULTIPLIERS[1])
    return z ^ _shift_right(z, 31)


def _signed(value: int) -> int:
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64 bit patterns."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


@cache
def word_weights(device: torch.device) -> torch.Tensor:
    """The weights ``a`` of the words of one block: odd int64, shape [BLOCK_WORDS]."""
    weights = splitmix64(torch.arange(BLOCK_WORDS, dtype=torch.int64, device=device), A_SEED) | 1
    if weights.is_cuda:
        # Other threads use them on streams of their own.
        torch.cuda.current_stream(device).synchronize()
    return weights


def block_weights(blocks: torch.Tensor) -> torch.Tensor:
    """The weights ``b`` of blocks by number: odd int64."""
    return splitmix64(blocks, B_SEED) | 1


def digest_bytes(data: torch.Tensor, position: int) -> int:
    """Digest of contiguous bytes (1-D uint8 tensor, any device) whose first lies at byte ``position`` of the image."""
    nbytes = data.numel()
    if nbytes == 0:
        return 0
    lead = -position % WORD_NBYTES
    if nbytes < lead + WORD_NBYTES or not _is_word(data[lead:]):
        return _digest_unaligned(data, position)
    tail = (nbytes - lead) % WORD_NBYTES
    if lead or tail:
        edges = _digest_unaligned(data[:lead], position)
        edges += _digest_unaligned(data[nbytes - tail :], position + nbytes - tail)
        return (edges + digest_bytes(data[lead : nbytes - tail], position + lead)) & _MASK
    if data.is_cuda:
        from weightcast.cuda.digest import digest_words

        return digest_words(data.view(torch.int64), position // WORD_NBYTES)
    return _digest_words(data.view(torch.int64), position // WORD_NBYTES)


def _is_word(data: torch.Tensor) -> bool:
    """Whether bytes can be seen as words where they lie."""
    return data.storage_offset() % WORD_NBYTES == 0 and data.data_ptr() % WORD_NBYTES == 0


def _digest_unaligned(data: torch.Tensor, position: int) -> int:
    """Zero bytes contribute nothing, so chunks are padded to whole words at both ends."""
    total, start = 0, 0
    lead = position % WORD_NBYTES
    while start < data.numel():
        take = min(data.numel() - start, CHUNK_NBYTES * 16 - lead)
        size = -(-(lead + take) // WORD_NBYTES) * WORD_NBYTES
        padded = torch.zeros(size, dtype=torch.uint8, device=data.device)
        padded[lead : lead + take] = data[start : start + take]
        total += digest_bytes(padded, position - lead)
        start += take
        position += take
        lead = position % WORD_NBYTES
    return total & _MASK


def _digest_words(words: torch.Tensor, first: int) -> int:
    """Digest of int64 words on a CPU; ``first`` is the number of the first word in the image."""
    start, count = 0, words.numel()
    total = torch.zeros((), dtype=torch.int64, device="cpu")
    column = first % BLOCK_WORDS
    if column:
        start = min(BLOCK_WORDS - column, count)
        total += _weighted_edge(words[:start], column, first // BLOCK_WORDS)
    body = (count - start) // BLOCK_WORDS
    tail = start + body * BLOCK_WORDS
    if body:
        total += _weighted_blocks(words[start:tail].view(body, BLOCK_WORDS), (first + start) // BLOCK_WORDS)
    if tail < count:
        total += _weighted_edge(words[tail:], 0, (first + tail) // BLOCK_WORDS)
    return int(total) & _MASK


def _weighted_edge(words: torch.Tensor, column: int, number: int) -> torch.Tensor:
    """Weighted sum of part of block ``number``, from its word ``column`` on."""
    folded = words.add(words >> 32, alpha=FOLD).mul_(word_weights(words.device)[column : column + words.numel()])
    return folded.sum() * block_weights(torch.tensor(number, dtype=torch.int64, device="cpu"))


def _weighted_blocks(blocks: torch.Tensor, number: int) -> torch.Tensor:
    """Weighted sum of whole consecutive blocks from ``number`` on."""
    weights = word_weights(blocks.device)
    rows = CHUNK_NBYTES // BLOCK_NBYTES
    scratch = torch.empty((min(rows, len(blocks)), BLOCK_WORDS), dtype=torch.int64, device="cpu")
    sums = torch.empty(len(blocks), dtype=torch.int64, device="cpu")
    for row in range(0, len(blocks), rows):
        chunk = blocks[row : row + rows]
        folded = scratch[: len(chunk)]
        torch.bitwise_right_shift(chunk, 32, out=folded)
        torch.add(chunk, folded, alpha=FOLD, out=folded)
        torch.sum(folded.mul_(weights), dim=1, out=sums[row : row + rows])
    numbers = torch.arange(number, number + len(blocks), dtype=torch.int64, device="cpu")
    return (sums * block_weights(numbers)).sum()


def digest_tensor(tensor: torch.Tensor, position: int = 0) -> int:
    """Digest of a whole tensor whose row-major bytes start at ``position``."""
    flat = tensor.detach().contiguous().reshape(-1)
    return digest_bytes(flat.view(torch.uint8), position)


class DigestRun:
    """Contiguous bytes of a memory that are contiguous in the image as well."""

    __slots__ = ("is_whole", "nbytes", "offset", "position", "storage")

    def __init__(self, storage: int, offset: int, position: int, nbytes: int, is_whole: bool = False) -> None:
        self.storage, self.offset, self.position, self.nbytes = storage, offset, position, nbytes
        self.is_whole = is_whole


class StridedBox(NamedTuple):
    """Elements of a box: storage and byte offset of the first, its byte position in the image, sizes, and strides (in
    elements) in memory and in the image."""

    storage: int
    offset: int
    position: int
    itemsize: int
    sizes: tuple[int, ...]
    memory_strides: tuple[int, ...]
    image_strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.sizes) * self.itemsize


def run_of(placement: Placement, manifest: Manifest) -> DigestRun | None:
    """The placement as one run, or None where it is not contiguous in memory and in the image."""
    spec = manifest[placement.region.name]
    sizes, itemsize = placement.region.sizes, dtype_of(placement.dtype).itemsize
    # Contiguous in the image: only the outermost dimension of more than one element may be cut.
    inner = next((d for d, size in enumerate(sizes) if size > 1), len(sizes))
    if sizes[inner + 1 :] != spec.shape[inner + 1 :]:
        return None
    if not geo.is_contiguous(sizes, placement.strides):
        return None
    start = geo.offset_of(placement.region.offsets, geo.contiguous_strides(spec.shape))
    position = manifest.positions[spec.name] + start * itemsize
    nbytes, is_whole = placement.region.numel * itemsize, placement.region.is_whole(spec)
    return DigestRun(placement.storage, placement.offset * itemsize, position, nbytes, is_whole)


class LayoutDigest:
    """The digest of what lies in a memory, compiled from a layout once.

    Runs that continue in memory and in the image are joined; ``gaps_are_zero`` also joins over the padding behind
    the whole tensors of an arena. Placements whose dtype is not the manifest's are counted at the positions of their own element size.
    """

    def __init__(self, manifest: Manifest, layout: Layout, *, gaps_are_zero: bool = False) -> None:
        self._manifest = manifest
        self._strided: list[Placement] = []
        runs: list[DigestRun] = []
        for placement in layout.placements:
            if placement.region.numel == 0:
                continue
            run = run_of(placement, manifest)
            if run is None:
                self._strided.append(placement)
            else:
                runs.append(run)
        self.runs = _join(runs, across_padding=gaps_are_zero)
        self._compiled: dict[int, CpuDigest | RunDigest] = {}
        self._compiling = threading.Lock()

    def of(self, memory: Memory, check: Callable[[], None] = lambda: None) -> int:
        """The digest, an unsigned 64-bit number; on a GPU this waits for the result. On a CPU ``check`` is called every few
        milliseconds and may raise."""
        return self.start(memory, check)()

    def start(self, memory: Memory, check: Callable[[], None] = lambda: None) -> Callable[[], int]:
        """``of`` in two steps: on a GPU the work is queued on the current stream, and the call that is returned, made once,
        waits for it; on a CPU that call does all of it. ``memory`` must keep its values until then."""
        from weightcast.cpu.digest import CpuDigest

        compiled = self._compiled_for(memory)
        return partial(compiled.total, check) if isinstance(compiled, CpuDigest) else compiled.start()

    def prepare(self, memory: Memory) -> None:
        """Do now what the first ``of`` of a memory would do beside computing: tables are built, kernels compiled and loaded. On a
        GPU some of it is queued on the current stream. May be called beside ``of``, on another thread."""
        self._compiled_for(memory).prepare()

    def forget(self) -> None:
        """Let go of all memories that were digested; the next ``of`` compiles anew."""
        with self._compiling:
            self._compiled.clear()

    def _compiled_for(self, memory: Memory) -> CpuDigest | RunDigest:
        with self._compiling:
            compiled = self._compiled.get(memory.number)
            if compiled is None:
                compiled = self._compile(memory)
                # Live parameters and their shadow take turns, so a few are kept.
                while len(self._compiled) >= 4:
                    del self._compiled[next(iter(self._compiled))]
                self._compiled[memory.number] = compiled
        return compiled

    def _compile(self, memory: Memory) -> CpuDigest | RunDigest:
        from weightcast.cpu.digest import CpuDigest

        boxes = [_box_of(placement, self._manifest) for placement in self._strided]
        if memory.gpu is None and not any(storage.is_cuda for storage in memory.storages):
            return CpuDigest(self.runs, boxes, memory)
        from weightcast.cuda.digest import RunDigest

        return RunDigest(self.runs, memory.storages, boxes, memory.gpu)


def _box_of(placement: Placement, manifest: Manifest) -> StridedBox:
    region, itemsize = placement.region, dtype_of(placement.dtype).itemsize
    strides = geo.contiguous_strides(manifest[region.name].shape)
    start = geo.offset_of(region.offsets, strides)
    return StridedBox(
        storage=placement.storage,
        offset=placement.offset * itemsize,
        position=manifest.positions[region.name] + start * itemsize,
        itemsize=itemsize,
        sizes=region.sizes,
        memory_strides=placement.strides,
        image_strides=strides,
    )


def _join(runs: Sequence[DigestRun], *, across_padding: bool) -> list[DigestRun]:
    # So near to the end of a tensor only the start of the next one is aligned.
    found = geo.joined(
        (
            geo.Run(
                (run.storage,),
                (run.offset, run.position),
                run.nbytes,
                ALIGNMENT - 1 if across_padding and run.is_whole else 0,
            )
            for run in runs
        ),
        alignment=ALIGNMENT,
    )
    return [DigestRun(storage, offset, position, nbytes) for (storage,), (offset, position), nbytes, _ in found]


def combine(digests: Iterable[int]) -> int:
    """The digest of disjoint parts taken together."""
    return sum(digests) & _MASK


def version_name(number: int, manifest: Manifest, digest: int) -> str:
    """``n-<12 hex>``: a version number and a name of its form and content."""
    content = hashlib.sha256(f"{manifest.digest}:{digest:016x}".encode()).hexdigest()
    return f"{number}-{content[:12]}"


def version_number(version: str) -> int:
    """The number in a version's name; 0 for a label that is none."""
    head = version.partition("-")[0]
    return int(head) if len(head) <= MAX_DIGITS and head.isascii() and head.isdigit() else 0
