"""The layers of a stock engine's model as its loader fills them: what a checkpoint has to fill, and which tensors may land beside the
loader.

Everything here looks at a record (see weightcast.record) of the engine's own loader, and at tensors that the loader wrote to or would
have written to; the engine itself is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from weightcast.content.layout_digest import digest_tensor
from weightcast.errors import PlanMismatch
from weightcast.layout import Placement
from weightcast.layout.memory import Memory, bytes_of
from weightcast.manifest.names import number_of, renaming_hint
from weightcast.record import Recording

SHOWN = 6
"""So many names stand in an error; the others are counted."""


@dataclass(slots=True)
class LayerTensors:
    """A layer's own tensors in the form that its loader wants: live ones, or stand-ins for them."""

    name: str
    layer: nn.Module
    landable: bool
    """What the loader fills is what the layer's forward pass reads."""
    required: dict[str, torch.Tensor] = field(default_factory=dict)
    """Parameters that a checkpoint has to fill."""
    optional: dict[str, torch.Tensor] = field(default_factory=dict)
    """Buffers, and scales that have a default."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*self.required.values(), *self.optional.values()]


def own_tensors(layer: nn.Module) -> Mapping[str, torch.Tensor]:
    """Parameters and buffers that the layer itself registers."""
    return {
        name: tensor
        for group in (layer._parameters, layer._buffers)
        for name, tensor in group.items()
        if tensor is not None
    }


def live_memory(model: nn.Module, landable: Mapping[str, bool]) -> Memory:
    """The storages of all layers that tensors may land in."""
    layers = dict(model.named_modules())
    return Memory(storages_of(t for name, lands in landable.items() if lands for t in _parameters_of(layers[name])))


def storages_of(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors' storages as bytes, each once, in the order of the tensors."""
    storages: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        flat = bytes_of(tensor.detach())
        if flat.numel():
            storages.setdefault(flat.data_ptr(), flat)
    return list(storages.values())


def names_through_loader(
    layers: Sequence[LayerTensors], numbers: Mapping[int, int], recording: Recording, distrusted: set[str]
) -> set[str]:
    """Names that touch a layer which is not landable, and the names of every layer that those touch in turn.

    ``numbers`` has the number of each recorded storage by its address. ``distrusted`` are names whose landings the loader did not confirm.
    """
    through = set(recording.reasons) | distrusted
    if recording.foreign_writes:
        # The loader also writes values of its own making, which no landing would bring.
        return {placement.region.name for placement in recording.layout.placements} | through
    names_in: dict[int, set[str]] = {}
    for placement in recording.layout.placements:
        names_in.setdefault(placement.storage, set()).add(placement.region.name)
    blocked = [
        (layer.landable, set().union(*(names_in.get(n, set()) for n in _numbers_of(layer, numbers))))
        for layer in layers
    ]
    grown = True
    while grown:
        before = len(through)
        for lands, names in blocked:
            if not lands or names & through:
                through |= names
        grown = len(through) > before
    return through


def kept_once(recording: Recording, through: set[str]) -> set[str]:
    """Names that the loader would write where it writes others: given both, it would be left to chance which one is live. Without a
    place of their own their values are compared by the trainer."""
    return {later for earlier, later in recording.overlaps if earlier in through and later in through}


def check_complete(
    layers: Sequence[LayerTensors],
    numbers: Mapping[int, int],
    recording: Recording,
    padding_nbytes: Callable[[torch.Tensor], int] = lambda tensor: 0,
) -> None:
    """Raise PlanMismatch for parameters that the manifest fills in part or not at all. ``padding_nbytes`` says how many bytes of a
    parameter no checkpoint fills."""
    holes = recording.unwritten()
    written: dict[int, list[Placement]] = {}
    for placement in recording.layout.placements:
        written.setdefault(placement.storage, []).append(placement)
    missing = []
    for layer in layers:
        for own, tensor in layer.required.items():
            number = numbers.get(bytes_of(tensor.detach()).data_ptr()) if tensor.numel() else None
            if number is None:
                continue
            if _missing_nbytes(tensor, holes.get(number, [])) > padding_nbytes(tensor):
                filled = sorted({placement.region.name for placement in written.get(number, [])})
                name = f"{layer.name}.{own}" if layer.name else own
                missing.append(f"{name} ({'only ' + shown(filled) if filled else 'nothing'} of it)")
    if missing:
        wanted = [name.split(" (")[0] for name in missing]
        raise PlanMismatch(
            f"the manifest does not fill {number_of(len(missing), 'parameter')} of the engine's model: {shown(missing)}",
            hint=renaming_hint(recording.unused, wanted)
            or "Give the whole model, of the architecture that the engine serves",
        )


def checksums_of(
    model: nn.Module, instead: Callable[[str], Mapping[str, torch.Tensor]] = lambda name: {}
) -> dict[str, str]:
    """Hex digest of each live tensor of a model that a checkpoint fills. ``instead`` gives, for a layer's name, tensors that stand for the
    layer's own of the same names."""
    found = {}
    for name, layer in model.named_modules():
        for own, tensor in {**own_tensors(layer), **instead(name)}.items():
            if tensor.numel() and tensor.device.type != "meta" and own not in layer._non_persistent_buffers_set:
                found[f"{name}.{own}" if name else own] = f"{digest_tensor(tensor.detach()):016x}"
    return found


def shown(names: Sequence[str]) -> str:
    """The names as an error tells them."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _parameters_of(layer: nn.Module) -> list[torch.Tensor]:
    """What a loader may fill: parameters, and buffers that have a weight loader or belong to the checkpoint."""
    persistent = [t for n, t in layer._buffers.items() if t is not None and n not in layer._non_persistent_buffers_set]
    return [*(t for t in layer._parameters.values() if t is not None), *persistent]


def _numbers_of(layer: LayerTensors, numbers: Mapping[int, int]) -> set[int]:
    pointers = (bytes_of(tensor.detach()).data_ptr() for tensor in layer.tensors if tensor.numel())
    return {numbers[pointer] for pointer in pointers if pointer in numbers}


def _missing_nbytes(tensor: torch.Tensor, holes: list[tuple[int, int]]) -> int:
    start = int(tensor.storage_offset()) * tensor.itemsize
    end = start + tensor.numel() * tensor.itemsize
    return sum(max(0, min(high, end) - max(low, start)) for low, high in holes)
