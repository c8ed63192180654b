"""Parts: a source that is a mapping of prefixes to models or checkpoints, such as a model and its draft, published as one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch
from torch import nn

from weightcast.errors import InvalidInput, StateError
from weightcast.sources.renaming import Rename, renamed
from weightcast.sources.wrappers import ALWAYS, PARALLEL, names_without_wrappers

PartsLike = Mapping[str, nn.Module] | Mapping[str, Mapping[str, torch.Tensor]] | Mapping[str, str] | Mapping[str, Path]
"""Modules, mappings of tensors or checkpoint folders, by what the names of their checkpoint tensors are to begin with; "" for one of them."""

AGAIN_HINT = "Call connect() to publish the parts as they are now"
_SOLE = "model"
"""What the part without a prefix is called in messages, where no other part is called so."""
_TAKEN = {*ALWAYS, PARALLEL}
"""Names of a module's part that tell a wrapper."""


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

    Mappings of tensors are looked up in ``parts`` in every round. A module is of the parts that there are now; ``Whole.check`` raises once
    there are others. Raises InvalidInput for parts of several kinds.
    """
    if not all(isinstance(prefix, str) for prefix in parts):
        raise InvalidInput(f"the parts of a source have prefixes that are text, not {list(parts)!r}", field="source")
    if all(isinstance(part, nn.Module) for part in parts.values()):
        return _as_module(parts, rename)
    if all(isinstance(part, Mapping) for part in parts.values()):
        return Joined(parts), rename
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


class Whole(nn.Module):
    """The modules of a mapping as one. A part has its prefix without dots as its name."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._given, self._then = parts, dict(parts)
        self.prefixes = _named(parts)
        """The prefixes by the names of the parts."""
        for name, prefix in self.prefixes.items():
            self._modules[name] = parts[prefix]

    def check(self) -> None:
        """Raise StateError where the mapping has other modules than it had."""
        for prefix, part in self._then.items():
            if self._given.get(prefix) is not part:
                what = "was replaced" if prefix in self._given else "is gone"
                raise StateError(f"the part {prefix!r} of the source {what} since connect()", hint=AGAIN_HINT)
        if new := self._given.keys() - self._then.keys():
            raise StateError(f"the part {min(new)!r} came into the source since connect()", hint=AGAIN_HINT)


def _named(prefixes: Iterable[str]) -> dict[str, str]:
    """Each prefix by a name for its part. Such names neither have dots nor tell a wrapper."""
    found: dict[str, str] = {}
    for prefix in sorted(prefixes, key=lambda prefix: not prefix.strip(".")):
        plain = prefix.strip(".").replace(".", "_")
        name = plain or _SOLE
        while name in _TAKEN or (name in found and not plain):
            name += "_"
        if name in found:
            raise InvalidInput(
                f"the parts of a source have prefixes that differ by more than dots, not {prefix!r}", field="source"
            )
        found[name] = prefix
    return found


def _as_module(parts: Mapping[str, nn.Module], rename: Rename | None) -> tuple[nn.Module, Callable[[str], str]]:
    whole = Whole(parts)

    def renamed_part(name: str) -> str:
        part, _, rest = name.partition(".")
        published = whole.prefixes[part] + rest
        return renamed([published], rename)[published]

    return whole, renamed_part


class Joined(Mapping[str, torch.Tensor]):
    """Mappings of tensors as one, each under its prefix and without the names of wrappers. Looking up a tensor looks it up in the mapping
    that is under its prefix at that time."""

    def __init__(self, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        self._given = parts
        self._plain = {
            (prefix, own): prefix + plain
            for prefix, part in parts.items()
            for own, plain in names_without_wrappers(part).items()
        }
        self._places = {name: place for place, name in self._plain.items()}
        if len(self._places) < len(self._plain):
            raise InvalidInput(
                f"two parts of the source, {list(parts)!r}, have tensors of one name with these prefixes",
                field="source",
            )

    def _current(self) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
        """The parts that are there now. What is put there may be anything."""
        return ((prefix, part) for prefix, part in self._given.items() if isinstance(part, Mapping))

    def __getitem__(self, name: str) -> torch.Tensor:
        prefix, own = self._places[name]
        part = self._given[prefix]
        if not isinstance(part, Mapping):
            raise KeyError(name)
        return part[own]

    def __iter__(self) -> Iterator[str]:
        return (self._plain.get((prefix, own), f"{prefix}{own}") for prefix, part in self._current() for own in part)

    def __len__(self) -> int:
        return sum(len(part) for _, part in self._current())
