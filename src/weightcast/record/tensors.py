"""Recording tensors: they look like a checkpoint tensor on the engine's device, hold no values, and know where they come from.

Each one is a strided view (a meta tensor keeps offset, sizes and strides through every view operation) of a *base*: a whole
checkpoint tensor, or values assembled from other recording tensors by cat, stack, clone or a cast.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch

from weightcast.errors import Unsupported
from weightcast.layout import contiguous_strides
from weightcast.manifest import TensorSpec
from weightcast.record.boxes import Box, Walk, boxes_of


@dataclass(eq=False, slots=True, kw_only=True)
class Base:
    """What recording tensors are views of: row-major values, and where they come from.

    ``spec`` is set when they are a whole checkpoint tensor; else ``pieces`` hold them, side by side along ``dim``, piece i
    from ``starts[i]`` on. ``spoiled``: an operation changed the values, so nothing can be said but which ``names`` went in.
    """

    meta: torch.Tensor
    names: set[str]
    spec: TensorSpec | None = None
    pieces: Sequence[View] = ()
    dim: int = 0
    starts: Sequence[int] = ()
    cast: bool = False
    spoiled: bool = False


class View(NamedTuple):
    """A view of a base: ``meta`` has its offset, sizes and strides."""

    base: Base
    meta: torch.Tensor


class Untraceable(ValueError):
    """These values do not come unchanged from checkpoint tensors."""


class Source(NamedTuple):
    """A box of a checkpoint tensor and where it lands."""

    spec: TensorSpec
    box: Box


class RecordingTensor(torch.Tensor):
    """A tensor without values; ``base`` and ``meta`` (a view of ``base.meta``) say what it stands for.

    Works only while a Recorder is active: outside, every operation raises Unsupported.
    """

    base: Base
    meta: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, base: Base, meta: torch.Tensor, device: torch.device) -> RecordingTensor:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # views of normal tensors must be normal tensors, even there
                return cls(base, meta, device)
        tensor: RecordingTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.shape,
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
        )
        tensor.base = base
        tensor.meta = meta
        return tensor

    @property
    def of(self) -> View:
        return View(self.base, self.meta)

    def __init__(self, base: Base, meta: torch.Tensor, device: torch.device) -> None:
        """``meta`` has the geometry, ``base`` the values; ``device`` is what loaders see."""

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # torch.nn.Parameter(recording tensor) lands here: the loader is about to replace a live parameter.
        raise Unsupported(
            f"the loader makes new parameters out of {', '.join(sorted(self.base.names))}",
            hint="Recording needs a loader that fills the live parameters in place",
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RecordingTensor({', '.join(sorted(self.base.names))}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # the stub lacks the classmethod
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        raise Unsupported(
            f"{func} on a recording tensor outside of its recording",
            hint="The loader keeps tensors after it returned, or works on other threads; load through the loader instead",
        )


def whole(spec: TensorSpec, meta: torch.Tensor, device: torch.device) -> RecordingTensor:
    """The recording tensor of a whole checkpoint tensor; ``meta`` is a contiguous meta tensor of its form."""
    return RecordingTensor(Base(meta=meta, names={spec.name}, spec=spec), meta, device)


def assembled(pieces: Sequence[View], dim: int, like: torch.Tensor, device: torch.device) -> RecordingTensor:
    """Pieces side by side along ``dim`` as a tensor with the sizes, strides and dtype of ``like`` (dense, meta).

    Values that are cast twice are spoiled: rounding twice is not rounding once.
    """
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    sizes = tuple(like.shape[d] for d in order)
    meta = torch.empty_strided(sizes, contiguous_strides(sizes), dtype=like.dtype, device="meta")
    casts = any(piece.meta.dtype != like.dtype for piece in pieces)
    cast_before = any(piece.base.cast for piece in pieces)
    spans = [piece.meta.shape[dim] if piece.meta.dim() else 1 for piece in pieces]
    base = Base(
        meta=meta,
        names=set().union(*(piece.base.names for piece in pieces)),
        pieces=[View(piece.base, piece.meta.permute(order)) for piece in pieces],
        dim=order.index(dim) if order else 0,
        starts=[0, *itertools.accumulate(spans)][:-1],
        cast=casts or cast_before,
        spoiled=(casts and cast_before) or any(piece.base.spoiled for piece in pieces),
    )
    return RecordingTensor(base, meta.permute([order.index(d) for d in range(like.dim())]), device)


def spoiled(names: set[str], like: torch.Tensor, device: torch.device) -> RecordingTensor:
    """Values that nothing is known of but which checkpoint tensors went in; ``like`` is a meta tensor."""
    return RecordingTensor(Base(meta=like, names=set(names), spoiled=True), like, device)


def sources_of(tensor: View, walks: list[Walk], target: int, dtype: torch.dtype) -> Iterator[Source]:
    """The checkpoint boxes behind a view and where they land when it is copied along ``walks`` as ``dtype``.

    Raises Untraceable (values changed on the way) or TooManyBoxes.
    """
    if tensor.base.spoiled:
        raise Untraceable("its values were changed on the way")
    if tensor.base.cast and tensor.meta.dtype != dtype:
        raise Untraceable(f"it was cast to {tensor.meta.dtype} before it was cast to {dtype}")
    yield from _sources(tensor.base, int(tensor.meta.storage_offset()), walks, target)


def _sources(base: Base, offset: int, walks: list[Walk], target: int) -> Iterator[Source]:
    for box in boxes_of(tuple(base.meta.shape), offset, walks, target):
        if base.spec is not None:
            yield Source(base.spec, box)
        else:
            yield from _through_pieces(base, box)


def _through_pieces(base: Base, box: Box) -> Iterator[Source]:
    """Follow one box of an assembled base into the pieces that it cuts."""
    if not box.offsets:
        yield from _sources(base.pieces[0].base, int(base.pieces[0].meta.storage_offset()), [], box.target)
        return
    dim = base.dim
    start, end = box.offsets[dim], box.offsets[dim] + box.sizes[dim]
    for number in range(bisect_right(base.starts, start) - 1, len(base.pieces)):
        at, piece = base.starts[number], base.pieces[number].meta
        if at >= end:
            break
        low, high = max(start, at), min(end, at + piece.shape[dim])
        if low >= high:
            continue
        sizes, offsets = list(box.sizes), list(box.offsets)
        sizes[dim], offsets[dim] = high - low, low - at
        offset = int(piece.storage_offset()) + sum(o * s for o, s in zip(offsets, piece.stride(), strict=True))
        walks = [Walk(*walk) for walk in zip(sizes, piece.stride(), box.target_strides, strict=True)]
        target = box.target + (low - start) * box.target_strides[dim]
        yield from _sources(base.pieces[number].base, offset, walks, target)
