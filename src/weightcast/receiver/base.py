"""What a Receiver needs of the engine around it: the live model as memory, and its own loader."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from weightcast.errors import Unsupported
from weightcast.layout import Layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest
from weightcast.receiver.processing import Processing


class LiveModel(ABC):
    """The model of one worker. All calls but ``layout`` and ``derive`` come between two forward passes, on the engine's thread."""

    device: torch.device
    relocatable: bool = False
    """True: parameters may be rebound to other storages (no captured graphs, no packed kernels hold their addresses)."""

    always_staged: bool = False
    """True: a round goes live by ``rebind`` alone, so it is staged on the device of the live weights, whatever was wished for."""

    def why_asleep(self) -> str:
        """Say why the weights cannot be touched now: the engine sleeps and has unmapped its weights. Empty when the weights can be
        touched."""
        return ""

    @property
    def asleep_nbytes(self) -> int:
        """The bytes that the engine gave up for its sleep. The engine will want these bytes back, so they count as taken although they
        are free."""
        return 0

    @property
    def derived_nbytes(self) -> int:
        """The bytes that ``derive`` allocates beside the memory that it is given. A worker stages only where these bytes fit as well."""
        return 0

    @property
    def processing(self) -> Processing | None:
        """The layers whose weights the engine processes after they landed, as of the last ``layout``. Their weights land in a storage behind those of
        ``memory()``, which a target allocates; the layout counts this storage."""
        return None

    @abstractmethod
    def layout(self, manifest: Manifest) -> Layout:
        """Return where the manifest's tensors land in ``memory()``, and which tensors must go through the engine's loader.

        A tensor of the manifest that the model does not use is absent from the layout. PlanMismatch names a tensor that the model needs
        and the manifest lacks. Writes nothing.
        """

    def keep(self, parts: Sequence[str]) -> None:
        """From the next ``layout`` on, parts of these names keep their weights where the manifest has nothing for them: "draft" is the
        model that the engine speculates with. An engine without such a part has nothing to do."""
        return

    @abstractmethod
    def memory(self) -> Memory:
        """Return the storages that the live parameters lie in now, numbered as in ``layout``."""

    @abstractmethod
    def rebind(self, memory: Memory) -> None:
        """Point all live parameters at another memory of the same layout. Copies nothing. Called only where ``relocatable`` is True."""

    def spare(self, memory: Memory) -> Memory:
        """Return the memory in which the next round may land: ``memory``, which ``rebind`` has left, or another one of the same layout
        where something still reads that.

        Called while the engine computes, on another thread than the engine's. StateError where there is no other one.
        """
        return memory

    def derive(self, memory: Memory) -> None:
        """Do the slow work of making ``memory`` live before ``rebind`` does so. All bytes of a round are in ``memory``.

        Called while the engine computes, on another thread than the engine's.
        """
        return

    def refresh(self) -> None:
        """Compute anew what the engine derives from its weights. The bytes of ``memory()`` were written in place."""
        return

    def forget(self) -> None:
        """Free what ``derive`` keeps for a ``rebind``: no other memory will be rebound any more."""
        return

    @abstractmethod
    def load_weights(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Load whole checkpoint tensors into the live weights through the engine's own loader. Raises LoadError."""

    def unknown(self, names: Sequence[str]) -> Sequence[str]:
        """Return those of the names that ``load_weights`` would refuse because the model has no place for them, as far as the model can
        tell beforehand."""
        return ()

    @abstractmethod
    def checksums(self) -> dict[str, str]:
        """Return the hex digest of every live parameter, by name."""

    def load_initial(self) -> None:
        """Load the weights that the engine was started with. Only models with tensors that go through the loader need this method."""
        raise Unsupported(f"{type(self).__name__} cannot return to the weights it started with")
