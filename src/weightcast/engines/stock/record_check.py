"""Checks a record against the engine's own loader: what the loader writes must be what the landings would have brought.

The loader runs once more, on stand-ins, with tensors whose bytes differ from place to place. Only what this worker lands is
filled in: the rest of a tensor that is sliced over workers is reserved and never touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from weightcast.layout import Placement
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import dtype_of
from weightcast.record import Recording

WHOLE_NBYTES = 2 * 2**30
"""A model of up to so many bytes is checked as a whole."""
_PERIOD_NBYTES = 1_048_583
"""Prime, so that no two rows, slices or tensors of a checkpoint begin alike."""


def names_that_differ(
    load: Callable[[Iterable[tuple[str, torch.Tensor]]], None], manifest: Manifest, memory: Memory, recording: Recording
) -> set[str]:
    """Return the names whose landings are not what ``load`` writes into ``memory``, the stand-ins in which the landings were recorded."""
    landings: dict[str, list[Placement]] = {}
    for placement in recording.layout.placements:
        landings.setdefault(placement.region.name, []).append(placement)
    overwritten = {earlier for earlier, _ in recording.overlaps}
    specs = _sample([spec for spec in manifest.tensors if spec.name in landings])
    pattern = _Pattern()
    with torch.no_grad():
        load(_patterned(specs, landings, pattern))
    return {
        spec.name
        for spec in specs
        if spec.name not in overwritten and not _as_recorded(spec, landings[spec.name], memory, pattern)
    }


def _sample(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """All of a small model; of a large one some of each kind (names that differ in numbers only, of one shape), spread over the
    model, which run through the same code as the others: a large model's stand-ins would take minutes to fill."""
    if sum(spec.nbytes for spec in specs) <= WHOLE_NBYTES:
        return list(specs)
    kinds: dict[tuple[object, ...], list[TensorSpec]] = {}
    for spec in specs:
        kinds.setdefault((re.sub(r"\d+", "#", spec.name), spec.shape, spec.dtype), []).append(spec)
    chosen = {kind[len(kind) * step // 4 - (step == 4)].name for kind in kinds.values() for step in range(5)}
    return [spec for spec in specs if spec.name in chosen]


class _Pattern:
    """Bytes that look random, cheaper than random ones; each tensor's begin elsewhere."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0x5EED)
        self._bytes = torch.randint(0, 256, (_PERIOD_NBYTES,), generator=generator, dtype=torch.uint8, device="cpu")

    def fill(self, part: torch.Tensor, start: int) -> None:
        """Write the pattern from ``start`` on into a tensor of any strides."""
        whole = part if part.is_contiguous() else torch.empty(part.shape, dtype=part.dtype, device="cpu")
        flat = whole.view(-1).view(torch.uint8)
        done = 0
        while done < flat.numel():
            place = (start + done) % _PERIOD_NBYTES
            count = min(flat.numel() - done, _PERIOD_NBYTES - place)
            flat[done : done + count] = self._bytes[place : place + count]
            done += count
        if not part.is_contiguous():
            part.copy_(flat.view(part.dtype).view(part.shape))


def _patterned(
    specs: Sequence[TensorSpec], landings: dict[str, list[Placement]], pattern: _Pattern
) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in specs:
        yield spec.name, _tensor(spec, landings[spec.name], pattern)


def _tensor(spec: TensorSpec, landings: Sequence[Placement], pattern: _Pattern) -> torch.Tensor:
    tensor = torch.empty(spec.shape, dtype=dtype_of(spec.dtype), device="cpu")
    for placement in landings:
        pattern.fill(_part(tensor, placement), _start(placement))
    return tensor


def _as_recorded(spec: TensorSpec, landings: Sequence[Placement], memory: Memory, pattern: _Pattern) -> bool:
    wanted = _tensor(spec, landings, pattern)
    return all(
        _same(_part(wanted, p), memory.view(p.storage, p.dtype, p.offset, p.region.sizes, p.strides))
        for p in landings
        if p.region.numel
    )


def _same(given: torch.Tensor, live: torch.Tensor) -> bool:
    """Whether live values are the given ones, cast to the type that they have there. Random bytes are NaNs in places; a cast keeps no
    NaN's bits."""
    if given.dtype == live.dtype:
        return torch.equal(live.flatten().view(torch.uint8), given.flatten().view(torch.uint8))
    return torch.equal(live.nan_to_num(), given.to(live.dtype).nan_to_num())


def _part(tensor: torch.Tensor, placement: Placement) -> torch.Tensor:
    for axis, (offset, size) in enumerate(zip(placement.region.offsets, placement.region.sizes, strict=True)):
        tensor = tensor.narrow(axis, offset, size)
    return tensor


def _start(placement: Placement) -> int:
    """A place in the pattern of the landing's own, the same whenever it is asked for."""
    key = f"{placement.region.name}:{placement.region.offsets}".encode()
    return int.from_bytes(key, "big") % _PERIOD_NBYTES
