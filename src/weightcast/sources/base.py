"""Source: where the trainer's weights come from, as a manifest, holdings and memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from weightcast.deadline import Deadline
from weightcast.errors import InvalidInput, StateError
from weightcast.layout import Layout
from weightcast.layout.memory import Memory
from weightcast.manifest import Manifest

if TYPE_CHECKING:
    from weightcast.sources.streamed import Modes, Stream


class Source(ABC):
    """The weights that a trainer publishes: which tensors there are, and where their values lie in this process's memory.

    ``manifest``, ``layout`` and ``memory`` do not change while a Publisher is connected.
    """

    manifest: Manifest
    layout: Layout
    """The places in ``memory`` at which tensors of the manifest lie."""
    memory: Memory
    device: torch.device
    dtype: torch.dtype | None = None
    """The type in which floating-point tensors are published; None: each tensor is published in its own type."""
    deadline: Deadline | None = None
    """That of the call that runs, for sources that wait for other ranks in ``fill`` and ``refresh``."""
    held_s: float | None = None
    """How long taking the values of this round held up the trainer; None where the whole call does."""
    is_copied = False
    """Whether the user's tensors lie elsewhere, so that ``refresh`` copies their values into ``memory``."""

    @property
    def own_nbytes(self) -> int:
        """The bytes of memory that hold published values beside the user's own tensors."""
        return 0

    def consolidate(self) -> None:
        """Lay all storages side by side in one arena. A source that cannot move its tensors does nothing."""
        return

    @abstractmethod
    def rebind(self, memory: Memory) -> None:
        """Use another memory, which holds the same bytes, from now on. A source that moves the user's tensors rebinds them."""

    @abstractmethod
    def refresh(self) -> None:
        """Bring the values that are to be published into ``memory``. Called at the start of each round. Raises StateError when the
        user's tensors are no longer those that were there at connect."""

    def fill(self) -> None:
        """Do the part of ``refresh`` that has to end before anything reads ``memory``; ``check`` does the rest.

        By default ``fill`` does all of ``refresh``. Raises StateError as ``refresh`` does.
        """
        self.refresh()

    def gather(self) -> None:
        """Do ``fill``, and have what the device still has to do for it queued on the caller's stream. By default ``gather`` waits, too."""
        self.fill()

    def check(self) -> None:  # noqa: B027 - nothing is left to check where ``fill`` is all of it
        """Do the part of ``refresh`` that writes nothing and may run while ``memory`` is being read. A round counts only when ``check`` has
        returned. By default ``check`` does nothing. Raises StateError as ``refresh`` does."""

    is_private = False
    """Whether the user's tensors may change once ``fill`` has returned."""
    slots = 1
    """Of a stream: how many windows there is memory for."""

    @property
    def is_spent(self) -> bool:
        """Whether the values of the next round were given for that round alone and cannot be read a second time."""
        return False

    def pour(self, claim: Callable[[int], None], deadline: Deadline, *, to_the_end: bool) -> Iterator[int]:
        """Read a stream once (see windowed). Weights that lie still are there already."""
        raise NotImplementedError

    def filled_digest(self, window: int) -> int | None:
        """Of a stream: the digest of all that is in a window, where it was taken as the window was filled."""
        return None

    def open(self, stream: Stream | None, modes: Modes) -> None:
        """Say what the next round of a stream reads: an iterator, or for None one that is made for the round. ``modes`` are the
        caller's."""
        if stream is not None and not isinstance(stream, Iterable):
            raise InvalidInput(
                f"a {type(stream).__name__} is no stream of names and tensors",
                field="stream",
                hint="The deadline is given by name: publish(timeout_s=5)",
            )
        if stream is not None:
            raise StateError(
                "this Publisher was given its tensors when it was made, and takes no stream",
                hint="Give it a StreamSource in place of them",
            )

    def exhaust(self) -> None:
        """Read a stream to its end and keep nothing. StateError where the source is no stream."""
        raise StateError("this rank publishes no stream", hint="Give every rank the same kind of source")

    def follow(self) -> bool:
        """Take up the user's tensors where they lie now, in a new ``memory`` of the same layout; quickly, as nothing is looked at but where
        they lie. False where that cannot be: the source has to be made anew. Raises StateError as ``refresh`` does."""
        return False

    def let_go(self) -> bool:
        """Refer to nothing of the user's memory until ``follow``. False where that cannot be: the source has to be closed."""
        return False

    def check_form(self) -> None:  # noqa: B027 - a source may have nothing of the user's that can change its form
        """Raise StateError, as ``refresh`` does, when the user's tensors are no longer those that were there at connect. Writes nothing."""

    def close(self) -> None:
        """Free the memory that the source made, also while the source is still referenced. The user's tensors stay valid, in memory of
        their own."""
        self.memory = Memory(())


def device_of(tensors: list[torch.Tensor]) -> torch.device:
    """The one device all tensors are on, CPU when there are none."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        from weightcast.errors import Unsupported

        raise Unsupported(
            f"weights on several devices in one process: {sorted(map(str, devices))}",
            hint="Run one trainer rank per device",
        )
    return devices.pop() if devices else torch.device("cpu")


def wait_for_stream(device: torch.device) -> None:
    """Return when the values written on this thread's stream are there: digests and transports read them on streams of
    their own."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
