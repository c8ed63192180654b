"""What stands in for torch_memory_saver on a CPU, whose library is CUDA's: memory that is given away holds garbage.

SGLang's own code for ``--enable-memory-saver`` runs over the stand-in. A weight that is read while it is away, or that comes back without its
values, has random bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

WEIGHTS = "weights"


class MemorySaver:
    """SGLang calls it as the package and as the package's only object."""

    enabled = True

    def __init__(self) -> None:
        self._places: list[tuple[nn.Module, str]] = []
        self._backs_up = False
        self._kept: list[torch.Tensor] = []

    def configure_subprocess(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def region(self, tag: str, enable_cpu_backup: bool = False) -> Iterator[None]:
        """Remember the parameters that are made inside, if they are weights."""
        if tag != WEIGHTS:
            yield
            return
        self._backs_up = enable_cpu_backup
        hook = register_module_parameter_registration_hook(
            lambda module, name, parameter: self._places.append((module, name))
        )
        try:
            yield
        finally:
            hook.remove()

    def pause(self, tag: str) -> None:
        if tag == WEIGHTS:
            weights = self._weights()
            assert weights, "the model was loaded inside of a region"
            self._kept = [weight.clone() for weight in weights] if self._backs_up else []
            for weight in weights:
                _spoil(weight)

    def resume(self, tag: str) -> None:
        if tag == WEIGHTS:
            for weight, kept in zip(self._weights(), self._kept, strict=False):
                weight.copy_(kept)

    def _weights(self) -> list[torch.Tensor]:
        """All of them, each storage once."""
        found = {}
        for module, name in self._places:
            weight = module._parameters.get(name)
            if weight is not None and weight.numel():
                found[weight.data_ptr()] = weight.data
        return list(found.values())


def _spoil(weight: torch.Tensor) -> None:
    """Other values, none of them NaN: a server may refuse to sample from those."""
    weight.copy_(torch.randn(weight.shape))


def install() -> None:
    """Put the stand-in in the place of the package, in this process and those that it forks."""
    from sglang.srt.utils import torch_memory_saver_adapter as adapter

    adapter.torch_memory_saver = adapter._memory_saver = MemorySaver()
    adapter.import_error = None
