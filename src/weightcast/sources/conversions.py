"""Conversions: what a module's checkpoints call its tensors, and where each checkpoint tensor lies in them.

transformers fuses, transposes and renames while it loads. Its own way back to the checkpoint is run once on recording tensors,
which have names and shapes and no values, so that every checkpoint tensor is known as boxes of the module's tensors. Nothing is
computed: values are read from where they are, in every round anew, whole or in shards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from weightcast.errors import Unsupported, WeightcastError
from weightcast.layout import Placement, Region, contiguous_strides
from weightcast.layout.memory import Memory, bytes_of
from weightcast.manifest import TensorSpec
from weightcast.manifest.dtypes import dtype_of, name_of
from weightcast.record.boxes import Box, TooManyBoxes, Walk, boxes_of
from weightcast.record.recorder import Recorder
from weightcast.record.tensors import RecordingTensor, Untraceable, sources_of, whole
from weightcast.sources.absent import refuse_absent
from weightcast.sources.renaming import Rename, renamed
from weightcast.sources.shards import Part, part_of
from weightcast.sources.wrappers import plain_names, unwrapped, wrapped_name

LAZY_HINT = "Publish a mapping of checkpoint names whose __getitem__ makes the tensor from the module: publish() reads it in every round"


class Piece(NamedTuple):
    """A box of the module's tensor ``tensor``, and where it lies in a checkpoint tensor: ``box.target`` and its strides count
    elements of the row-major checkpoint tensor."""

    tensor: str
    box: Box


class Form(NamedTuple):
    """A checkpoint tensor as boxes of the module's tensors. The boxes fill the checkpoint tensor exactly."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Content(NamedTuple):
    """Tensors of the user by name, and the checkpoint tensors that lie in these tensors."""

    tensors: Mapping[str, torch.Tensor]
    forms: Sequence[Form]

    def renamed(self, rename: Rename | None) -> Content:
        """Return the same checkpoint tensors under other names."""
        new = renamed((form.name for form in self.forms), rename)
        return Content(self.tensors, [form._replace(name=new[form.name]) for form in self.forms])

    @classmethod
    def plain(cls, tensors: Mapping[str, torch.Tensor]) -> Content:
        """Return a content in which each tensor is a checkpoint tensor under its own name."""
        forms = [_plain_form(name, name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
        return cls(tensors, forms)


def read_module(module: nn.Module) -> Content:
    """Return the checkpoint tensors of a module, under the names that the module's checkpoints use. Wrappers around the module or
    around parts of it are seen through.

    Raises Unsupported naming a tensor whose values are not here, or a checkpoint tensor that is computed from the module's values.
    """
    module = unwrapped(module)
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    # A state dict holds aliases of parameters, without the marks that others left on them.
    refuse_absent(dict(module.named_parameters()))
    refuse_absent(state)
    names = plain_names(module, state)
    _refuse_parametrized(names.values())
    tensors = {names[name]: value for name, value in state.items()}
    forms, rest = [], dict(tensors)
    for path, model in _library_models("", module):
        inside = {name: rest.pop(name) for name in tensors if name.startswith(path) and name in rest}
        forms += _converted(path, model, inside)
    forms += Content.plain(rest).forms
    used = {piece.tensor for form in forms for piece in form.pieces}
    return Content({name: value for name, value in tensors.items() if name in used}, forms)


def _refuse_parametrized(names: Iterable[str]) -> None:
    """Raise Unsupported for a tensor that torch computes from others whenever the module reads it (weight_norm, parametrize)."""
    for name in names:
        path, mark, rest = f".{name}".partition(".parametrizations.")
        if mark:
            computed = f"{path}.{rest.split('.')[0]}".removeprefix(".")
            raise Unsupported(f"{computed!r} is computed from {name!r} whenever it is read", hint=LAZY_HINT)


def checkpoint_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return checkpoint tensors by name, which share memory with the module. The module is not sharded.

    Raises Unsupported where a checkpoint tensor is not one strided view of the module's memory.
    """
    content = read_module(module)
    parts = {name: part_of(name, value) for name, value in content.tensors.items()}
    views = {}
    for form in content.forms:
        found = [(p, piece.tensor) for piece in form.pieces for p in placements_of(form, piece, parts[piece.tensor], 0)]
        if len(found) != 1:
            raise Unsupported(f"checkpoint tensor {form.name!r} is {len(found)} boxes of the module's tensors")
        place, tensor = found[0]
        views[form.name] = parts[tensor].values.as_strided(form.shape, place.strides, place.offset)
    return views


def _plain_form(name: str, tensor: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Form:
    box = Box((0,) * len(shape), shape, 0, contiguous_strides(shape))
    return Form(name, dtype, shape, (Piece(tensor, box),))


def _library_models(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost models of transformers in a module, and what the names of their tensors begin with."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return
    if isinstance(module, modeling.PreTrainedModel):
        yield path, module
        return
    for name, part in module._modules.items():
        if part is not None:
            yield from _library_models(path if name == wrapped_name(module) else f"{path}{name}.", part)


def _converted(path: str, model: Any, tensors: Mapping[str, torch.Tensor]) -> list[Form]:
    """The checkpoint tensors that the model's ``save_pretrained`` writes, tied ones under each of their names.

    ``tensors`` are the model's, whose names begin with ``path``, as those of the checkpoint tensors will.
    """
    from transformers.core_model_loading import revert_weight_conversion

    unsaved = {path + name for name in model._keys_to_ignore_on_save or ()}
    recorder, device = Recorder(Memory(())), torch.device("cpu")
    recording = {
        name.removeprefix(path): _recording(name, value, device)
        for name, value in tensors.items()
        if name not in unsaved
    }
    try:
        with torch.no_grad(), recorder:
            made: dict[str, Any] = revert_weight_conversion(model, recording)
            return [_form(path + name, value, recorder.reasons) for name, value in made.items()]
    except WeightcastError:
        raise
    except Exception as error:  # conversions are foreign code: whatever they raise means that there is no way back
        raise Unsupported(
            f"{type(model).__name__} has no way back to its checkpoint: {error}", hint=LAZY_HINT
        ) from error


def _recording(name: str, value: torch.Tensor, device: torch.device) -> RecordingTensor:
    spec = TensorSpec(name=name, dtype=name_of(value.dtype), shape=tuple(value.shape))
    return whole(spec, torch.empty(spec.shape, dtype=dtype_of(spec.dtype), device="meta"), device)


def _form(name: str, value: Any, reasons: Mapping[str, str]) -> Form:
    """What a recording tensor, or a list of one, says about the checkpoint tensor ``name``."""
    if not isinstance(value, RecordingTensor):
        raise Unsupported(
            f"checkpoint tensor {name!r} is computed, not read, from the module's tensors", hint=LAZY_HINT
        )
    shape = tuple(value.shape)
    if not value.numel():
        return _plain_form(name, min(value.base.names), value.dtype, shape)
    walks = [Walk(*walk) for walk in zip(shape, value.meta.stride(), contiguous_strides(shape), strict=True)]
    try:
        pieces = tuple(Piece(found.spec.name, found.box) for found in sources_of(value.of, walks, 0, value.dtype))
    except (Untraceable, TooManyBoxes) as error:
        why = next((reasons[tensor] for tensor in sorted(value.base.names) if tensor in reasons), str(error))
        raise Unsupported(
            f"checkpoint tensor {name!r} is computed from {', '.join(sorted(value.base.names))} ({why})", hint=LAZY_HINT
        ) from error
    return Form(name, value.dtype, shape, pieces)


def placed(
    forms: Iterable[Form], parts: Mapping[str, Part]
) -> tuple[tuple[Placement, ...], list[torch.Tensor], dict[int, int]]:
    """Return where this process's part of the checkpoint tensors lies: placements, storages, and the storages' numbers by address.

    Storages are numbered in the order in which the forms name them first.
    """
    storages: list[torch.Tensor] = []
    numbers: dict[int, int] = {}
    placements: list[Placement] = []
    for form in forms:
        for piece in form.pieces:
            part = parts[piece.tensor]
            key = part.values.untyped_storage().data_ptr() if part.values.numel() else 0
            if key not in numbers and (key or 0 in form.shape):
                numbers[key] = len(storages)
                storages.append(bytes_of(part.values))
            if key in numbers:
                placements += placements_of(form, piece, part, numbers[key])
    return tuple(placements), storages, numbers


def placements_of(form: Form, piece: Piece, part: Part, storage: int) -> Iterator[Placement]:
    """Return where this process's part of a piece lies. ``part`` is what this process holds of the piece's tensor, in ``storage``."""
    values, box = part.values, piece.box
    dtype = name_of(values.dtype)
    if not values.numel():
        if 0 in form.shape:
            region = Region(name=form.name, offsets=(0,) * len(form.shape), sizes=form.shape)
            strides = contiguous_strides(form.shape)
            yield Placement(region=region, dtype=dtype, storage=storage, offset=0, strides=strides)
        return
    starts = tuple(map(max, box.offsets, part.offsets))
    ends = tuple(
        min(start + size, first + held)
        for start, size, first, held in zip(box.offsets, box.sizes, part.offsets, values.shape, strict=True)
    )
    walks, target, offset = [], box.target, int(values.storage_offset())
    for dim, (start, end) in enumerate(zip(starts, ends, strict=True)):
        walks.append(Walk(end - start, box.target_strides[dim], values.stride(dim)))
        target += (start - box.offsets[dim]) * box.target_strides[dim]
        offset += (start - part.offsets[dim]) * values.stride(dim)
    if any(walk.size <= 0 for walk in walks):
        return
    for found in boxes_of(form.shape, target, walks, offset):
        region = Region(name=form.name, offsets=found.offsets, sizes=found.sizes)
        yield Placement(region=region, dtype=dtype, storage=storage, offset=found.target, strides=found.target_strides)
