"""Processing: what an engine does with some layers' weights after they were loaded, such as quantising them, beside the running engine.

The *unprocessed* weights of these layers land in a storage of their own, behind the live ones. What the engine makes of them are the
*processed* tensors, which its forward pass reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch


class Processing(ABC):
    """The layers of a model whose live tensors are not what lands. ``reserve`` comes before ``process``, and ``process`` before ``exchange``."""

    nbytes: int
    """The bytes of the unprocessed weights."""
    is_padded: bool
    """Whether all landings in the unprocessed weights are padded (see layout.is_padded)."""
    processed_nbytes: int
    """The bytes of the processed tensors."""
    scratch_nbytes: int
    """The bytes that processing takes for a moment, on the model's device."""

    @abstractmethod
    def reserve(self, unprocessed: torch.Tensor, allocate: Callable[[int], torch.Tensor] | None) -> None:
        """Take the memory that the unprocessed weights land in, and allocate a second copy of the processed tensors. None: there is no
        second copy, and only ``process_in_place`` is called."""

    @abstractmethod
    def compile(self) -> None:
        """Compile what ``exchange`` runs."""

    @abstractmethod
    def process(self) -> None:
        """Process what landed into the second copy, and leave what landed as it is. May run beside the engine; on a GPU the work is
        queued on the current stream."""

    @abstractmethod
    def exchange(self) -> None:
        """Exchange the second copy with the live tensors. A second call undoes the first one. On a GPU the work is queued on the current
        stream."""

    @abstractmethod
    def process_in_place(self) -> None:
        """Process what landed into the live tensors, and leave what landed as it is. On a GPU the work is queued on the current
        stream."""

    @abstractmethod
    def forget(self) -> None:
        """Give up all that ``reserve`` took."""
