"""One run of an engine's own loader on recording tensors, and what it tells."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from weightcast.errors import LoadError, PlanMismatch, WeightcastError
from weightcast.layout import Layout, Placement
from weightcast.layout.memory import Memory, bytes_of
from weightcast.manifest import Manifest, TensorSpec
from weightcast.manifest.dtypes import dtype_of
from weightcast.quoted import NAME_CHARACTERS, quoted
from weightcast.record.coverage import overlapping, unwritten_runs
from weightcast.record.fills import overwritten_names, unkept
from weightcast.record.recorder import Fill, Recorder
from weightcast.record.tensors import RecordingTensor, whole

Loader = Callable[[Iterator[tuple[str, torch.Tensor]]], object]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a loader does with a manifest's tensors, found without writing anything."""

    layout: Layout
    """Landings in the order the loader makes them; where two overlap, the later one wins."""
    reasons: Mapping[str, str]
    """Why each tensor of ``layout.through_loader`` has no direct landing."""
    unused: tuple[str, ...]
    """Tensors that the loader took and did nothing with, or never took."""
    foreign_writes: tuple[str, ...]
    """Writes into live memory of values that come from no checkpoint tensor; a replay of the landings lacks them. Constants
    that live memory holds already (padding) are not counted."""
    loader_writes: tuple[Placement, ...]
    """Live places that the loader fills with values of its own making, constants included."""

    @cached_property
    def overlaps(self) -> tuple[tuple[str, str], ...]:
        """Names (earlier, later) of landings that share bytes, such as tied weights listed twice; the later one wins."""
        placements = self.layout.placements
        pairs = ((placements[a].region.name, placements[b].region.name) for a, b in overlapping(placements))
        return tuple(dict.fromkeys(pairs))

    def unwritten(self) -> dict[int, list[tuple[int, int]]]:
        """Byte ranges (start, end) per storage that no landing fills; storages that are filled wholly are absent."""
        found = {}
        for storage, nbytes in enumerate(self.layout.storage_nbytes):
            runs = unwritten_runs([*self.layout.placements, *self.loader_writes], storage, nbytes)
            if runs:
                found[storage] = runs
        return found


def live_memory(parameters: Mapping[str, torch.Tensor]) -> Memory:
    """The distinct storages behind live parameters, in the order in which the mapping names them first."""
    storages: dict[int, torch.Tensor] = {}
    for tensor in parameters.values():
        flat = bytes_of(tensor.detach())
        if flat.numel():
            storages.setdefault(flat.data_ptr(), flat)
    return Memory(list(storages.values()))


def record_layout(
    load: Loader,
    manifest: Manifest,
    live: Memory | Mapping[str, torch.Tensor],
    device: torch.device | str,
    refuses: Callable[[Exception, str], bool] = lambda error, name: False,
) -> Recording:
    """Run ``load`` once on recording tensors of the whole manifest and return where they land in ``live``.

    Nothing is written: live bytes are the same before and after. Raises LoadError, caused by the loader's exception, when the
    loader does not take the tensors; its exceptions are caught broadly because it is foreign code.

    Args:
        live: the memory that live parameters lie in, or the parameters themselves (then storages are numbered as in
            ``live_memory``).
        device: where loaders are to believe the tensors are.
        refuses: whether an exception of the loader says that it knows no tensor of the name that it took last. That tensor is
            unused then, and the loader goes on with those after it.
    """
    memory = live if isinstance(live, Memory) else live_memory(live)
    recorder = Recorder(memory)
    refused: set[str] = set()
    taken: list[str] = []
    named = [(spec.name, _tensor(spec, torch.device(device))) for spec in manifest.tensors]
    while True:
        try:
            with torch.no_grad(), recorder:
                load(_noted(named[len(taken) :], taken))
            return _recording(manifest, memory, recorder, refused)
        except WeightcastError:
            raise
        except Exception as error:
            if taken and _is_of_form(error):
                raise _other_form(manifest[taken[-1]], error) from None
            if not taken or taken[-1] in refused or not refuses(error, taken[-1]):
                last = f" (last tensor taken: {taken[-1]})" if taken else ""
                told = f"{type(error).__name__}: {error}"
                raise LoadError(f"the loader failed on recording tensors{last}: {told}") from error
            refused.add(taken[-1])


def _is_of_form(error: Exception) -> bool:
    """Whether a loader refuses a tensor because of its sizes: most assert that these are the parameter's."""
    text = str(error)
    return isinstance(error, AssertionError) or (
        isinstance(error, ValueError | RuntimeError)
        and re.search(r"\b([Ss]hapes?|[Ss]izes?|dimension)\b", text) is not None
    )


def _other_form(spec: TensorSpec, error: Exception) -> PlanMismatch:
    said = f": {quoted(str(error), NAME_CHARACTERS)}" if str(error) else ""
    return PlanMismatch(
        f"the engine's loader refuses a tensor of this form (last tensor taken: {spec.name}, {tuple(spec.shape)} {spec.dtype}){said}"
    )


def _tensor(spec: TensorSpec, device: torch.device) -> RecordingTensor:
    return whole(spec, torch.empty(spec.shape, dtype=dtype_of(spec.dtype), device="meta"), device)


def _noted(named: list[tuple[str, RecordingTensor]], taken: list[str]) -> Iterator[tuple[str, RecordingTensor]]:
    for name, tensor in named:
        taken.append(name)
        yield name, tensor


def _recording(manifest: Manifest, memory: Memory, recorder: Recorder, refused: set[str]) -> Recording:
    for fill in recorder.fills:
        recorder.spoil(overwritten_names(fill, recorder.landings), "a constant is written over it afterwards")
    reasons = {name: reason for name, reason in recorder.reasons.items() if name not in refused}
    landings = [landing for landing in recorder.landings if landing.region.name not in refused]
    direct = tuple(landing for landing in landings if landing.region.name not in reasons)
    lost = [landing for landing in landings if landing.region.name in reasons]
    written = [*landings, *recorder.loader_writes]
    foreign = [*recorder.foreign, *(_told(fill) for fill in unkept(recorder.fills, written, memory))]
    landed = {landing.region.name for landing in direct}
    names = [spec.name for spec in manifest.tensors]
    return Recording(
        layout=Layout(
            placements=direct,
            storage_nbytes=tuple(storage.numel() for storage in memory.storages),
            through_loader=tuple(name for name in names if name in reasons),
        ),
        reasons={name: reasons[name] for name in names if name in reasons},
        unused=tuple(name for name in names if name not in landed and name not in reasons),
        foreign_writes=tuple(foreign),
        loader_writes=(*recorder.loader_writes, *lost, *(fill.place for fill in recorder.fills)),
    )


def _told(fill: Fill) -> str:
    place = fill.place
    return f"storage {place.storage}, element {place.offset}, shape {place.region.sizes}: filled with {fill.value}"
