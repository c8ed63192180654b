"""What one word of the image adds to the digest (see digest.formula), for kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from weightcast.digest import formula

_FOLD = tl.constexpr(formula.FOLD)
_SEED = tl.constexpr(formula.B_SEED)
_GAMMA = tl.constexpr(formula.SPLITMIX_GAMMA)
_FIRST = tl.constexpr(formula.SPLITMIX_MULTIPLIERS[0])
_SECOND = tl.constexpr(formula.SPLITMIX_MULTIPLIERS[1])


@triton.jit
def term(word, weight, block):  # type: ignore[no-untyped-def]
    """The term of a word (or of a vector of words), with the weight of its place in the block, and the block's number."""
    return (word + _FOLD * (word >> 32)) * weight * block_weight(block)


@triton.jit
def block_weight(block):  # type: ignore[no-untyped-def]
    """formula.block_weights of one block (or of a vector of blocks)."""
    z = (block.to(tl.uint64) + 1) * _GAMMA + _SEED
    z = (z ^ (z >> 30)) * _FIRST
    z = (z ^ (z >> 27)) * _SECOND
    return ((z ^ (z >> 31)) | 1).to(tl.int64, bitcast=True)
