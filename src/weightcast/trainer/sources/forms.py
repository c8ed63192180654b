"""Forms: what the tensors of a mapping were at connect, compared with what they are now without a loop in Python."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from operator import attrgetter
from types import NoneType
from typing import Any

import torch

from weightcast.dtypes import name_of
from weightcast.errors import StateError
from weightcast.trainer.sources.shards import is_distributed, shard_of

_placements = attrgetter("placements")
_dtype = attrgetter("dtype")


class Forms:
    """Names, element types, shapes and placements of a mapping's tensors. A model may have ten thousand of them, and a round
    waits for the check: each property is read by one ``map`` and compared as one list.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._names = list(tensors)
        self._kinds: list[type] = []
        self._known = [_form(value) for value in tensors.values()]
        self._bulk = self._read(list(tensors.values()))[1:]

    @torch.no_grad()
    def locals_of(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """What this process holds of each tensor, in the order of connect; StateError names the first that changed."""
        values: list[Any] = list(map(tensors.get, self._names))
        local, *bulk = self._read(values) if NoneType not in map(type, values) else ([], ())
        if tuple(bulk) != self._bulk:
            self._name_the_change(values)
        return local

    def _read(self, values: list[Any]) -> tuple[list[torch.Tensor], list[Any], list[Any], list[Any], list[Any]]:
        """The local values, then their dtypes and shapes, and the whole shapes and placements of the distributed ones."""
        kinds = list(map(type, values))
        if kinds != self._kinds:
            self._kinds, self._distributed = kinds, [is_distributed(value) for value in values]
            self._at = [i for i, flag in enumerate(self._distributed) if flag]
        shards = list(compress(values, self._distributed))
        local = list(values)
        for index, value in zip(self._at, map(shard_of, shards), strict=True):
            local[index] = value
        wholes = list(map(torch.Tensor.size, shards))
        return (
            local,
            list(map(_dtype, local)),
            list(map(torch.Tensor.size, local)),
            wholes,
            list(map(_placements, shards)),
        )

    def _name_the_change(self, values: list[Any]) -> None:
        for name, before, value in zip(self._names, self._known, values, strict=True):
            if value is None:
                raise StateError(f"{name!r} was published at connect() and is gone")
            if (now := _form(value)) != before:
                raise StateError(f"{name!r} was {before} at connect() and is {now}", hint="Connect again")


def _form(value: torch.Tensor) -> str:
    """For the one message: what may not change between rounds."""
    text = f"{name_of(value.dtype)} {tuple(value.shape)}"
    if not is_distributed(value):
        return text
    return f"{text} with {tuple(shard_of(value).shape)} here by {tuple(_placements(value))}"
