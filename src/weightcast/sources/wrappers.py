"""Wrappers: modules around a module, or around one of its parts, that change the names of its tensors and nothing else.

torch.compile, DistributedDataParallel, DataParallel and activation checkpointing are seen through, in modules and in mappings that
were made of such modules. Nothing is imported for that: wrappers are told by where they keep what they wrap.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from weightcast.errors import InvalidInput, Unsupported
from weightcast.sources.renaming import Rename, renamed

ALWAYS = ("_orig_mod", "_checkpoint_wrapped_module")
"""Names under which torch.compile and activation checkpointing keep what they wrap, wherever they are in a name."""
PARALLEL = "module"
"""The name under which parallel wrappers keep what they wrap; modules of users have parts of that name, too."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of all wrappers around it."""
    while (inner := wrapped_name(module) or _sole_part(module)) is not None:
        module = module._modules[inner]  # type: ignore[assignment]
    return module


def plain_names(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Return, for the names of a module's tensors, the names without wrappers. Raises Unsupported for FSDP1."""
    _refuse_flat(module)
    if not any(wrapped_name(part) for part in module.modules()):
        return {name: name for name in names}
    return _distinct((name, _plain_name(module, name)) for name in names)


def names_without_wrappers(tensors: Iterable[str]) -> dict[str, str]:
    """Return, for the names of a mapping's tensors, the names without wrappers."""
    names = list(tensors)
    if not all(isinstance(name, str) for name in names):
        raise InvalidInput("the mapping has names that are no text", field="source")
    is_parallel = bool(names) and all(name.startswith(f"{PARALLEL}.") for name in names)
    return _distinct((name, _without_wrappers(name, is_parallel)) for name in names)


def read_through(
    tensors: Mapping[str, torch.Tensor], rename: Rename | None = None, *, names: Mapping[str, str] | None = None
) -> Mapping[str, torch.Tensor]:
    """Return the same mapping under names without wrappers, or under ``names``, renamed. Looking up a tensor looks it up in the original
    mapping."""
    names = names_without_wrappers(tensors) if names is None else names
    new = renamed(names.values(), rename)
    names = {name: new[plain] for name, plain in names.items()}
    is_plain = type(tensors).__getitem__ in (dict.__getitem__, OrderedDict.__getitem__)
    if is_plain and all(name == plain for name, plain in names.items()):
        return tensors
    return ReadThrough(tensors, {plain: name for name, plain in names.items()})


class ReadThrough(Mapping[str, torch.Tensor]):
    """A mapping under other names. Each look-up calls ``__getitem__`` of the original, which may make the tensor only then. ``first``
    holds the tensors that were looked up first; while it does, these tensors are returned again. A name that came into the original
    later is seen as it is there."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, dict(names)
        self._new = {given: name for name, given in names.items()}
        self.first: dict[str, torch.Tensor] | None = {name: tensors[given] for name, given in names.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        if self.first is not None:
            return self.first[name]
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return (self._new.get(given, given) for given in self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def wrapped_name(module: nn.Module) -> str | None:
    """The name under which a wrapper keeps what it wraps; None for other modules."""
    parts = module._modules
    found = next((name for name in ALWAYS if name in parts), None)
    if found is None and isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return PARALLEL
    return found


def _sole_part(module: nn.Module) -> str | None:
    """Also a parallel wrapper of somebody else: all that it has is one part of that name."""
    is_sole = list(module._modules) == [PARALLEL] and not module._parameters and not module._buffers
    return PARALLEL if is_sole and module._modules[PARALLEL] is not None else None


def _plain_name(module: nn.Module, name: str) -> str:
    """Follow a name through the tree; wrappers that hide their own part of it in a state dict are passed unseen."""
    kept: list[str] = []
    at: nn.Module | None = module
    for step in name.split("."):
        inner = None if at is None else wrapped_name(at)
        while at is not None and inner is not None and step != inner:
            at = at._modules[inner]
            inner = None if at is None else wrapped_name(at)
        if step != inner:
            kept.append(step)
        at = None if at is None else at._modules.get(step)
    return ".".join(kept)


def _without_wrappers(name: str, is_parallel: bool) -> str:
    steps = [step for step in name.split(".") if step not in ALWAYS]
    return ".".join(steps[1:] if is_parallel and steps[0] == PARALLEL else steps)


def _distinct(names: Iterable[tuple[str, str]]) -> dict[str, str]:
    found = dict(names)
    seen: dict[str, str] = {}
    for name, plain in found.items():
        if plain in seen:
            raise InvalidInput(
                f"{seen[plain]!r} and {name!r} are both {plain!r} without their wrappers", field="source"
            )
        seen[plain] = name
    return found


def _refuse_flat(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if type(part).__name__ == "FullyShardedDataParallel":
            raise Unsupported(
                f"{name or 'the module'} is wrapped by FSDP1 (FullyShardedDataParallel), whose parameters are flat",
                hint="Shard it with torch.distributed.fsdp.fully_shard, which keeps each parameter a DTensor",
            )
