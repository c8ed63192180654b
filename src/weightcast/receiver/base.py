"""What a Receiver needs of the engine around it: the live model as memory, and its own loader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from weightcast.errors import Unsupported
from weightcast.layout import Layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest


class LiveModel(ABC):
    """The model of one worker. All calls but ``layout`` and ``derive`` come between two forward passes, on the engine's thread."""

    device: torch.device
    relocatable: bool = False
    """True: parameters may be rebound to other storages (no captured graphs, no packed kernels hold their addresses)."""

    def why_asleep(self) -> str:
        """Why the weights cannot be touched now: the engine sleeps and has unmapped them. Empty when they can."""
        return ""

    @property
    def asleep_nbytes(self) -> int:
        """Bytes of the engine that sleep and will be wanted back: what looks free is not there to be taken."""
        return 0

    @property
    def derived_nbytes(self) -> int:
        """What ``derive`` takes beside the memory that it is given; staging is refused where it does not fit."""
        return 0

    @abstractmethod
    def layout(self, manifest: Manifest) -> Layout:
        """Landings of the manifest's tensors in ``memory()``, plus those that must go through the loader.

        Tensors of the manifest that the model does not use at all are simply absent. A tensor the model needs and the
        manifest lacks raises PlanMismatch, which names it. Writes nothing.
        """

    @abstractmethod
    def memory(self) -> Memory:
        """The storages that live parameters lie in now, numbered as in ``layout``."""

    @abstractmethod
    def rebind(self, memory: Memory) -> None:
        """Point all live parameters at another memory of the same layout (only if ``relocatable``). Cheap, no copies."""

    def derive(self, memory: Memory) -> None:
        """All bytes of a round are in ``memory``, which ``rebind`` may make live: do beforehand what takes long.

        Called while the engine computes, on another thread than its own.
        """
        return

    def refresh(self) -> None:
        """The bytes of ``memory()`` were written in place: bring up to date what is computed from them."""
        return

    def forget(self) -> None:
        """No other memory will be rebound any more: free what was kept for that."""
        return

    @abstractmethod
    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Load whole checkpoint tensors through the engine's own loader, in place; raises LoadError."""

    def unknown(self, names: Sequence[str]) -> Sequence[str]:
        """Those of the names that ``load_weights`` would refuse, as the model has no place for them, as far as that is known
        beforehand."""
        return ()

    @abstractmethod
    def checksums(self) -> dict[str, str]:
        """Hex digest of every live parameter by name."""

    def load_initial(self) -> None:
        """Load the weights that the engine started with; needed only by models with tensors that go through the loader."""
        raise Unsupported(f"{type(self).__name__} cannot return to the weights it started with")
