"""Finite: how many published values are NaN or infinite. A pass of its own over the values, made where it is asked for.

One read finds the tensors that have any, by their least and greatest value: NaN is both. Only those are counted, by a second look. The
pass is not part of the digest, which takes bytes of many tensors as one run and does not know where a type begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from weightcast.layout.memory import Memory
from weightcast.manifest.dtypes import dtype_of
from weightcast.plan import Copy

_NOT_FINITE = {
    torch.float8_e4m3fn: (0x7F, 0x7F),
    torch.float8_e5m2: (0x7C, 0x7C),
    torch.float8_e4m3fnuz: (0xFF, 0x80),
    torch.float8_e5m2fnuz: (0xFF, 0x80),
    torch.float8_e8m0fnu: (0xFF, 0xFF),
}
"""For types of one byte, with which torch does not compute: the bits to look at, and what they are in a value that is none."""


@torch.no_grad()
def non_finite(copies: Sequence[Copy], memory: Memory, check: Callable[[], None] = lambda: None) -> dict[str, int]:
    """How many values of each tensor are NaN or infinite as they are published; tensors without any are left out.

    On a GPU the work runs on the current stream and is waited for. ``check`` is called for each tensor and may raise.
    """
    seen: dict[torch.device, list[tuple[Copy, torch.Tensor, torch.Tensor]]] = {}
    found: dict[str, int] = {}
    for copy in copies:
        check()
        values = _values(copy, memory)
        if values.numel() == 0:
            continue
        if values.dtype in _NOT_FINITE:
            _add(found, copy, _count(values, values.dtype))
        elif values.is_floating_point():
            # Rounding keeps the order, so the published values' least and greatest are these, rounded.
            least, most = (value.to(_published(copy)).to(torch.float64) for value in torch.aminmax(values))
            seen.setdefault(values.device, []).append((copy, least, most))
    for several in seen.values():
        extremes = torch.stack([torch.stack((least, most)) for _, least, most in several])
        for number in torch.isfinite(extremes).all(dim=1).logical_not().nonzero().flatten().tolist():
            check()
            copy = several[number][0]
            _add(found, copy, _count(_values(copy, memory), _published(copy)))
    return found


def added(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The counts of parts that have no value in common."""
    total: dict[str, int] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total


def _add(found: dict[str, int], copy: Copy, count: int) -> None:
    if count:
        found[copy.region.name] = found.get(copy.region.name, 0) + count


def _values(copy: Copy, memory: Memory) -> torch.Tensor:
    """The values where they lie; a complex number is two."""
    values = memory.view(copy.src_storage, copy.src_dtype, copy.src_offset, copy.sizes, copy.src_strides)
    return torch.view_as_real(values) if values.is_complex() else values


def _published(copy: Copy) -> torch.dtype:
    published = dtype_of(copy.dst_dtype)
    return torch.float32 if published.is_complex else published


def _count(values: torch.Tensor, published: torch.dtype) -> int:
    if values.dtype in _NOT_FINITE:
        bits, none = _NOT_FINITE[values.dtype]
        return int((values.view(torch.uint8).bitwise_and(bits) == none).sum())
    return int(torch.isfinite(values.to(published)).logical_not().sum())
