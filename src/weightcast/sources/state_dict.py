"""StateDictSource: publish a mapping of names to tensors; values are mirrored at the start of each round."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weightcast.errors import InvalidInput
from weightcast.layout import image_layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest, TensorSpec
from weightcast.sources.base import Source, device_of, wait_for_stream
from weightcast.sources.forms import Forms
from weightcast.sources.module import check_kinds, published_dtype


class StateDictSource(Source):
    """Publishes a mapping of names to tensors. Each round begins by copying the values into an arena of the source's own, because the
    tensors of a mapping may be replaced at any time.

    The mapping is read again in every round. Names, shapes and types have to stay what they were at connect.
    """

    is_copied = is_private = True

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None) -> None:
        if not tensors:
            raise InvalidInput("the state dict is empty", field="source")
        check_kinds(tensors)
        self._tensors, self.dtype = tensors, dtype
        self.device = device_of(list(tensors.values()))
        self.manifest = Manifest.of(
            TensorSpec(name=name, dtype=published_dtype(value.dtype, dtype), shape=tuple(value.shape))
            for name, value in tensors.items()
        )
        self._forms = Forms(tensors)
        self.layout = image_layout(self.manifest)
        arena = torch.zeros(self.layout.storage_nbytes[0], dtype=torch.uint8, device=self.device)
        self.rebind(Memory([arena], is_arena=True))

    @property
    def own_nbytes(self) -> int:
        return sum(self.layout.storage_nbytes)

    def rebind(self, memory: Memory) -> None:
        self.memory = memory
        self._views = [
            memory.view(0, placement.dtype, placement.offset, placement.region.sizes, placement.strides)
            for placement in self.layout.placements
        ]

    def close(self) -> None:
        super().close()
        self._views = []

    def check_form(self) -> None:
        self._forms.locals_of(self._tensors)

    @torch.no_grad()
    def refresh(self) -> None:
        torch._foreach_copy_(self._views, self._forms.locals_of(self._tensors))
        wait_for_stream(self.device)
