"""Parts: a source that is a mapping of prefixes to models or checkpoints, such as a model and its draft, published as one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from torch import nn

from weightcast.errors import InvalidInput
from weightcast.sources.renaming import Rename, renamed

PartsLike = Mapping[str, nn.Module] | Mapping[str, Mapping[str, torch.Tensor]] | Mapping[str, str] | Mapping[str, Path]
"""Modules, mappings of tensors or checkpoint folders, by what the names of their checkpoint tensors are to begin with; "" for one of them."""

_SOLE = "model"
"""What the part without a prefix is called in messages."""


def is_parts(source: object) -> TypeGuard[PartsLike]:
    """Whether a source is several. A mapping that makes its tensors when they are looked up is not asked: it has tensors."""
    if not isinstance(source, Mapping) or type(source).__getitem__ not in (dict.__getitem__, OrderedDict.__getitem__):
        return False
    parts = list(source.values())
    return any(isinstance(part, nn.Module | Mapping) for part in parts) or _are_folders(parts)


def folders_of(source: object) -> Mapping[str, str | Path] | None:
    """The checkpoint folders by prefix, where all parts of a source are such."""
    if not is_parts(source) or not _are_folders(list(source.values())):
        return None
    return cast("Mapping[str, str | Path]", source)


def as_one(
    parts: Mapping[str, Any], rename: Rename | None
) -> tuple[nn.Module | Mapping[str, torch.Tensor], Rename | None]:
    """Return one module or mapping that has all parts, and the renaming that gives its tensors the names to publish. ``rename`` is
    the user's, of names with prefixes.

    The parts are those that the mapping has now. Raises InvalidInput for parts of several kinds.
    """
    if not all(isinstance(prefix, str) for prefix in parts):
        raise InvalidInput(f"the parts of a source have prefixes that are text, not {list(parts)!r}", field="source")
    if all(isinstance(part, nn.Module) for part in parts.values()):
        return _as_module(parts, rename)
    if all(isinstance(part, Mapping) for part in parts.values()):
        return _Joined(parts), rename
    kinds = ", ".join(f"{prefix!r}: {type(part).__name__}" for prefix, part in parts.items())
    raise InvalidInput(
        f"the parts of a source are all modules, all mappings of tensors or all checkpoint folders, not {kinds}",
        field="source",
        hint="Give state dicts in place of the modules",
    )


def parts_of(source: object) -> list[object]:
    """The parts of a source; the source itself where it is one."""
    return list(source.values()) if is_parts(source) else [source]


def _are_folders(parts: list[object]) -> bool:
    return bool(parts) and all(isinstance(part, str | Path) for part in parts)


def _as_module(parts: Mapping[str, nn.Module], rename: Rename | None) -> tuple[nn.Module, Callable[[str], str]]:
    whole, prefixes = nn.Module(), dict[str, str]()
    for prefix, part in parts.items():
        name = prefix.strip(".").replace(".", "_") or _SOLE
        if name in prefixes:
            raise InvalidInput(
                f"the parts of a source have prefixes that differ by more than dots, not {prefix!r}", field="source"
            )
        whole._modules[name], prefixes[name] = part, prefix

    def renamed_part(name: str) -> str:
        part, _, rest = name.partition(".")
        published = prefixes[part] + rest
        return renamed([published], rename)[published]

    return whole, renamed_part


class _Joined(Mapping[str, torch.Tensor]):
    """Mappings of tensors as one, each under its prefix. Looking up a tensor looks it up in the mapping that has it."""

    def __init__(self, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self._places = {prefix + name: (part, name) for prefix, part in parts.items() for name in part}
        self._parts = dict(parts)
        if len(self._places) < sum(map(len, parts.values())):
            raise InvalidInput(
                f"two parts of the source, {list(parts)!r}, have tensors of one name with these prefixes",
                field="source",
            )

    def __getitem__(self, name: str) -> torch.Tensor:
        part, own = self._places[name]
        return part[own]

    def __iter__(self) -> Iterator[str]:
        return (prefix + name for prefix, part in self._parts.items() for name in part)

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))
