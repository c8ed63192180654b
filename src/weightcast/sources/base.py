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
    """The trainer's half of a plan. ``manifest``, ``layout`` and ``memory`` are fixed once a Publisher is connected."""

    manifest: Manifest
    layout: Layout
    """Holdings of the manifest's tensors in ``memory``."""
    memory: Memory
    device: torch.device
    dtype: torch.dtype | None = None
    """The type that the user wants floating-point tensors to be published in; None: the type of each."""
    is_copied = False
    """Whether ``refresh`` copies the values into ``memory``, where the user's tensors do not lie."""

    def consolidate(self) -> None:
        """Lay all storages side by side in one arena, where the source can move its tensors; otherwise nothing."""
        return

    @abstractmethod
    def rebind(self, memory: Memory) -> None:
        """Continue on another memory that holds the same bytes; tensors of the user follow where they are moved."""

    @abstractmethod
    def refresh(self) -> None:
        """Make ``memory`` hold the values to publish now. Called at the start of each round; raises StateError when the
        user's tensors are not what they were at connect."""

    def fill(self) -> None:
        """What of ``refresh`` has to come before anybody reads ``memory``; ``check`` is the rest of it.

        All of it by default. Raises StateError as ``refresh`` does.
        """
        self.refresh()

    def check(self) -> None:  # noqa: B027 - nothing is left to check where ``fill`` is all of it
        """What of ``refresh`` may run while ``memory`` is being read: it writes nothing. What was read counts only once it has
        returned. Nothing by default; raises StateError as ``refresh`` does."""

    slots = 1
    """Of a stream: how many windows there is memory for."""

    @property
    def is_spent(self) -> bool:
        """Whether what a round reads was given for it alone, and cannot be read again."""
        return False

    def pour(self, claim: Callable[[int], None], deadline: Deadline, *, to_the_end: bool) -> Iterator[int]:
        """Of a stream: read it once (see windowed). Values that lie still are there."""
        raise NotImplementedError

    def open(self, stream: Stream | None, modes: Modes) -> None:
        """Of a stream: what the next round reads, an iterator or, for None, one that is made for it. ``modes`` are the caller's."""
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
        """Read a stream to its end and keep nothing; StateError where the source is none."""
        raise StateError("this rank publishes no stream", hint="Give every rank the same kind of source")

    def check_form(self) -> None:  # noqa: B027 - a source may have nothing of the user's that can change its form
        """Raise StateError, as ``refresh`` does, when the user's tensors are not what they were at connect. Writes nothing."""

    def close(self) -> None:
        """Free what the source made, also while it is still referenced. Tensors of the user stay valid, in memory of their own."""
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
