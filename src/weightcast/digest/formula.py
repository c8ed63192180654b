"""The formula of the digest: one 64-bit number per set of bytes that adds over shards and depends on every byte's place. Pure.

Every byte of the model has a position in the image (see manifest.manifest). The image is cut into 8-byte little-endian signed words
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

from collections.abc import Callable, Iterable
from functools import cache

import torch

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
MASK = 2**64 - 1
"""Digests are sums modulo 2**64."""
OfWords = Callable[[torch.Tensor, int], int]


def splitmix64(index: torch.Tensor, seed: int) -> torch.Tensor:
    """The index-th output of splitmix64 started at ``seed`` (Steele, Lea, Flood 2014), as int64 bit patterns."""
    z = (index + 1) * _signed(SPLITMIX_GAMMA) + _signed(seed)
    z = (z ^ _shift_right(z, 30)) * _signed(SPLITMIX_MULTIPLIERS[0])
    z = (z ^ _shift_right(z, 27)) * _signed(SPLITMIX_MULTIPLIERS[1])
    return z ^ _shift_right(z, 31)


def _signed(value: int) -> int:
    value &= MASK
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


def digest_by(of_words: OfWords, data: torch.Tensor, position: int) -> int:
    """Digest of contiguous bytes (1-D uint8 tensor) whose first lies at byte ``position`` of the image; ``of_words`` digests words
    on the tensor's device, given the number of the first of them in the image."""
    nbytes = data.numel()
    if nbytes == 0:
        return 0
    lead = -position % WORD_NBYTES
    if nbytes < lead + WORD_NBYTES or not _is_word(data[lead:]):
        return _unaligned(of_words, data, position)
    tail = (nbytes - lead) % WORD_NBYTES
    if lead or tail:
        edges = _unaligned(of_words, data[:lead], position)
        edges += _unaligned(of_words, data[nbytes - tail :], position + nbytes - tail)
        return (edges + digest_by(of_words, data[lead : nbytes - tail], position + lead)) & MASK
    return of_words(data.view(torch.int64), position // WORD_NBYTES)


def _is_word(data: torch.Tensor) -> bool:
    """Whether bytes can be seen as words where they lie."""
    return data.storage_offset() % WORD_NBYTES == 0 and data.data_ptr() % WORD_NBYTES == 0


def _unaligned(of_words: OfWords, data: torch.Tensor, position: int) -> int:
    """Zero bytes contribute nothing, so chunks are padded to whole words at both ends."""
    total, start = 0, 0
    lead = position % WORD_NBYTES
    while start < data.numel():
        take = min(data.numel() - start, CHUNK_NBYTES * 16 - lead)
        size = -(-(lead + take) // WORD_NBYTES) * WORD_NBYTES
        padded = torch.zeros(size, dtype=torch.uint8, device=data.device)
        padded[lead : lead + take] = data[start : start + take]
        total += digest_by(of_words, padded, position - lead)
        start += take
        position += take
        lead = position % WORD_NBYTES
    return total & MASK


def digest_words(words: torch.Tensor, first: int) -> int:
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
    return int(total) & MASK


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


def combine(digests: Iterable[int]) -> int:
    """The digest of disjoint parts taken together."""
    return sum(digests) & MASK
