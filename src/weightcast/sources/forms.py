"""Forms: what the tensors of a mapping were at connect, compared with what they are now without a loop in Python."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from operator import attrgetter
from types import NoneType
from typing import Any

import torch

from weightcast.errors import StateError
from weightcast.manifest.dtypes import name_of
from weightcast.sources.shards import is_distributed, shard_of

AGAIN_HINT = "Call connect() to publish the mapping as it is now"

_placements = attrgetter("placements")
_dtype = attrgetter("dtype")


class Forms:
    """Names, element types, shapes and placements of a mapping's tensors at connect. A model may have ten thousand tensors, and a round
    waits for the check, so the check has no loop in Python. Tensors that are the same objects, of the same size at the same place,
    count as unchanged. Of other tensors each property is read by one ``map`` and compared as one list."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._names = sorted(tensors)
        self._kinds: list[type] = []
        values = list(map(tensors.__getitem__, self._names))
        self._known = list(map(_form, values))
        local = self._locals(values)
        self._bulk = self._properties(values, local)
        self._seen = self._identities(values, local)

    @torch.no_grad()
    def locals_of(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return what this process holds of each tensor, in the order of names. StateError names the first tensor that changed."""
        if len(tensors) > len(self._names):
            new = next(name for name in tensors if name not in set(self._names))
            raise StateError(f"{new!r} came into the mapping since connect()", hint=AGAIN_HINT)
        values: list[Any] = list(map(tensors.get, self._names))
        if NoneType in map(type, values):
            self._name_the_change(values)
        local = self._locals(values)
        now = self._present(values, local)
        if now != self._seen:
            if _are_placed(now) != _are_placed(self._seen) or self._properties(values, local) != self._bulk:
                self._name_the_change(values)
            self._seen = now
        return local

    def _present(self, values: list[Any], local: list[torch.Tensor]) -> tuple[list[int], ...]:
        """The identities; StateError names what is no dense tensor any more."""
        try:
            return self._identities(values, local)
        except (TypeError, RuntimeError):
            self._name_the_change(values)
            raise

    def _locals(self, values: list[Any]) -> list[torch.Tensor]:
        kinds = list(map(type, values))
        if kinds != self._kinds:
            self._kinds, self._distributed = kinds, [is_distributed(value) for value in values]
            self._at = [i for i, flag in enumerate(self._distributed) if flag]
        local = list(values)
        for index, shard in zip(self._at, map(shard_of, compress(values, self._distributed)), strict=True):
            local[index] = shard
        return local

    def _properties(self, values: list[Any], local: list[torch.Tensor]) -> tuple[list[Any], ...]:
        """Element types and shapes of the local values, whole shapes and placements of the distributed ones."""
        shards = list(compress(values, self._distributed))
        sizes = torch.Tensor.size
        return (
            list(map(_dtype, local)),
            list(map(sizes, local)),
            list(map(sizes, shards)),
            list(map(_placements, shards)),
        )

    @staticmethod
    def _identities(values: list[Any], local: list[torch.Tensor]) -> tuple[list[int], ...]:
        """Which objects, where and how large. The objects are not kept alive, as that would hold a second model in memory; one
        that takes the id and the place of another of its size differs in form only, which the copy refuses or casts."""
        addresses, numels = map(torch.Tensor.data_ptr, local), map(torch.Tensor.numel, local)
        return list(map(id, values)), list(addresses), list(numels)

    def _name_the_change(self, values: list[Any]) -> None:
        for name, before, value in zip(self._names, self._known, values, strict=True):
            if value is None:
                raise StateError(f"{name!r} was published at connect() and is gone", hint=AGAIN_HINT)
            if (now := _form(value)) != before:
                raise StateError(f"{name!r} was {before} at connect() and is {now}", hint=AGAIN_HINT)


def _are_placed(identities: tuple[list[int], ...]) -> list[bool]:
    """Which tensors have an address: none without elements has one, nor on the meta device."""
    return list(map(bool, identities[1]))


def _form(value: object) -> str:
    """For the one message: what may not change between rounds."""
    if not isinstance(value, torch.Tensor):
        return f"of type {type(value).__name__}"
    text = f"{name_of(value.dtype)} {tuple(value.shape)}"
    if value.is_meta:
        return f"{text} without values (on the meta device)"
    if value.layout is not torch.strided:
        return f"{text} in the layout {value.layout}"
    if not is_distributed(value):
        return text
    return f"{text} with {tuple(shard_of(value).shape)} here by {tuple(_placements(value))}"
